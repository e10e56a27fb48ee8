"""Scores of a whole run by brute force: the oracle's equations, fed with the sequences and queries that the run read.

Legend: B sequences, Q queries, I columns and O outputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.queries import TokenisedQuery
from actors.store import Artifact
from influence.batch import Batch
from influence.labels import SampledLabels
from tests import oracle
from tests.oracle import Oracle, OracleLayer, Trace

COVARIANCE_PASS, CORRECTION_PASS = 0, 1


def llama_layers() -> list[OracleLayer]:
    """The layers that are tracked in `tiny_llama`, by hand."""
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{block}.mlp.{part}" for block in range(2) for part in parts]
    return [OracleLayer(name, (name,), bias=False) for name in names]


def gpt2_layers() -> list[OracleLayer]:
    """The layers that are tracked in `tiny_gpt2`, by hand."""
    names = [f"transformer.h.{block}.mlp.{part}" for block in range(2) for part in ("c_fc", "c_proj")]
    return [OracleLayer(name, (name,), bias=True, transposed=True) for name in names]


def tokens_of(sequences: Artifact) -> list[list[int]]:
    """All sequences of a tokenised corpus, read without the code under test's reader."""
    shards = [name for name in sequences.list("shard-") if name.endswith(".parquet")]
    rows = [row for name in shards for row in sequences.read_table(name).to_pylist()]
    assert [row["sequence_id"] for row in rows] == list(range(len(rows)))
    return [row["input_ids"] for row in rows]


@dataclass(frozen=True)
class Brute:
    """A run computed anew.

    Attributes:
        model: The model's folder.
        layers: Its tracked layers.
        rows: The tokenised corpus, on all of which the curvature is fitted.
        queries: Tokenised.
        seed: Of sampled labels; None takes the corpus's own.
        blocks: Of each factor.
        solver: Name.
        damping_factor: λ = factor · mean eigenvalue.
    """

    model: Path
    layers: list[OracleLayer]
    rows: list[list[int]]
    queries: list[TokenisedQuery]
    seed: int | None = 0
    blocks: int = 1
    solver: str = "ekfac"
    damping_factor: float = 0.1

    def scores(self) -> np.ndarray:
        """Influence of every sequence on every query, [B, Q]."""
        machine = Oracle(AutoModelForCausalLM.from_pretrained(self.model), self.layers)
        names = [layer.name for layer in self.layers]
        gradients = [self.query_gradient(machine, query) for query in self.queries]
        if self.solver != "identity":
            curvature = self.curvature(machine)
            gradients = [
                {name: oracle.ihvp(curvature[name], g[name], self.damping_factor) for name in names} for g in gradients
            ]
        found = []
        for tokens in self.rows:
            trace = machine.trace(tokens)
            found.append([sum(oracle.score(gradient, trace).values()) for gradient in gradients])
        return np.asarray(found)

    def curvature(self, machine: Oracle) -> dict[str, Tensor]:
        """The dense curvature of every layer."""
        first, second = (
            [machine.trace(tokens, self.labels(machine, number, tokens, index)) for number, tokens in self.numbered]
            for index in (COVARIANCE_PASS, CORRECTION_PASS)
        )
        found = {}
        for layer in self.layers:
            moment = oracle.moments(first, layer.name)
            if self.solver == "kfac":
                found[layer.name] = oracle.kfac(moment, self.blocks)
            else:
                sides = [oracle.eigenvectors(matrix, self.blocks) for matrix in (moment.A, moment.S)]
                found[layer.name] = oracle.ekfac(second, layer.name, *sides)
        return found

    @property
    def numbered(self) -> list[tuple[int, list[int]]]:
        """Sequences that predict anything, with their numbers."""
        return [(number, tokens) for number, tokens in enumerate(self.rows) if len(tokens) > 1]

    def labels(self, machine: Oracle, number: int, tokens: list[int], pass_index: int) -> list[int] | None:
        """The labels of a pseudo-gradient: drawn from brute force's own distribution."""
        if self.seed is None:
            return None
        with torch.no_grad():
            logits_BTV = machine.logits(tokens)[None]
        batch = Batch.collate([number], [tokens])
        return SampledLabels(self.seed, pass_index)(batch, logits_BTV)[0, :-1].tolist()

    @staticmethod
    def query_gradient(machine: Oracle, query: TokenisedQuery) -> dict[str, Tensor]:
        """∇ log p(completion | prompt), less that of the second completion of a contrast."""
        first = query.completion_start - 1
        gradient = machine.trace(query.input_ids, first=first).gradient
        if query.contrast_ids is None:
            return gradient
        other = machine.trace(query.contrast_ids, first=first).gradient
        return {name: gradient[name] - other[name] for name in gradient}
