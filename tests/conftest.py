"""Fixtures that tests of every layer share: tiny models of three families, and the folder of real data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 40
CONTEXT = 32
ModelFactory = Callable[..., PreTrainedModel]

torch.set_num_threads(1)
os.environ.setdefault("WHENCE_CACHE", tempfile.mkdtemp(prefix="whence-cache-"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray of four CPUs for all tests that need any; runs find it started and leave it alone."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of models and corpora of others, beside the repository; its tests skip where it is absent."""
    root = Path(os.environ.get("WHENCE_SHARED", Path(__file__).parents[2] / "shared"))
    data = root / "data"
    if not data.is_dir():
        pytest.skip(f"needs {data}: put the shared data there or set WHENCE_SHARED")
    return data


@pytest.fixture(scope="session")
def tiny_gpt2() -> ModelFactory:
    """`tiny_gpt2(dtype=torch.float32, **config)`: a GPT-2 with Conv1D, biases and a tied head."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
        config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": CONTEXT, **_TOKENS, **changes}
        return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**config)), dtype)

    return make


@pytest.fixture(scope="session")
def tiny_llama() -> ModelFactory:
    """`tiny_llama(dtype=torch.float32, **config)`: a Llama with biases in its MLP and its attention."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
        config = {**_SIZES, **_TOKENS, "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True, **changes}
        return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**config)), dtype)

    return make


@pytest.fixture(scope="session")
def tiny_neox() -> ModelFactory:
    """`tiny_neox(dtype=torch.float32, **config)`: a GPT-NeoX, whose attention and MLP are parallel."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
        return _seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SIZES, **_TOKENS, **changes})), dtype)

    return make


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def _seeded(build: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """The same weights at every call, large enough that layers and tokens matter."""
    model = build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.round() + noise if parameter.dim() == 1 else noise
    model.tie_weights()
    return model.to(dtype)
