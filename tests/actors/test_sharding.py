"""Models over several ranks: the same numbers as on one, 1/N of the weights each, and no waiting for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from actors.errors import ConfigError
from actors.model import load_model, load_skeleton
from actors.sharding import (
    PREFETCH_NUMBERS,
    check_sharding,
    is_communication,
    leave,
    resident_bytes,
    unload,
    zero_settings,
)
from conf.schema import Dtype, ModelConfig, Offload
from influence.batch import Batch
from influence.layers import group_inputs, select_layers
from influence.worker import Worker
from tests.actors.shards import (
    ROOT,
    Findings,
    RoutedConfig,
    RoutedModel,
    backward,
    free_address,
    measure,
    measure_all,
    measure_fetching_ahead,
    meet_nobody,
    on_processes,
    peak_of_loading,
    refusals,
    wait_for_nobody,
)

ROWS = [  # of each rank: uneven ones, and one without a token to predict
    [[3, 7, 1, 9, 4], [5, 2, 8]],
    [[6], [11]],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9]],
    [[12, 4, 12], [9, 9, 9, 1], [7, 3]],
]
FAMILIES = ("gpt2", "llama")
GANGS = [(1, Offload.cpu), (2, Offload.none), (2, Offload.cpu), (4, Offload.none)]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gpt2: Callable[..., PreTrainedModel],
    tiny_llama: Callable[..., PreTrainedModel],
) -> dict[str, Path]:
    """Checkpoints of several files; their parameters do not divide by 4, and some not by 2."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {
        "gpt2": tiny_gpt2(n_embd=18, n_inner=25, n_layer=3, vocab_size=41),
        "llama": tiny_llama(hidden_size=24, intermediate_size=27, num_hidden_layers=3, vocab_size=41),
    }
    for name, model in models.items():
        model.save_pretrained(root / name, max_shard_size="8KB")
        assert len(list((root / name).glob("*.safetensors"))) > 3
    return {name: root / name for name in models}


@pytest.fixture(scope="module", params=GANGS, ids=lambda gang: f"{gang[0]} ranks, offload {gang[1].name}")
def gang(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[int, dict[str, list[Findings]]]:
    """What the ranks of a gang found with each family."""
    size, offload = request.param
    configs = [ModelConfig(path=str(folders[family]), offload=offload) for family in FAMILIES]
    found = on_processes(size, measure_all, configs, ROWS)
    for rank in found:
        assert not isinstance(rank, Exception), rank
    return size, {family: [rank[number] for rank in found] for number, family in enumerate(FAMILIES)}


def _close(found: Tensor, expected: Tensor, rounding: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= rounding * expected.abs().max() + 1e-12
    )


def _whole(config: ModelConfig, rank: int) -> tuple[Findings, int]:
    """What one process that holds all of the model finds with the rows of a rank, and the bytes of its parameters."""
    model = load_model(config)
    selection = group_inputs(model, select_layers(model, config.layers), torch.zeros(1, 4, dtype=torch.long))
    batch = Batch.collate(range(len(ROWS[rank])), ROWS[rank])
    found = Findings(0, selection)
    with torch.no_grad():
        found.logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask_BT).logits
    found.uses, _ = backward(Worker(model, selection), batch)
    return found, resident_bytes(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_whole_model(
    gang: tuple[int, dict[str, list[Findings]]], folders: dict[str, Path], family: str
):
    size, found = gang
    for rank in range(size):
        ours, (whole, _) = found[family][rank], _whole(ModelConfig(path=str(folders[family])), rank)
        assert ours.selection.layers == whole.selection.layers
        assert ours.selection.total_parameters == whole.selection.total_parameters
        assert ours.logits_BTV is not None
        assert whole.logits_BTV is not None
        assert _close(ours.logits_BTV, whole.logits_BTV)
        assert list(ours.uses) == list(whole.uses)
        for name, (act_BTI, grad_BTO) in whole.uses.items():
            assert _close(ours.uses[name][0], act_BTI), name
            assert _close(ours.uses[name][1], grad_BTO), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_share_of_the_parameters_before_and_after_passes(
    gang: tuple[int, dict[str, list[Findings]]], folders: dict[str, Path], family: str
):
    size, found = gang
    skeleton = load_skeleton(ModelConfig(path=str(folders[family])))
    whole = sum(parameter.numel() * 4 for parameter in skeleton.parameters())
    for ours in found[family]:
        *resident, after_unload = ours.resident
        assert set(resident) == {ours.share}
        padding = ours.share - whole / size
        assert 0 <= padding < 4 * len(list(skeleton.parameters()))
        assert after_unload == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_gathered_module_by_module(
    gang: tuple[int, dict[str, list[Findings]]], folders: dict[str, Path], family: str
):
    size, found = gang
    skeleton = load_skeleton(ModelConfig(path=str(folders[family])))
    modules = [sum(parameter.numel() * 4 for parameter in module.parameters(False)) for module in skeleton.modules()]
    for ours in found[family]:
        assert sorted(own for _, own in ours.gathered) == sorted(own for own in modules if own)
        assert all(held == (own if size > 1 else 0) for held, own in ours.gathered)  # one rank gathers nothing
        assert ours.extra <= max(modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_received_follows_from_the_order_of_modules(
    gang: tuple[int, dict[str, list[Findings]]], folders: dict[str, Path], family: str
):
    """Forward: every module's own parameters. Backward: those of modules after the first tracked layer, again."""
    size, found = gang
    model = load_model(ModelConfig(path=str(folders[family])))
    order = [name for name, module in model.named_modules() if list(module.parameters(False))]
    first = {"gpt2": ("transformer.h.0.mlp.c_fc",), "llama": ("model.layers.0.mlp.gate_proj",)}[family]
    leaves = {"gpt2": set(first), "llama": {*first, "model.layers.0.mlp.up_proj"}}[family]
    called = sorted(order, key=_called_at)
    start = called.index(first[0])
    fetched = [*called, *(name for name in called[start:] if name not in leaves)]
    numbers = [
        -(-parameter.numel() // size) for name in fetched for parameter in model.get_submodule(name).parameters(False)
    ]
    for ours in found[family]:
        assert set(ours.received) == {4 * (size - 1) * sum(numbers)}


def _called_at(name: str) -> tuple[int, int, int]:
    """When a module of GPT-2 or Llama is called: embeddings, the blocks, then norm and head."""
    parts = name.split(".")
    block = next((int(part) for part in parts if part.isdigit()), None)
    if block is None:
        return (0, 0, 0) if parts[-1] in ("wte", "wpe", "embed_tokens") else (2, 0, 0)
    kinds = ("ln_1", "input_layernorm", "attn", "self_attn", "ln_2", "post_attention_layernorm", "mlp")
    return 1, block, next(number for number, kind in enumerate(kinds) if kind in parts)


@pytest.mark.parametrize("numbers", [500, PREFETCH_NUMBERS])
def test_weights_fetched_ahead_are_the_same_and_are_freed(folders: dict[str, Path], numbers: int):
    config = ModelConfig(path=str(folders["llama"]))
    for rank, ours in enumerate(on_processes(2, measure_fetching_ahead, config, ROWS, numbers)):
        assert not isinstance(ours, Exception), ours
        whole, _ = _whole(config, rank)
        assert all(_close(ours.uses[name][1], grad_BTO) for name, (_, grad_BTO) in whole.uses.items())
        assert set(ours.resident[:-1]) == {ours.share}
        assert 0 < ours.received[-1] <= ours.received[0]


def test_half_precision_keeps_its_type(folders: dict[str, Path]):
    config = ModelConfig(path=str(folders["llama"]), dtype=Dtype.bfloat16)
    found = on_processes(2, measure, config, ROWS)
    for rank, ours in enumerate(found):
        assert not isinstance(ours, Exception), ours
        whole, _ = _whole(config, rank)
        assert ours.logits_BTV.dtype == torch.bfloat16
        assert _close(ours.logits_BTV.float(), whole.logits_BTV.float(), rounding=0.02)
        assert set(ours.resident[:-1]) == {ours.share}


def test_experts_that_are_modules_do_not_make_ranks_wait_for_one_another(tmp_path: Path):
    torch.manual_seed(0)
    RoutedModel(RoutedConfig()).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), layers=r"up$")
    rows = [[[3, 6, 9, 0]], [[1, 4, 2]]]  # the first rank needs expert 0 alone, the second 1 and 2
    found = on_processes(2, measure, config, rows, timeout=30)
    model = load_model(config)
    selection = select_layers(model, config.layers)
    for ours, own in zip(found, rows, strict=True):
        assert not isinstance(ours, Exception), ours
        whole, _ = backward(Worker(model, selection), Batch.collate([0], own))
        assert all(_close(ours.uses[name][1], grad_BTO) for name, (_, grad_BTO) in whole.items())
        assert set(ours.resident[:-1]) == {ours.share}


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path):
    config = GPT2Config(n_embd=512, n_layer=10, n_head=4, vocab_size=2000, n_positions=32, bos_token_id=1)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    peaks = on_processes(4, peak_of_loading, ModelConfig(path=str(tmp_path)))
    for peak in peaks:
        assert not isinstance(peak, Exception), peak
        assert sum(sizes) / 4 < peak < sum(sizes) / 4 + 3 * max(sizes) + 32 * 2**20
        assert peak < 0.6 * sum(sizes)


def test_all_ranks_refuse_what_one_process_refuses(folders: dict[str, Path], tmp_path: Path):
    BertLMHeadModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    ).save_pretrained(tmp_path / "bert")
    configs = [
        ModelConfig(path=str(_changed(folders["llama"], tmp_path / "missing", lambda _: None))),
        ModelConfig(path=str(_changed(folders["llama"], tmp_path / "narrow", lambda weight: weight[:, :-1].clone()))),
        ModelConfig(path=str(tmp_path / "bert")),
        ModelConfig(path=str(folders["llama"]), dtype=Dtype.float64),
        ModelConfig(path=str(folders["llama"]), dtype=Dtype.float16),
    ]
    expected = [
        "1 weights are not in the checkpoint, such as model.layers.1.mlp.up_proj.weight",
        "size mismatch for model.layers.1.mlp.up_proj.weight",
        "the output at a position depends on later tokens",
        "model.dtype=float64: a sharded or offloaded model on CPUs has one of float32, bfloat16",
        "model.dtype=float16: a sharded or offloaded model on CPUs has one of float32, bfloat16",
    ]
    for told in on_processes(2, refusals, configs):
        assert not isinstance(told, Exception), told
        for message, words in zip(told, expected, strict=True):
            assert words in message


def _changed(folder: Path, target: Path, change: Callable[[Tensor], Tensor | None]) -> Path:
    """A copy of a checkpoint in which one weight is changed or left out."""
    target.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    changed = change(weights.pop(name))
    if changed is not None:
        weights[name] = changed
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({key: weights[key] for key in part}, target / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def test_waiting_for_a_rank_ends_with_an_error(folders: dict[str, Path]):
    told, nothing = on_processes(2, wait_for_nobody, ModelConfig(path=str(folders["llama"])), timeout=5)
    assert not isinstance(told, Exception), told
    assert nothing == []
    assert len(told) == 2  # in a pass, and in our own exchange
    for message, seconds in told:
        assert is_communication(RuntimeError(message))
        assert seconds < 15


def test_joining_without_the_others_ends_with_an_error():
    with pytest.raises(RuntimeError) as told:
        meet_nobody(free_address(), 2)
    assert is_communication(told.value)
    leave()


def test_offload_to_disk_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"model\.offload=nvme needs model\.offload_path"):
        check_sharding(ModelConfig(offload=Offload.nvme), gpu=False)
    config = ModelConfig(offload=Offload.nvme, offload_path=str(tmp_path))
    from deepspeed.ops import op_builder

    monkeypatch.setattr(op_builder.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)  # as without libaio
    with pytest.raises(ConfigError, match=r"model\.offload=nvme: .*libaio.*Remedy: install libaio-dev"):
        check_sharding(config, gpu=False)


@pytest.mark.heavy  # DeepSpeed compiles its input and output for minutes
def test_weights_on_disk_give_the_same_logits(tmp_path: Path):
    from deepspeed.ops import op_builder

    if not op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("no libaio here: nothing can be offloaded to disk")
    shape = GPT2Config(vocab_size=128, n_embd=512, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "model")
    place, disk = str(tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    ids = torch.arange(24).view(2, 12)
    whole = load_model(ModelConfig(path=place))
    config = ModelConfig(path=place, offload=Offload.nvme, offload_path=str(disk))
    model = load_model(config)
    try:
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0)
        sizes = [p.numel() * p.element_size() for p in whole.parameters()]
        large = sum(size for size in sizes if size >= 2**20)  # DeepSpeed keeps what is smaller in memory
        assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) >= large > 0.9 * sum(sizes)
        assert resident_bytes(model) <= sum(sizes) - large + 64  # a placeholder for each of them
    finally:
        unload(model)
        leave()


def test_settings_keep_nothing_and_fetch_ahead_on_gpus_only():
    config = ModelConfig(dtype=Dtype.bfloat16, offload=Offload.cpu)
    on_gpu, on_cpu = (zero_settings(config, 4, gpu, largest=10)["zero_optimization"] for gpu in (True, False))
    assert on_gpu["stage3_param_persistence_threshold"] == on_cpu["stage3_param_persistence_threshold"] == 0
    assert on_gpu["stage3_prefetch_bucket_size"] > on_cpu["stage3_prefetch_bucket_size"] == 0
    assert on_gpu["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert on_cpu["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_deepspeed_is_imported_when_it_is_needed_and_says_nothing(folders: dict[str, Path]):
    script = (
        "import sys, torch\n"
        "from actors.model import load_model\n"
        "from conf.schema import ModelConfig, Offload\n"
        "assert 'deepspeed' not in sys.modules\n"
        f"model = load_model(ModelConfig(path={str(folders['gpt2'])!r}, offload=Offload.cpu))\n"
        "model(input_ids=torch.tensor([[1, 2]]))\n"
        "assert 'deepspeed' in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
