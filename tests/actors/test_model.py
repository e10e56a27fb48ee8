"""Loading models: what comes back, what is refused and in which words, and what a digest covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, BloomConfig, GPT2Config, LlamaConfig, PreTrainedModel

from actors.errors import ConfigError
from actors.model import (
    context_length,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_digest,
    vocabulary_size,
)
from conf.schema import Dtype, ModelConfig
from influence.batch import Batch
from influence.labels import TrueLabels
from influence.layers import group_inputs, select_layers
from influence.measurement import log_probabilities


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel]) -> Path:
    """A checkpoint of a tiny Llama."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _config_only(folder: Path, **content: object) -> ModelConfig:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return ModelConfig(path=str(folder))


def test_a_model_is_loaded_frozen_for_evaluation_without_cache(folder: Path):
    model = load_model(ModelConfig(path=str(folder)), "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert next(model.parameters()).dtype == torch.float32
    assert model(input_ids=torch.tensor([[1, 2]])).past_key_values is None


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float64])
def test_the_type_of_the_weights_is_the_settings(folder: Path, dtype: Dtype):
    model = load_model(ModelConfig(path=str(folder), dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype.name)}


def test_the_way_attention_is_computed_can_be_chosen(folder: Path):
    model = load_model(ModelConfig(path=str(folder), attention="eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.attention='nonsense' cannot be used: .*sdpa"):
        load_model(ModelConfig(path=str(folder), attention="nonsense"))


def test_a_skeleton_has_the_layers_and_no_weights(folder: Path):
    config = ModelConfig(path=str(folder))
    skeleton, model = load_skeleton(config), load_model(config)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    tokens = torch.tensor([[1, 2, 3]])
    planned = group_inputs(skeleton, select_layers(skeleton, "all"), tokens.to("meta"))
    assert planned == group_inputs(model, select_layers(model, "all"), tokens)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path='.*/nowhere': there is no such folder"):
        load_model(ModelConfig(path=str(tmp_path / "nowhere")))


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path=.* cannot be loaded"):
        load_model(ModelConfig(path=str(tmp_path)))
    config = _config_only(tmp_path / "weightless", model_type="llama", **_SIZES)
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no file named model\.safetensors"):
        load_model(config)


def test_code_of_the_model_is_not_run_and_the_setting_is_named(tmp_path: Path):
    config = _config_only(
        tmp_path / "custom", model_type="custom", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    )
    (tmp_path / "custom" / "c.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match=r"not run unless model\.trust_remote_code=true"):
        load_model(config)
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        load_skeleton(config)


def test_models_that_are_not_causal_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a causal language model: t5 is an encoder-decoder"):
        load_model(_config_only(tmp_path / "t5", model_type="t5"))
    with pytest.raises(ConfigError, match="not a causal language model: AutoModelForCausalLM has no class"):
        load_model(_config_only(tmp_path / "vit", model_type="vit"))
    bert = BertLMHeadModel(BertConfig(**_SIZES, intermediate_size=24))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="the output at a position depends on later tokens"):
        load_model(ModelConfig(path=str(tmp_path / "bert")))


def test_weights_that_are_missing_are_not_made_up(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are not in the checkpoint.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelConfig(path=str(folder)))


def test_a_truncated_checkpoint_is_refused(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"model\.path=.* cannot be loaded"):
        load_model(ModelConfig(path=str(folder)))


def test_a_weight_of_another_shape_is_named(folder: Path):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:, :-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot be loaded"):
        load_model(ModelConfig(path=str(folder)))


def test_a_missing_tokenizer_names_its_setting(folder: Path):
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from .*Remedy: set model\.tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_limits_are_read_from_the_config():
    assert (context_length(GPT2Config(n_positions=77)), vocabulary_size(GPT2Config(vocab_size=9))) == (77, 9)
    assert context_length(LlamaConfig(max_position_embeddings=88)) == 88
    assert context_length(BloomConfig()) is None


def test_a_digest_covers_weights_config_and_code_and_nothing_else(folder: Path, tmp_path: Path):
    digest = model_digest(str(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("words")
    assert model_digest(str(copy)) == digest
    (copy / "modeling.py").write_text("code")
    with_code = model_digest(str(copy))
    config = json.loads((copy / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (copy / "config.json").write_text(json.dumps(config))
    with_config = model_digest(str(copy))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert len({digest, with_code, with_config, model_digest(str(copy))}) == 4


def test_the_digest_of_a_hub_name_is_its_commit_or_its_revision(monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    found: list[str | None] = [f"/cache/models--who--what/snapshots/{commit}/config.json", None]
    monkeypatch.setattr("actors.model.cached_file", lambda *_args, **_options: found.pop(0))
    assert model_digest("who/what") == f"who/what@{commit}"
    assert model_digest("who/what", "v2") == "who/what@v2"


_SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "vocabulary", "context", "loss"), [("stories260K", 512, 512, 1.32), ("babyllama_tok105", 105, 256, 0.74)]
)
def test_real_models_have_their_known_loss(shared_data: Path, name: str, vocabulary: int, context: int, loss: float):
    config = ModelConfig(path=str(shared_data / "models" / name))
    model, tokenizer = load_model(config), load_tokenizer(config)
    assert (vocabulary_size(model.config), context_length(model.config)) == (vocabulary, context)
    ids: list[int] = []
    with (shared_data / "text" / "tinystories_train_1000.jsonl").open() as stream:
        for line, _ in zip(stream, range(40), strict=False):
            text = "\n".join(part for part in json.loads(line)["text"].split("\n") if part)
            ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = [ids[start : start + 256] for start in range(0, 24 * 256, 256)]
    batch = Batch.collate(range(24), rows)
    logits = model(input_ids=batch.input_ids).logits
    logp = log_probabilities(logits, TrueLabels()(batch, logits))
    assert -logp.sum() / batch.predicted_BT.sum() == pytest.approx(loss, abs=0.06)
    assert len(select_layers(model, "mlp").layers) == 15
