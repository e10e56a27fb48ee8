"""How much there is to do: sequences, candidates and queries of a run, counted in its artifacts or estimated."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from actors.corpus import Part, plan_parts
from actors.model import context_length, load_model_config
from actors.packing import tokenise_part
from actors.queries import read_queries
from actors.store import Artifact
from actors.tokeniser import load_tokeniser, model_limits
from conf.schema import CorpusFormat, Measurement, PrefilterKind, RunConfig, UnfilteredKind

SAMPLE_BYTES = 1 << 18  # of the corpus's first lines, tokenised to estimate the rest
BYTES_A_TOKEN = 4  # where no sample can be cut from the file
BYTES_A_SECOND = 2e6  # that one CPU tokenises, where no sample was timed


@dataclass(frozen=True)
class Extent:
    """The tokenised corpus, present or estimated.

    Attributes:
        sequences: Their number.
        tokens: Mean number of positions.
        how: Where the numbers come from, for people.
        corpus_bytes: Of the corpus's files; 0 if it is tokenised already.
        bytes_a_second: That one CPU tokenises.
    """

    sequences: int
    tokens: int
    how: str
    corpus_bytes: int = 0
    bytes_a_second: float = BYTES_A_SECOND


def corpus_extent(config: RunConfig, sequences: Artifact | None) -> Extent:
    """Take `plan.sequences`, count those of a finished artifact, or estimate them from a sample of the corpus.

    Raises:
        WhenceError: The corpus cannot be used, as far as the sample shows.
    """
    if config.plan.sequences is not None:
        count, length = config.plan.sequences, _length(config)
        how = f"plan.sequences, of {length} tokens each: no corpus was read"
        return Extent(count, length, how, count * length * BYTES_A_TOKEN)
    if sequences is not None:
        index = sequences.read_json("index.json")
        return Extent(index["sequences"], max(1, round(index["tokens"] / index["sequences"])), "tokenised already")
    parts = plan_parts(config.corpus).parts
    total = sum(part.bytes for part in parts)
    if not parts:
        return Extent(1, config.corpus.sequence_length, "an empty corpus")
    if parts[0].file.format in (CorpusFormat.jsonl, CorpusFormat.text) and not parts[0].file.compressed:
        return _from_sample(config, parts[0], total)
    length = _length(config)
    count = max(1, round(total / BYTES_A_TOKEN / length))
    how = f"an estimate: {_bytes(total)} of corpus at {BYTES_A_TOKEN} bytes a token, in full sequences"
    return Extent(count, length, how, total)


def _from_sample(config: RunConfig, first: Part, total: int) -> Extent:
    stop = min(first.stop, first.start + SAMPLE_BYTES)
    sample = dataclasses.replace(first, stop=stop, bytes=stop - first.start, limit=config.corpus.limit)
    limits, tokeniser = model_limits(config.model), load_tokeniser(config.model)
    started = time.perf_counter()
    found = tokenise_part(sample, config.corpus, tokeniser, limits, emit=lambda _chunk, _table: None)
    seconds = time.perf_counter() - started
    documents = found.documents * total / sample.bytes
    share = min(1.0, (config.corpus.limit or documents) / documents) if documents else 1.0
    if config.corpus.limit is not None and found.documents >= config.corpus.limit:
        share = sample.bytes / total
    tokens = max(1.0, found.tokens * total / sample.bytes * share)
    mean = _length(config) if config.corpus.pack else max(1, round(found.tokens / max(1, sum(found.chunks))))
    how = (
        f"an estimate: the first {_bytes(sample.bytes)} of {_bytes(total)} of corpus give "
        f"{found.tokens:,} tokens, {sample.bytes / max(1, found.tokens):.2f} bytes a token"
    )
    return Extent(max(1, round(tokens / mean)), mean, how, round(total * share), sample.bytes / seconds)


def _length(config: RunConfig) -> int:
    context = context_length(load_model_config(config.model))
    return min(config.corpus.sequence_length, context or config.corpus.sequence_length)


def candidate_extent(config: RunConfig, extent: Extent, queries: int, candidates: Artifact | None) -> tuple[int, str]:
    """Count the sequences that are scanned, or bound them.

    Returns:
        The number, and where it comes from.
    """
    if candidates is not None:
        index = candidates.read_json("index.json")
        feeds = ", ".join(f"{feed} {count:,}" for feed, count in index["per_feed"].items())
        return index["sequences"], f"chosen already: {feeds}"
    proposed = plain = 0
    parts = []
    if config.prefilter.kind is PrefilterKind.bm25:
        proposed = min(extent.sequences, queries * config.prefilter.top)
        parts.append(f"bm25 at most {proposed:,} ({queries:,} queries, {config.prefilter.top:,} each)")
    if config.unfiltered.kind is not UnfilteredKind.none:
        asked = config.unfiltered.sequences if config.unfiltered.kind is UnfilteredKind.sample else extent.sequences
        plain = min(extent.sequences, asked)
        parts.append(f"unfiltered {plain:,}")
    return min(extent.sequences, proposed + plain), "at most: " + ", ".join(parts)


def query_tokens(config: RunConfig) -> tuple[int, ...]:
    """Positions of each query's pass: both completions of a contrast, padded to the longer; or those of the plan."""
    if config.plan.queries is not None:
        completions = 2 if config.queries.measurement is Measurement.contrast else 1
        return (completions * config.plan.query_tokens,) * config.plan.queries
    found = []
    for query in read_queries(config):
        ids = [query.input_ids] + ([query.contrast_ids] if query.contrast_ids is not None else [])
        found.append(len(ids) * max(map(len, ids)))
    return tuple(found)


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:,.1f} KiB"
