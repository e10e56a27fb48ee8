"""What the ranks of a sharded model do in tests, each in a process of its own, and what they find."""

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import actors.model as model_module
from actors.errors import ConfigError
from actors.model import load_model, load_skeleton
from actors.sharding import free_address, join, leave, resident_bytes, unload
from conf.schema import ModelConfig
from influence.batch import Batch
from influence.exchange import Alone, Exchange
from influence.labels import TrueLabels
from influence.layers import LayerSelection, group_inputs, select_layers
from influence.measurement import log_probabilities
from influence.worker import Worker

ROOT = Path(__file__).parents[2]
PASSES = 3  # DeepSpeed records the order of modules in the first, and goes by it from then on


@dataclass
class Findings:
    """What a rank saw of one model.

    Attributes:
        share: bytes of the parameters, each padded to a multiple of the ranks and divided by them.
        resident: bytes held after loading, after the probe and after every pass.
        gathered: bytes held beyond that at the end of each module's forward pass, and those of the module's own.
        extra: the most bytes held beyond that when the gradient of a tracked layer arrived.
        received: bytes that the gathers of each pass brought.
        selection: the tracked layers with their input groups.
        logits_BTV: of this rank's batch.
        uses: input and output gradient of every tracked layer, from the last pass.
    """

    share: int
    selection: LayerSelection
    resident: list[int] = field(default_factory=list)
    gathered: list[tuple[int, int]] = field(default_factory=list)
    extra: int = 0
    received: list[int] = field(default_factory=list)
    logits_BTV: Tensor | None = None
    uses: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def on_processes(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Run `work(exchange, *arguments)` on `size` ranks; returns what each found, or the error that it raised."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    address = free_address()
    processes, ends = [], []
    with _importable():
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_be_rank, args=(theirs, rank, size, address, timeout, work, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
    try:
        return [pickle.loads(end.recv_bytes()) for end in ends]  # noqa: S301 of our own processes
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def measure(exchange: Exchange, config: ModelConfig, rows: list[list[list[int]]]) -> Findings:
    """Load a model, run a few passes over this rank's rows, and note everything."""
    received = _count_gathers(exchange.size)
    skeleton = load_skeleton(config)
    model = load_model(config, "cpu", exchange)
    selection = group_inputs(model, select_layers(skeleton, config.layers), torch.zeros(1, 4, dtype=torch.long))
    batch = Batch.collate(range(len(rows[exchange.rank])), rows[exchange.rank])
    share = sum(-(-p.numel() // exchange.size) * p.element_size() for p in skeleton.parameters())
    found = Findings(share, selection, [resident_bytes(model)])
    with torch.no_grad(), _watching(model, found):
        found.logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask_BT).logits
    found.resident.append(resident_bytes(model))
    worker = Worker(model, selection)
    for _ in range(PASSES):
        before = received[0]
        found.uses, held = backward(worker, batch)
        found.extra = max([found.extra, *(most - found.resident[0] for most in held)])
        found.resident.append(resident_bytes(model))
        found.received.append(received[0] - before)
    unload(model)
    found.resident.append(resident_bytes(model))
    return found


@contextmanager
def _watching(model: nn.Module, found: Findings) -> Iterator[None]:
    """Note what is held while each module is at work."""

    def note(module: nn.Module, *_: Any) -> None:
        own = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters(False))
        if own:
            found.gathered.append((resident_bytes(model) - found.share, own))

    handles = [module.register_forward_hook(note, prepend=True) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()


def backward(worker: Worker, batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], list[int]]:
    """Activations and output gradients of every tracked layer, and the bytes of parameters held when each arrived."""
    uses: dict[str, tuple[Tensor, Tensor]] = {}
    held: list[int] = []

    def consume(layer: Any, found: Any) -> None:
        uses[layer.name] = (found[0].act_BTI.clone(), found[0].grad_BTO.clone())
        held.append(resident_bytes(worker.model))

    def objective(logits_BTV: Tensor) -> Tensor:
        return log_probabilities(logits_BTV, TrueLabels()(batch, logits_BTV.detach())).sum(1)

    worker.backward(batch, objective, consume)
    return uses, held


def measure_fetching_ahead(exchange: Exchange, config: ModelConfig, rows: list, numbers: int) -> Findings:
    """`measure`, with weights gathered ahead of their use as on GPUs."""
    original = model_module.zero_settings

    def settings(*arguments: Any) -> dict[str, Any]:
        found = original(*arguments)
        found["zero_optimization"]["stage3_prefetch_bucket_size"] = numbers
        return found

    model_module.zero_settings = settings
    return measure(exchange, config, rows)


def measure_all(exchange: Exchange, configs: list[ModelConfig], rows: list[list[list[int]]]) -> list[Findings]:
    """`measure` of several models, one after the other."""
    return [measure(exchange, config, rows) for config in configs]


def refusals(exchange: Exchange, configs: list[ModelConfig]) -> list[str]:
    """What each model is refused with."""
    told = []
    for config in configs:
        try:
            load_model(config, "cpu", exchange)
            told.append("loaded")
        except ConfigError as error:
            told.append(str(error))
    return told


def peak_of_loading(exchange: Exchange, config: ModelConfig) -> int:
    """The most bytes that loading added to this process's own memory; the page cache does not count."""
    exchange.barrier()
    stop, most, base = threading.Event(), [0], _own_bytes()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_model(config, "cpu", exchange)
    stop.set()
    watcher.join()
    return most[0] - base


def wait_for_nobody(exchange: Exchange, config: ModelConfig) -> list[tuple[str, float]]:
    """Rank 0 starts a pass and a gather, the others stay away: the errors, and the seconds until they came."""
    model = load_model(config, "cpu", exchange)
    exchange.barrier()
    if exchange.rank > 0:
        time.sleep(12)
        return []
    calls = (lambda: model(input_ids=torch.tensor([[1, 2, 3]])), lambda: exchange.gather(torch.ones(1)))
    told = []
    for call in calls:
        started = time.perf_counter()
        try:
            call()
        except RuntimeError as error:
            told.append((str(error), time.perf_counter() - started))
    return told


def meet_nobody(address: str, timeout: float) -> None:
    """Join a replica whose other rank never comes."""
    join(0, 2, address, timeout, gpu=False)


class RoutedConfig(PretrainedConfig):
    """Of `RoutedModel`."""

    model_type = "whence_test_routed"

    def __init__(self, vocab_size: int = 12, hidden_size: int = 6, experts: int = 3, **others: Any) -> None:
        self.vocab_size, self.hidden_size, self.experts = vocab_size, hidden_size, experts
        super().__init__(**others)


class RoutedBlock(nn.Module):
    """A mixture of experts that are modules; an expert without tokens is not called."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x_BTH: Tensor, tokens_BT: Tensor) -> Tensor:
        y_BTH = torch.tanh(self.up(x_BTH))
        for number, expert in enumerate(self.experts):
            chosen_BT = tokens_BT % len(self.experts) == number
            if bool(chosen_BT.any()):
                y_BTH = y_BTH + expert(x_BTH) * chosen_BT[..., None]
        return y_BTH


class RoutedModel(PreTrainedModel):
    """Which expert a token goes to depends on the token alone."""

    config_class = RoutedConfig

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RoutedBlock(config.hidden_size, config.experts) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        x_BTH = self.embedding(input_ids).cumsum(1)
        for block in self.blocks:
            x_BTH = x_BTH + block(x_BTH, input_ids)
        return CausalLMOutput(logits=self.head(x_BTH))


AutoConfig.register(RoutedConfig.model_type, RoutedConfig)
AutoModelForCausalLM.register(RoutedConfig, RoutedModel)


def _be_rank(
    end: Connection, rank: int, size: int, address: str, timeout: float, work: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    try:
        exchange: Exchange = join(rank, size, address, timeout, gpu=False) if size > 1 else Alone()
        found = work(exchange, *arguments)
    except Exception as error:  # noqa: BLE001 it is told to the test
        found = RuntimeError(f"rank {rank}: {error}\n{traceback.format_exc()}")
    end.send_bytes(pickle.dumps(found))
    end.close()
    leave()


@contextmanager
def _importable() -> Iterator[None]:
    """The server that forks the ranks imports this module by its name."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _count_gathers(size: int) -> list[int]:
    """Count from now on the bytes that this rank receives in ZeRO's gathers."""
    received = [0]
    module: Any = dist
    original = module.all_gather_into_tensor

    def counted(output_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        received[0] += output_tensor.numel() * output_tensor.element_size() * (size - 1) // size
        return original(output_tensor, *arguments, **options)

    if deepspeed.comm.comm.cdb is None:
        module.all_gather_into_tensor = counted
    else:
        deepspeed.comm.comm.cdb.all_gather_function = counted
    return received


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
