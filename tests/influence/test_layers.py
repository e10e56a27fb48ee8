"""Tracked layers of small configs of the families that the README names, and everything that is not tracked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from influence.batch import Batch
from influence.labels import TrueLabels
from influence.layers import LayerSelection, group_inputs, select_layers
from influence.measurement import log_probabilities
from influence.worker import Worker

_COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 4}
_SHORT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {**_GROUPED, "num_experts_per_tok": 2}
_PROBE = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**_SHORT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "neox": ("GPTNeoXConfig", _COMMON),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma": ("GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2Config", _GROUPED),
    "gemma3": ("Gemma3TextConfig", _GROUPED),
    "olmo": ("OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "falcon": ("FalconConfig", _COMMON),
    "bloom": ("BloomConfig", {**_SHORT, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJConfig", {**_SHORT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4}),
    "gptneo": (
        "GPTNeoConfig",
        {**_COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "stablelm": ("StableLmConfig", _GROUPED),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 3}),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 3}),
}

_GATED = ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj")
_QKVO = tuple(f"layers.{{}}.self_attn.{part}_proj" for part in "qkvo")
_EXPERTS = ("mixtral", "qwen2moe", "olmoe")
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "stablelm")
_FALCON = ("self_attention.query_key_value", "self_attention.dense")

NAMES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # prefix, mlp, attention; in tree order
    "gpt2": ("transformer.h.{}.", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")),
    "neox": (
        "gpt_neox.layers.{}.",
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("attention.query_key_value", "attention.dense"),
    ),
    "opt": (
        "model.decoder.layers.{}.",
        ("fc1", "fc2"),
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    ),
    **dict.fromkeys(_LLAMAS, ("model.", _GATED, _QKVO)),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "falcon": ("FalconConfig", _COMMON),
    "bloom": ("BloomConfig", {**_SHORT, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJConfig", {**_SHORT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4}),
    "gptneo": (
        "GPTNeoConfig",
        {**_COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "stablelm": ("StableLmConfig", _GROUPED),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 3}),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 3}),
}

_GATED = ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj")
_QKVO = tuple(f"layers.{{}}.self_attn.{part}_proj" for part in "qkvo")
_EXPERTS = ("mixtral", "qwen2moe", "olmoe")
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "stablelm")
_FALCON = ("self_attention.query_key_value", "self_attention.dense")

NAMES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # prefix, mlp, attention; in tree order
    "gpt2": ("transformer.h.{}.", ("mlp.c_fc", "mlp.c_proj"), ("attn.c_attn", "attn.c_proj")),
    "neox": (
        "gpt_neox.layers.{}.",
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("attention.query_key_value", "attention.dense"),
    ),
    "opt": (
        "model.decoder.layers.{}.",
        ("fc1", "fc2"),
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    ),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "stablelm"),
        ("model.", _GATED, _QKVO),
    ),
    "phi": ("model.", ("layers.{}.mlp.fc1", "layers.{}.mlp.fc2"), (*_QKVO[:3], "layers.{}.self_attn.dense")),
    "phi3": (
        "model.layers.{}.",
        ("mlp.gate_up_proj", "mlp.down_proj"),
        ("self_attn.o_proj", "self_attn.qkv_proj"),
    ),
    "falcon": ("transformer.h.{}.", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), _FALCON),
    "bloom": ("transformer.h.{}.", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), _FALCON),
    "gptj": (
        "transformer.h.{}.",
        ("mlp.fc_in", "mlp.fc_out"),
        ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj"),
    ),
    "gptneo": (
        "transformer.h.{}.",
        ("mlp.c_fc", "mlp.c_proj"),
        tuple(f"attn.attention.{part}_proj" for part in ("k", "v", "q", "out")),
    ),
    "mixtral": ("model.", (), _QKVO),
    "olmoe": ("model.", (), _QKVO),
    "qwen2moe": (
        "model.layers.{}.",
        (
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert.down_proj",
            "mlp.shared_expert_gate",
        ),
        tuple(f"self_attn.{part}_proj" for part in "qkvo"),
    ),
}


def _model(family: str, **options: object) -> nn.Module:
    name, settings = CONFIGS[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings), **options).eval()


def _expected(family: str, part: int) -> list[str]:
    prefix = NAMES[family][0]
    return [(prefix + name).format(block) for block in range(2) for name in NAMES[family][part]]


def _names(selection: LayerSelection) -> list[str]:
    return [layer.name for layer in selection.layers]


def _assert_complete(model: nn.Module, selection: LayerSelection) -> None:
    """Every parameter is tracked or named with a reason, each once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    untracked = sum(entry.parameters for entry in selection.untracked)
    assert selection.total_parameters == total == selection.tracked_parameters + untracked
    assert all(entry.reason for entry in selection.untracked)


def _reason(selection: LayerSelection, name: str) -> str:
    (entry,) = [entry for entry in selection.untracked if entry.name == name]
    return entry.reason


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gives_the_expected_layers_and_accounts_for_every_parameter(family: str):
    model = _model(family)
    mlp, attention = sorted(_expected(family, 1)), sorted(_expected(family, 2))
    selections = {"attention": attention, "all": sorted(mlp + attention)} | ({"mlp": mlp} if mlp else {})
    for key, names in selections.items():
        selection = select_layers(model, key)
        assert sorted(_names(selection)) == names
        _assert_complete(model, selection)
        grouped = group_inputs(model, selection, _PROBE)
        assert _names(grouped) == _names(selection)  # each is called, and computes W a + b
        _assert_complete(model, grouped)


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_and_biases_are_those_of_the_linear_map(family: str):
    model = _model(family)
    for layer in select_layers(model, "all").layers:
        module = model.get_submodule(layer.name)
        assert module(torch.zeros(1, layer.inputs)).shape == (1, layer.outputs)
        assert layer.bias == (getattr(module, "bias", None) is not None)
        assert layer.transposed == (family == "gpt2")
        assert layer.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert layer.columns == layer.inputs + layer.bias


@pytest.mark.parametrize("family", CONFIGS)
def test_captured_gradients_of_every_family_are_those_of_autograd(family: str):
    model = _model(family, experts_implementation="eager").double()  # fused expert kernels have no float64
    selection = group_inputs(model, select_layers(model, "all"), _PROBE)
    batch = Batch.collate([0, 1], [[3, 4, 5, 6, 7], [8, 9, 10]])

    def objective(logits_BTV: Tensor) -> Tensor:
        return log_probabilities(logits_BTV, TrueLabels()(batch, logits_BTV)).sum(1)

    factors = Worker(model, selection).token_factors(batch, objective)
    model.requires_grad_(True)
    objective(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask_BT).logits).sum().backward()
    for layer in selection.layers:
        module = model.get_submodule(layer.name)
        weight_OI = module.weight.grad.T if layer.transposed else module.weight.grad
        exact = torch.cat([weight_OI, module.bias.grad[:, None]], dim=1) if layer.bias else weight_OI
        assert exact.abs().max() > 0
        torch.testing.assert_close(factors[layer.name].gradient(), exact, rtol=1e-10, atol=1e-12)


def _groups(family: str, selection: str = "all") -> dict[str, str]:
    model = _model(family)
    layers = group_inputs(model, select_layers(model, selection), _PROBE).layers
    return {layer.name: layer.input_group for layer in layers}


def test_layers_with_the_very_same_input_share_a_group():
    groups = _groups("llama")
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn.", f"model.layers.{block}.mlp."
        assert groups[attention + "k_proj"] == groups[attention + "v_proj"] == attention + "q_proj"
        assert groups[mlp + "up_proj"] == mlp + "gate_proj"
        for alone in (attention + "o_proj", mlp + "down_proj"):
            assert groups[alone] == alone


def test_parallel_blocks_put_the_mlp_in_the_group_of_attention():
    groups = _groups("phi")
    assert groups["model.layers.0.mlp.fc1"] == "model.layers.0.self_attn.q_proj"
    assert groups["model.layers.1.mlp.fc1"] == "model.layers.1.self_attn.q_proj"


def test_different_biasness_or_different_norms_are_different_groups():
    gptj = _groups("gptj")  # attention without, MLP with a bias, of the same input
    assert gptj["transformer.h.0.mlp.fc_in"] == "transformer.h.0.mlp.fc_in"
    assert gptj["transformer.h.0.attn.v_proj"] == "transformer.h.0.attn.k_proj"
    neox = _groups("neox")  # parallel, but with a norm each
    assert neox["gpt_neox.layers.0.mlp.dense_h_to_4h"] == "gpt_neox.layers.0.mlp.dense_h_to_4h"


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in _EXPERTS])
def test_groups_are_found_on_the_meta_device_too(family: str):
    with torch.device("meta"):
        model = _model(family)
        grouped = group_inputs(model, select_layers(model, "all"), _PROBE.to("meta"))
    assert {layer.name: layer.input_group for layer in grouped.layers} == _groups(family)


@pytest.mark.parametrize("family", _EXPERTS)
def test_mixture_of_experts_weights_are_named_as_not_tracked(family: str):
    selection = select_layers(_model(family), "all")
    assert _reason(selection, "model.layers.*.mlp.experts.gate_up_proj") == "fused mixture-of-experts weights"
    assert _reason(selection, "model.layers.*.mlp.experts.down_proj") == "fused mixture-of-experts weights"
    assert _reason(selection, "model.layers.*.mlp.gate.weight") == "mixture-of-experts router"
    assert "not tracked, fused mixture-of-experts weights" in selection.describe()


def test_a_model_whose_mlp_is_all_experts_has_no_mlp_to_track():
    with pytest.raises(
        ValueError, match=r"'mlp' selects no linear layer; there are model\.layers\.\*\.self_attn\.q_pr"
    ):
        select_layers(_model("mixtral"), "mlp")


def test_describe_tells_the_share_and_every_reason():
    text = select_layers(_model("gpt2"), "mlp").describe()
    assert text.startswith("tracked 4 layers, 4,256 of ")
    assert "transformer.h.*.mlp.c_fc, transformer.h.*.mlp.c_proj" in text
    assert "not tracked, embedding, also the output head: 640 (transformer.wte.weight)" in text
    assert "not tracked, attention, not selected: 2,176 (transformer.h.*.attn.c_attn.weight, " in text
    assert "not tracked, normalisation: 160 (" in text


def test_a_regular_expression_searches_module_paths_in_and_out_of_blocks():
    model = _model("llama")
    assert _names(select_layers(model, r"1\.mlp\.(gate|up)")) == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert _names(select_layers(model, "^lm_head$")) == ["lm_head"]
    assert len(select_layers(model, ".").layers) == 15


def test_a_tied_output_head_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"selects lm_head, whose weight is also used by Embedding"):
        select_layers(_model("gpt2"), "lm_head")


def test_an_expression_that_matches_nothing_names_some_layers():
    with pytest.raises(ValueError, match=r"'ffn' selects no linear layer; there are transformer\.h\.\*\.attn\.c_attn"):
        select_layers(_model("gpt2"), "ffn")


def test_an_invalid_expression_is_named():
    with pytest.raises(ValueError, match=r"model\.layers='\(' is neither mlp, attention nor all"):
        select_layers(_model("gpt2"), "(")


class _Perceptron(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7, bias=bias)
        self.down = nn.Linear(7, 6)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x_BTH)))


class _Stack(nn.Module):
    """Blocks of perceptrons; `call` says what happens to the embedded tokens."""

    def __init__(self, call: Callable[[_Stack, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.layers = nn.ModuleList([_Perceptron(bias), _Perceptron(bias)])
        self.call = call

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.call(self, self.embedding(input_ids))


def _through(model: _Stack, x_BTH: Tensor) -> Tensor:
    for layer in model.layers:
        x_BTH = x_BTH + layer(x_BTH)
    return x_BTH


def test_modules_that_share_a_parameter_are_one_layer():
    model = _Stack(_through)
    for part in ("up", "down"):
        first, second = model.layers[0].get_submodule(part), model.layers[1].get_submodule(part)
        second.weight, second.bias = first.weight, first.bias
    selection = group_inputs(model, select_layers(model, r"layers\.1"), _PROBE)
    assert [layer.modules for layer in selection.layers] == [
        ("layers.0.up", "layers.1.up"),
        ("layers.0.down", "layers.1.down"),
    ]
    _assert_complete(model, selection)


def test_a_module_registered_twice_is_one_layer_and_hooked_once():
    model = _Stack(_through)
    model.layers[1] = model.layers[0]
    selection = group_inputs(model, select_layers(model, r"layers\.1"), _PROBE)
    assert [layer.modules for layer in selection.layers] == [("layers.0.up",), ("layers.0.down",)]
    _assert_complete(model, selection)


def test_a_shared_weight_with_another_bias_is_not_tracked():
    model = _Stack(_through)
    model.layers[1].up.weight = model.layers[0].up.weight
    selection = select_layers(model, "mlp")
    assert _names(selection) == ["layers.0.down", "layers.1.down"]
    assert "shared" in _reason(selection, "layers.*.up.weight")
    _assert_complete(model, selection)


def test_a_layer_that_is_never_called_is_named():
    model = _Stack(lambda model, x_BTH: model.layers[0](x_BTH))
    selection = group_inputs(model, select_layers(model, "mlp"), _PROBE)
    assert _names(selection) == ["layers.0.up", "layers.0.down"]
    assert _reason(selection, "layers.*.up") == "not called in a forward pass"
    _assert_complete(model, selection)


def test_a_layer_that_sees_some_tokens_only_is_named():
    model = _Stack(lambda model, x_BTH: model.layers[0](x_BTH).sum() + model.layers[1](x_BTH[:, :2]).sum())
    selection = group_inputs(model, select_layers(model, "mlp"), _PROBE)
    assert _names(selection) == ["layers.0.up", "layers.0.down"]
    assert _reason(selection, "layers.*.up") == "not called with one row a token"


def test_a_subclass_that_computes_something_else_is_named():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = _Stack(_through)
    model.layers[1].up = Scaled(6, 7)
    selection = group_inputs(model, select_layers(model, "mlp"), _PROBE)
    assert _reason(selection, "layers.*.up") == "not computing W a + b"
    assert len(selection.layers) == 3


def test_an_input_changed_in_place_between_two_calls_is_another_input():
    def call(model: _Stack, x_BTH: Tensor) -> Tensor:
        first = model.layers[0].up(x_BTH)
        x_BTH.add_(1.0)
        return first + model.layers[1].up(x_BTH)

    model = _Stack(call)
    selection = group_inputs(model, select_layers(model, "up"), _PROBE)
    assert [layer.input_group for layer in selection.layers] == ["layers.0.up", "layers.1.up"]


def test_no_layer_left_is_an_error():
    model = _Stack(lambda model, x_BTH: x_BTH)
    with pytest.raises(ValueError, match=r"layers\.0\.up was not called in a forward pass"):
        group_inputs(model, select_layers(model, "mlp"), _PROBE)


def test_quantised_parametrised_and_adapted_layers_are_named():
    model = _Stack(_through)
    up, down = model.layers[0].up, model.layers[0].down
    up.weight = nn.Parameter(up.weight.to(torch.int8), requires_grad=False)
    nn.utils.parametrizations.weight_norm(down)
    model.layers[1].up = _Adapter(model.layers[1].up)
    model.layers.append(_Packed())
    selection = select_layers(model, "mlp")
    assert _names(selection) == ["layers.1.down"]
    reasons = {entry.reason for entry in selection.untracked}
    assert {"quantised weights", "parametrised weights"} <= reasons
    assert "adapted layers (merge the adapter into the model first)" in reasons
    assert "layers.*" in {entry.name for entry in selection.untracked if entry.reason == "quantised weights"}
    _assert_complete(model, selection)


class _Adapter(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


class _Packed(nn.Module):
    """As GPTQ and AWQ hold weights: integers in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def test_parts_are_told_by_attribute_names_outside_of_module_lists():
    model = nn.Module()
    model.block = nn.Module()
    model.block.mlp, model.block.attn, model.block.att_proj = (nn.Linear(2, 2) for _ in range(3))
    model.block.head = nn.Linear(2, 2)
    assert _names(select_layers(model, "mlp")) == ["block.mlp"]
    assert _names(select_layers(model, "attention")) == ["block.attn", "block.att_proj"]
