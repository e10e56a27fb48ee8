"""Tiny causal language models whose tracked layers are written out by hand, and sequences of uneven lengths.

Legend: B sequences, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.oracle import OracleLayer

VOCABULARY = 13
CONTEXT = 16


@dataclass(frozen=True)
class Case:
    """A model and the layers that `selection` should find in it.

    Attributes:
        model: In evaluation mode, float64, frozen.
        layers: The tracked layers, in the order of the module tree.
        selection: What `select_layers` is asked for.
    """

    model: nn.Module
    layers: tuple[OracleLayer, ...]
    selection: str = "mlp"


def gpt2(hidden: int = 6, inner: int = 7, blocks: int = 2, vocabulary: int = VOCABULARY) -> Case:
    """GPT-2: Conv1D stores [inputs, outputs]; biases."""
    config = GPT2Config(
        n_embd=hidden,
        n_head=2,
        n_inner=inner,
        n_layer=blocks,
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    names = [f"transformer.h.{block}.mlp.{part}" for block in range(blocks) for part in ("c_fc", "c_proj")]
    return Case(_spread(GPT2LMHeadModel(config)), _layers(names, bias=True, transposed=True))


def llama(hidden: int = 6, inner: int = 7, blocks: int = 2, vocabulary: int = VOCABULARY) -> Case:
    """Llama: gate and up projections share their input; no bias."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{block}.mlp.{part}" for block in range(blocks) for part in parts]
    return Case(_spread(_with_exact_norms(LlamaForCausalLM(config))), _layers(names, bias=False))


def neox(hidden: int = 8, inner: int = 7, blocks: int = 2, vocabulary: int = VOCABULARY) -> Case:
    """GPT-NeoX: parallel attention and MLP, rotary positions on a part of each head, biases."""
    config = GPTNeoXConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
    )
    parts = ("dense_h_to_4h", "dense_4h_to_h")
    names = [f"gpt_neox.layers.{block}.mlp.{part}" for block in range(blocks) for part in parts]
    return Case(_spread(GPTNeoXForCausalLM(config)), _layers(names, bias=True))


def looped() -> Case:
    """One block, and with it one MLP, that the model calls twice."""
    names = ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    return Case(_spread(CausalModel(blocks=1, loops=2)), _layers(names, bias=True))


def tied() -> Case:
    """Two blocks whose MLPs hold one and the same parameters."""
    model = CausalModel(blocks=2)
    first, second = (block.mlp for block in model.blocks)
    for ours, theirs in ((first.up, second.up), (first.down, second.down)):
        theirs.weight, theirs.bias = ours.weight, ours.bias
    uses = [tuple(f"blocks.{block}.mlp.{part}" for block in range(2)) for part in ("up", "down")]
    return Case(_spread(model), tuple(OracleLayer(modules[0], modules, bias=True) for modules in uses))


def untied() -> Case:
    """The function of `tied`, its two MLPs with parameters of their own."""
    model = CausalModel(blocks=2).double()
    model.load_state_dict(tied().model.state_dict())
    names = [f"blocks.{block}.mlp.{part}" for block in range(2) for part in ("up", "down")]
    return Case(model.eval().requires_grad_(False), _layers(names, bias=True))


CASES: dict[str, Callable[[], Case]] = {"gpt2": gpt2, "llama": llama, "neox": neox, "looped": looped, "tied": tied}


class MLP(nn.Module):
    """A plain perceptron with biases."""

    def __init__(self, hidden: int = 6, inner: int = 7) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x_BTH)))


class Block(nn.Module):
    """A mean over the positions so far, then the perceptron."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.mlp = MLP(hidden)

    def forward(self, x_BTH: Tensor) -> Tensor:
        counts_T = torch.arange(1, x_BTH.shape[1] + 1, dtype=x_BTH.dtype)
        x_BTH = x_BTH + x_BTH.cumsum(dim=1) / counts_T[:, None]
        return x_BTH + self.mlp(torch.nn.functional.layer_norm(x_BTH, x_BTH.shape[-1:]))


class CausalModel(nn.Module):
    """Embedding, a list of blocks gone through once or more, head; called as Hugging Face's models are."""

    def __init__(self, blocks: int, loops: int = 1, hidden: int = 6) -> None:
        super().__init__()
        self.loops = loops
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> SimpleNamespace:
        del attention_mask  # padding is on the right and the model is causal
        x_BTH = self.embedding(input_ids)
        for _loop in range(self.loops):
            for block in self.blocks:
                x_BTH = block(x_BTH)
        return SimpleNamespace(logits=self.lm_head(x_BTH))


def sequences(count: int, seed: int = 0, shortest: int = 5, longest: int = 9, vocabulary: int = VOCABULARY) -> list:
    """`count` random token sequences of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [torch.randint(vocabulary, (int(length),), generator=generator).tolist() for length in lengths]


def _with_exact_norms(model: nn.Module) -> nn.Module:
    """Replace Llama's norms, which compute in float32 whatever their type, by torch's, which do not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return model


def markov_sequences(count: int, seed: int, shortest: int = 8, longest: int = 12) -> list:
    """Sequences of a fixed Markov chain over the vocabulary: something that a tiny model can learn."""
    chain = torch.softmax(2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(99)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(shortest, longest + 1, (count,), generator=generator).tolist():
        row = torch.randint(VOCABULARY, (1,), generator=generator).tolist()
        while len(row) < length:
            row.append(int(torch.multinomial(chain[row[-1]], 1, generator=generator)))
        rows.append(row)
    return rows


def train(model: nn.Module, rows: list, steps: int = 100, batch_size: int = 32, seed: int = 0) -> None:
    """Adam on the mean cross-entropy, in place; the model is frozen again afterwards."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = [torch.tensor(rows[i]) for i in torch.randint(len(rows), (batch_size,), generator=generator)]
        input_ids_BT = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels_BT = nn.utils.rnn.pad_sequence([row[1:] for row in chosen], batch_first=True, padding_value=-100)
        logits_BTV = model(input_ids=input_ids_BT).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)


def _layers(names: list[str], bias: bool, transposed: bool = False) -> tuple[OracleLayer, ...]:
    return tuple(OracleLayer(name, (name,), bias, transposed) for name in names)


def _spread(model: nn.Module) -> nn.Module:
    """Weights large enough that layers, tokens and labels all matter; the same for every call."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().eval()
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.2 / parameter.shape[-1] ** 0.5
        centre = parameter.data.round() if parameter.ndim == 1 else 0.0
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = centre + scale * noise
        parameter.requires_grad_(False)
    return model
