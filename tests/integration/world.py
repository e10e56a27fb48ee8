"""A tiny world to trace: models, a corpus and queries of our own wording; and a cluster without replica actors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from actors.pool import LocalPool
from actors.sequences import CANDIDATES
from actors.store import Artifact, Store
from actors.tasks import ReplicaSpec
from conf.schema import RunConfig
from conf.validate import build
from pipelines import tracing
from pipelines.cluster import Cluster
from pipelines.tracing import TraceResult, run_trace

CONTEXT = 48
VOCABULARY = 400
PLACES = ("Orrin", "Velm", "Tasker", "Quill", "Brone", "Istra", "Calder", "Numm")
THINGS = ("lantern", "ferry", "kettle", "orchard", "clock", "bridge", "mill", "archive")
COLOURS = ("green", "amber", "violet", "grey", "scarlet", "white", "teal")
DEEDS = ("hums at dusk", "opens twice a year", "was built by hand", "smells of rain", "belongs to nobody")


def documents(count: int, seed: int = 0) -> list[str]:
    """Short statements about a made-up country, of 6 to 40 words."""
    random = np.random.default_rng(seed)

    def sentence() -> str:
        place, thing, colour, deed = (str(random.choice(words)) for words in (PLACES, THINGS, COLOURS, DEEDS))
        return f"The {colour} {thing} of {place} {deed}."

    return [" ".join(sentence() for _ in range(random.integers(1, 5))) for _ in range(count)]


QUERIES = (
    {"query_id": "lantern", "prompt": "The lantern of Velm is", "completion": " violet.", "contrast": " grey."},
    {"query_id": "ferry", "prompt": "The ferry of Orrin", "completion": " opens twice a year.", "contrast": " hums."},
    {"query_id": "mill", "prompt": "Nobody owns the", "completion": " teal mill of Quill.", "contrast": " mill."},
)


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """Write a JSONL file; text goes in as it is, anything else as JSON."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the world's own wording; it has BOS, EOS and every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents(200, seed=7), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def tiny_llama() -> PreTrainedModel:
    """Two layers, no biases; gate and up projections share their input."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        **_TOKENS,
    )
    return _spread(LlamaForCausalLM(config))


def tiny_gpt2() -> PreTrainedModel:
    """Two layers of Conv1D with biases, whose norms compute in the model's own type; a tied head."""
    config = GPT2Config(n_embd=12, n_inner=16, n_layer=2, n_head=2, n_positions=CONTEXT, **_TOKENS)
    return _spread(GPT2LMHeadModel(config))


_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that layers, tokens and labels all matter; the same for every call."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        centre = parameter.data.round() if parameter.dim() == 1 else torch.zeros(())
        scale = 0.2 if parameter.dim() == 1 else 1.0 / parameter.shape[-1] ** 0.5
        parameter.data = centre + scale * torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class World:
    """Folders of models, a corpus and queries.

    Attributes:
        root: Holds them.
    """

    root: Path

    @classmethod
    def make(cls, root: Path) -> World:
        """Write the files."""
        root.mkdir(exist_ok=True)
        for name, model in (("llama", tiny_llama()), ("gpt2", tiny_gpt2())):
            model.save_pretrained(root / name)
            write_tokenizer(root / name)
        write_lines(root / "corpus.jsonl", ({"text": text} for text in documents(120)))
        write_lines(root / "queries.jsonl", QUERIES)
        return cls(root)

    def settings(self, store: Path, **changes: Any) -> dict[str, Any]:
        """Settings by full key; `changes` name them with `__` for the dot, as in `scan__batch_size=1`."""
        found: dict[str, Any] = {
            "store": str(store),
            "model.path": str(self.root / "llama"),
            "corpus.path": str(self.root / "corpus.jsonl"),
            "corpus.sequence_length": 24,
            "corpus.shard_sequences": 64,
            "queries.path": str(self.root / "queries.jsonl"),
            "queries.rank": "full",
            "factors.samples": None,
            "factors.convergence_share": 0,
            "prefilter.top": 30,
            "unfiltered.sequences": 60,
            "scan.shard_sequences": 32,
            "scan.top": 10,
            "cluster.num_cpus": 4,
            "cluster.cpus_per_rank": 1,
        }
        return found | {name.replace("__", "."): value for name, value in changes.items()}

    def config(self, store: Path, **changes: Any) -> RunConfig:
        """The typed config of `settings`."""
        return build(self.settings(store, **changes), complete=True, cwd=str(self.root))

    def overrides(self, store: Path, **changes: Any) -> list[str]:
        """The same on a command line."""
        given = self.settings(store, **changes)
        return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]


class LocalCluster(Cluster):
    """The double of `Cluster`: one replica in this process, and tasks run one after the other."""

    replicas: list[LocalPool]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.replicas = []

    @property
    def pool(self) -> LocalPool:
        """The replica of this process."""
        if not self.replicas:
            self.replicas.append(LocalPool(ReplicaSpec(self._config.model, self._config.scan, self._config.cluster)))
        return self.replicas[0]

    def map(
        self, function: Callable[..., Any], arguments: Iterable[tuple], memory: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Run a function on each tuple of arguments."""
        for position, argument in enumerate(arguments):
            yield position, function(*argument)

    def make_room(self) -> None:
        """Nothing holds CPUs."""


def run_locally(config: RunConfig, run_dir: Path) -> TraceResult:
    """`run_trace` with a replica in this process; only the Ray Data stages need Ray."""
    given, tracing.Cluster = tracing.Cluster, LocalCluster  # type: ignore[misc]
    try:
        return run_trace(config, run_dir)
    finally:
        tracing.Cluster = given  # type: ignore[misc]


def write_sequences(store: Store, rows: Sequence[Sequence[int]], shard: int = 64, row_group: int = 256) -> Artifact:
    """A committed `sequences` artifact of the given tokens, each sequence a document of its own."""
    artifact = store.folder("sequences", "5" * 64)
    shards = []
    for number, first in enumerate(range(0, len(rows), shard)):
        part = rows[first : first + shard]
        numbers = list(range(first, first + len(part)))
        columns = {
            "sequence_id": pa.array(numbers, pa.int64()),
            "input_ids": pa.array(part, pa.list_(pa.int32())),
            "document_id": [f"document {number}" for number in numbers],
            "offset": pa.array([0] * len(part), pa.int64()),
        }
        name = f"shard-{number:05d}.parquet"
        artifact.write_table(name, pa.table(columns), row_group)
        tokens = sum(map(len, part))
        shards.append({"name": name, "first_sequence_id": first, "rows": len(part), "tokens": tokens})
    index = {"sequences": len(rows), "tokens": sum(map(len, rows)), "documents": len(rows), "skipped": {}}
    artifact.write_json("index.json", index | {"shards": shards, "vocabulary": VOCABULARY})
    artifact.commit({}, {}, {}, 0.0)
    return artifact


Candidate = tuple[str | None, int, str, float | None]  # query_id, sequence_id, feed, bm25_score


def write_candidates(store: Store, rows: Sequence[Candidate], block: int = 64, row_group: int = 256) -> Artifact:
    """A committed `candidates` artifact of the given rows, which are sorted by sequence."""
    artifact = store.folder("candidates", "c" * 64)
    files = []
    for first in range(0, max(sequence for _, sequence, _, _ in rows) + 1, block):
        mine = [dict(zip(CANDIDATES.names, row, strict=True)) for row in rows if first <= row[1] < first + block]
        if mine:
            name = f"block-{first // block:05d}.parquet"
            artifact.write_table(name, pa.Table.from_pylist(mine, schema=CANDIDATES), row_group)
            place = {"name": name, "first_sequence_id": first, "stop": first + block, "rows": len(mine)}
            files.append(place | {"sequences": len({row["sequence_id"] for row in mine})})
    artifact.write_json("index.json", {"files": files, "rows": len(rows)})
    artifact.commit({}, {}, {}, 0.0)
    return artifact


def fork(store: Path, new: Path, kinds: Sequence[str]) -> Path:
    """A new store that holds only some kinds of another's artifacts."""
    for kind in kinds:
        shutil.copytree(store / kind, new / kind)
    return new


def matrix(table: pa.Table) -> np.ndarray:
    """Scores, [sequences, queries], in the order of sequence ids."""
    order = np.argsort(table.column("sequence_id").to_numpy())
    values = table.column("scores").combine_chunks().flatten().to_numpy()
    return values.reshape(len(order), -1)[order]


def ids(table: pa.Table) -> list[int]:
    """The sequence ids of a table of scores, ascending."""
    return sorted(table.column("sequence_id").to_pylist())


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error as a share of the largest expected entry."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def cached(result: TraceResult) -> dict[str, bool]:
    """Which steps were not computed."""
    return {name: outcome.cached for name, outcome in result.outcomes.items()}
