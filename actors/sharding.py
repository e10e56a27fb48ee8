"""Models whose weights are spread over the ranks of a replica: DeepSpeed ZeRO-3, without an optimizer.

Each rank holds 1/N of every parameter, flattened and padded to a multiple of N. The forward pass gathers a module's own
parameters before the module runs and frees them afterwards; the backward pass does so again where a gradient goes
through a module. DeepSpeed and its settings appear in this file only, and are imported when a model is sharded.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import ray.util
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from actors.errors import ConfigError, WhenceError
from conf.schema import Dtype, ModelConfig, Offload
from influence.exchange import TorchExchange

SHARDED_DTYPES = (Dtype.float32, Dtype.bfloat16)  # those that DeepSpeed makes parameters of, on GPUs float16 too
PREFETCH_NUMBERS = 50_000_000  # weights gathered ahead of their use on a GPU; DeepSpeed's own default
COMMUNICATIONS = (
    "gloo",
    "nccl",
    "process group",
    "processgroup",
    "connection closed by peer",
    "connection reset by peer",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ENGINE = "_whence_engine"  # attribute of a sharded model: its engine must live as long as the model


# --- ranks --------------------------------------------------------------------------------------------------------


def free_address() -> str:
    """Where ranks may meet: this node's address and a port that nobody listens on, `ip:port`."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def join(rank: int, size: int, address: str, timeout: float, gpu: bool) -> TorchExchange:
    """Meet the other ranks of a replica.

    Args:
        rank: This process.
        size: How many there are.
        address: `ip:port` of rank 0, from `free_address` there.
        timeout: Seconds to wait for the others, here and in every later collective.
        gpu: Whether each rank has a GPU of its own, the only one that it sees (NCCL); else gloo.

    Returns:
        The exchange, on a process group of its own: ZeRO's collectives do not mix with ours.

    Raises:
        RuntimeError: If the others do not come in time.
    """
    wait = timedelta(seconds=timeout)
    _describe_to_deepspeed(rank, size, gpu)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=size,
        timeout=wait,
        device_id=device if gpu else None,
    )
    return TorchExchange(cast(dist.ProcessGroup, dist.new_group(timeout=wait)), device)


def leave() -> None:
    """Part from the other ranks; nothing happens where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_communication(error: BaseException) -> bool:
    """Whether an error says that ranks lost one another, in a collective or while they met."""
    if isinstance(error, WhenceError):
        return False
    if isinstance(error, dist.DistError):
        return not isinstance(error, torch.OutOfMemoryError)
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in COMMUNICATIONS)


def _be_alone(gpu: bool) -> None:
    """A process group of one, which DeepSpeed needs even there."""
    _describe_to_deepspeed(0, 1, gpu)
    dist.init_process_group("nccl" if gpu else "gloo", store=HashStore(), rank=0, world_size=1)


def _describe_to_deepspeed(rank: int, size: int, gpu: bool) -> None:
    """DeepSpeed reads its place from the environment. Ray shows a rank its own GPU alone: it is number 0."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"


# --- models -------------------------------------------------------------------------------------------------------


@contextmanager
def created_in_slices(settings: dict[str, Any], gpu: bool) -> Iterator[None]:
    """Inside, `from_pretrained` creates, fills and keeps weights in slices.

    transformers reads the checkpoint: rank 0 maps its files and hands over one module's weights at a time, which the
    others receive and of which each keeps its slice. No rank holds more than its slices and one module's weights.

    Args:
        settings: From `zero_settings`.
        gpu: Where there is no other rank, whether weights are used on a GPU.
    """
    if not dist.is_initialized():
        _be_alone(gpu)
    _import_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _give_freed_memory_back()
    alive = HfDeepSpeedConfig(settings)  # from_pretrained sees it through a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def gather_in_passes(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Add hooks to a model in slices that gather a module's weights when they are needed and free them afterwards.

    Args:
        model: Created by `created_in_slices`; it is called as ever.
        settings: The same.
        device: Where weights are used.
    """
    deepspeed = _import_deepspeed()
    model.requires_grad_(False).eval()
    mark_routed_blocks(model)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.__dict__[_ENGINE] = engine
    _pass_tangents(model)
    model.register_forward_hook(_free_after_pass(engine.optimizer.partition_all_parameters))


def zero_settings(config: ModelConfig, size: int, gpu: bool, largest: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model whose largest parameter has `largest` numbers, over `size` ranks.

    Nothing persists (threshold 0) and nothing stays for a later use (reuse distance 0), so that a rank's share is 1/N
    and what moves is known beforehand. On GPUs the next weights come while the present ones are used; on CPUs that
    would only take time from the computation.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": PREFETCH_NUMBERS if gpu else 0,
    }
    if config.offload is not Offload.none:
        zero["offload_param"] = {"device": config.offload.name, "pin_memory": gpu}
    if config.offload is Offload.nvme:
        slices = math.ceil(largest / size)
        zero["offload_param"] |= {"nvme_path": config.offload_path, "buffer_size": slices, "buffer_count": 8}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used for training only
        "bf16": {"enabled": config.dtype is Dtype.bfloat16},
        "fp16": {"enabled": config.dtype is Dtype.float16},
        "zero_optimization": zero,
    }


def check_sharding(config: ModelConfig, gpu: bool) -> None:
    """Refuse what DeepSpeed cannot do here, by the key's name.

    Raises:
        ConfigError: For a type that it has no parameters of, and for offload to disk without libaio.
    """
    dtypes = (*SHARDED_DTYPES, Dtype.float16) if gpu else SHARDED_DTYPES
    if config.dtype not in dtypes:
        raise ConfigError(
            f"model.dtype={config.dtype.name}: a sharded or offloaded model on {'GPUs' if gpu else 'CPUs'} has one of "
            f"{', '.join(dtype.name for dtype in dtypes)}",
            remedy="set one of these, or cluster.world_size=1 with model.offload=none",
        )
    if config.offload is not Offload.nvme:
        return
    if config.offload_path is None:
        raise ConfigError(
            "model.offload=nvme needs model.offload_path", remedy="set it to a folder on a local disk of every node"
        )
    _import_deepspeed()
    from deepspeed.ops import op_builder

    builder: Any = op_builder.AsyncIOBuilder()  # type: ignore[attr-defined]
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            "model.offload=nvme: DeepSpeed's asynchronous I/O cannot be built here; it needs a C++ compiler, ninja, "
            "and libaio with its header files",
            remedy="install libaio-dev (Debian) or libaio-devel (Fedora) on every node, or set model.offload=cpu",
        )


def mark_routed_blocks(model: nn.Module) -> None:
    """Have a mixture of experts gathered whole, where each expert is a module of its own.

    Each rank's tokens go to experts of their own, so that ranks would gather different modules and wait for one
    another for ever. Experts that are one fused parameter are gathered whole anyhow.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(getattr(module, "experts", None), (nn.ModuleList, nn.ModuleDict)):
            set_z3_leaf_module(module, True)


def unload(model: nn.Module) -> None:
    """Give the memory of a sharded model back; it cannot be used any more. DeepSpeed's caches hold on to models."""
    engine = model.__dict__.pop(_ENGINE, None)
    if engine is None:
        return
    engine.destroy()
    for parameter in model.parameters():
        ours: Any = parameter
        ours.data = ours.data.new_empty(0)
        ours.ds_tensor.data = ours.ds_tensor.data.new_empty(0)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds at this moment: its slices, and what is gathered just now."""
    return sum(_bytes_of(parameter) for parameter in model.parameters())


def _bytes_of(parameter: Tensor) -> int:
    whole = parameter.numel() * parameter.element_size()
    piece: Tensor | None = getattr(parameter, "ds_tensor", None)
    if piece is None:
        return whole
    apart = piece.data_ptr() != parameter.data_ptr()
    return piece.numel() * piece.element_size() + (whole if apart else 0)


def _pass_tangents(model: nn.Module) -> None:
    """Have tangents of forward-mode differentiation pass through DeepSpeed's own functions, which lack a `jvp`.

    Those around modules are the identity, and call its hooks in their backward; another one stands for linear layers.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    linear: Any = LinearFunctionForZeroStage3
    if "jvp" not in vars(linear):
        linear.setup_context = staticmethod(_keeping_weight(linear.setup_context))
        linear.jvp = staticmethod(_linear_tangent)
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            function: Any = module.__dict__.get(name)
            if function is not None:
                function.jvp = staticmethod(_same_tangent)


def _keeping_weight(setup: Callable[..., None]) -> Callable[..., None]:
    def kept(context: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        setup(context, inputs, output)
        context.save_for_forward(inputs[1])

    return kept


def _linear_tangent(context: Any, tangent: Tensor | None, *_frozen: None) -> Tensor | None:
    (weight,) = context.saved_tensors
    return None if tangent is None else tangent.matmul(weight.t())


def _same_tangent(_context: Any, *tangents: Tensor | None) -> Tensor | None:
    (tangent,) = tangents
    return None if tangent is None else tangent.view_as(tangent)


def _free_after_pass(free: Callable[[], None]) -> Callable[..., None]:
    """A hook of the model that frees all parameters when a pass is over.

    DeepSpeed frees a module's parameters when a gradient arrives at the module's input. Autograd begins at the first
    tracked layer, so it never arrives at modules around that layer: what they gathered would stay.
    """

    def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
        logits = output.logits
        if logits.requires_grad:
            engine: Any = torch.autograd.Variable._execution_engine
            logits.register_hook(lambda _grad: engine.queue_callback(free))
        else:
            free()

    return hook


def _import_deepspeed() -> Any:
    """DeepSpeed, which takes seconds to import; without its announcements and without the extension for Intel's CPUs.

    That extension speeds up a reduction that ZeRO-3 does not use. It would be compiled at the first use on each node.
    """
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _give_freed_memory_back() -> None:
    """Have whole weights, which come and go one after the other, leave the process when they are freed.

    glibc puts blocks of up to 32 MiB on its heap once such blocks were freed, where what lies between them keeps it
    from shrinking: a rank would seem to hold most of the model, and more with each pass. Blocks of a mebibyte and more
    are mapped instead. That costs page faults: a quarter of a pass where layers are this small (docs/results/plan.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
