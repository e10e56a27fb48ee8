"""Stage `tails`: the shape of the distribution of influences on each query, in both feeds (Section 5.2).

Of each query there are two distributions. `unfiltered` holds what the unfiltered feed scanned, whether or not BM25
proposed it as well; `bm25` holds what BM25 proposed to this query itself. What was scanned for another query alone is
in neither.

Files of scores are summarised in groups, a Ray task each; the summaries merge exactly, in whatever order they arrive
(`influence.distribution`). The driver holds one of each query and feed, and what a task more brings. Nothing depends on
this step: other settings of `tails` read the scores again and compute none.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actors.sequences import proposals, proposals_within
from actors.store import Artifact
from conf.schema import TailsConfig, plain
from influence.distribution import ScoreSummary
from influence.tails import (
    FAMILIES,
    PLAUSIBLE,
    Fit,
    NoFit,
    Tail,
    exponent_interval,
    exponential,
    fit_family,
    goodness,
    ks_distance,
    needed,
    power_law,
    recall,
    tail_of,
    tail_size,
    vuong,
)
from pipelines.steps import StageContext, StageResult

log = logging.getLogger(__name__)

SHARDS_A_TASK = 64
ROWS = 65_536  # scores of all queries that a task holds at a time
HEAD = 10  # of BM25's sequences, whose influence the unfiltered ones are to reach
HEADS = (10, 100, 1000)  # at which recall is measured
POINTS = 400  # of a survival curve
PERCENT = tuple(float(f"{10 ** (step / 10):.4g}") for step in range(-30, 21))  # at which the share is given

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("feed", pa.string()),  # unfiltered or bm25
        ("influence", pa.float64()),
        ("survival", pa.float64()),  # fraction of the feed's scores that reach the influence
    ]
)


@dataclass(frozen=True)
class QueryScores:
    """The scores of one query in both feeds.

    Attributes:
        unfiltered: Of what the unfiltered feed scanned.
        bm25: Of what BM25 proposed to this query.
        shared: How many are in both.
    """

    unfiltered: ScoreSummary
    bm25: ScoreSummary
    shared: int = 0

    def merge(self, other: QueryScores) -> QueryScores:
        """The scores of both."""
        return QueryScores(
            self.unfiltered.merge(other.unfiltered), self.bm25.merge(other.bm25), self.shared + other.shared
        )


def nothing(index: Mapping[str, Any], tails: TailsConfig) -> QueryScores:
    """No scores yet, with room for as many of the largest as the tail, recall and BM25's head take.

    Args:
        index: Of the candidates.
        tails: What is the tail.
    """
    unfiltered = tail_size(index["per_feed"]["unfiltered"], tails.share, tails.count)
    proposed = tail_size(max(index["per_query"].values(), default=0), tails.share, tails.count)
    return QueryScores(ScoreSummary(max(unfiltered, *HEADS)), ScoreSummary(max(proposed, HEAD)))


# --- summaries ---


def summarise_shards(
    scores: Artifact, shards: Sequence[str], candidates: Artifact, query_ids: Sequence[str], empty: QueryScores
) -> list[QueryScores]:
    """The scores of every query in some files. Runs as a Ray task."""
    found = [empty] * len(query_ids)
    for ids_N, unfiltered_N, scores_QN in _blocks(scores, shards, len(query_ids)):
        proposed = proposals_within(candidates, int(ids_N[0]), int(ids_N[-1]) + 1)
        for query, query_id in enumerate(query_ids):
            mine = _places(ids_N, proposed.get(query_id, np.empty(0, dtype=np.int64)))
            old, values_N = found[query], scores_QN[query]
            found[query] = QueryScores(
                old.unfiltered.add(values_N[unfiltered_N], ids_N[unfiltered_N]),
                old.bm25.add(values_N[mine], ids_N[mine]),
                old.shared + int(np.count_nonzero(unfiltered_N[mine])),
            )
    return found


def _blocks(
    scores: Artifact, shards: Sequence[str], queries: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sequence ids, ascending, whether each was scanned unfiltered, and scores_QN, of about `ROWS` rows at a time."""
    waiting: list[pa.Table] = []
    for position, shard in enumerate(shards, start=1):
        waiting.append(scores.read_table(shard).replace_schema_metadata(None))
        rows = sum(map(len, waiting))
        if rows < ROWS and position < len(shards):
            continue
        table = pa.concat_tables(waiting).unify_dictionaries()
        waiting = []
        if not rows:
            continue
        ids_N = table.column("sequence_id").to_numpy()
        feeds_N = np.asarray(table.column("feed").cast(pa.string()))
        scores_NQ = table.column("scores").combine_chunks().flatten().to_numpy().reshape(rows, queries)
        order = np.argsort(ids_N, kind="stable")
        yield ids_N[order], feeds_N[order] != "bm25", np.ascontiguousarray(scores_NQ[order].T)


def _places(ids_N: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where in the ascending ids those are that are wanted; some may have been set aside by the scan."""
    places = np.searchsorted(ids_N, wanted)
    places = places[places < len(ids_N)]
    return places[ids_N[places] == wanted[: len(places)]]


def summarised(context: StageContext, query_ids: Sequence[str]) -> list[QueryScores]:
    """The scores of every query in all files."""
    scores, candidates = context.inputs["scores"], context.inputs["candidates"]
    shards = [name for name in scores.list("shard-") if name.endswith(".parquet")]
    groups = [shards[start : start + SHARDS_A_TASK] for start in range(0, len(shards), SHARDS_A_TASK)]
    empty = nothing(candidates.read_json("index.json"), context.config.tails)
    total = [empty] * len(query_ids)
    with context.progress("tails", len(shards), "shards") as progress:
        arguments = [(scores, group, candidates, query_ids, empty) for group in groups]
        for position, found in context.cluster.map(summarise_shards, arguments):
            total = [old.merge(new) for old, new in zip(total, found, strict=True)]
            progress.advance(len(groups[position]))
    return total


# --- what is said of them ---


def describe_query(
    query_id: str, found: QueryScores, candidates: Artifact, tails: TailsConfig, feeds: Sequence[str]
) -> tuple[dict[str, Any], pa.Table]:
    """The entry of one query in `tails.json`, and its survival curves. Runs as a Ray task.

    Args:
        query_id: The query.
        found: Its scores.
        candidates: The artifact.
        tails: What is fitted, and the seed.
        feeds: Those that were scanned.
    """
    summaries = {feed: getattr(found, feed) for feed in feeds}
    described, fitted = {}, {}
    for feed, summary in summaries.items():
        described[feed], fitted[feed] = _feed(summary, tails, _generator(tails.seed, query_id, feed))
    entry = {
        "feeds": described,
        "needed": _needed(query_id, found, described, fitted, tails, feeds),
        "share": _share(found.unfiltered) if "unfiltered" in feeds else [],
        "recall": _recall(query_id, found, candidates, feeds),
        "recall_by_chance": found.shared / found.unfiltered.count if found.unfiltered.count else None,
    }
    curves = {feed: summary.survival(POINTS) for feed, summary in summaries.items()}
    rows = [
        pa.table([[query_id] * len(influences), [feed] * len(influences), influences, survival], schema=SCHEMA)
        for feed, (influences, survival) in curves.items()
    ]
    return entry, pa.concat_tables([SCHEMA.empty_table(), *rows])


def _generator(seed: int, query_id: str, what: str) -> np.random.Generator:
    """Of a query's own, whichever other queries there are."""
    return np.random.default_rng([seed, zlib.crc32(query_id.encode()), zlib.crc32(what.encode())])


def _feed(summary: ScoreSummary, tails: TailsConfig, rng: np.random.Generator) -> tuple[dict[str, Any], Tail | None]:
    counts = {
        "count": summary.count,
        "positive": summary.positive,
        "negative": summary.negative,
        "sum_positive": summary.sum_positive,
    }
    try:
        tail = tail_of(summary, tails.share, tails.count, tails.least)
    except NoFit as why:
        return counts | {"tail": None, "fits": {}, "best": None, "comparisons": {}, "reason": str(why)}, None
    law = power_law(tail)
    fits: dict[str, Any] = {"power_law": _power_law(tail, law, tails.bootstraps, rng)}
    others: dict[str, Fit] = {"exponential": exponential(tail)}
    for family in FAMILIES:
        try:
            others[family.name] = fit_family(tail, family)
        except NoFit as why:
            fits[family.name] = {"reason": str(why)}
    comparisons = {}
    for name, other in others.items():
        fits[name] = other.parameters | {"loglikelihood": other.loglikelihood, "aic": other.aic}
        ratio, p_value = vuong(law, other)
        comparisons[name] = {"loglikelihood_ratio": ratio, "p_value": p_value}
    best = min({"power_law": law} | others, key=lambda name: fits[name]["aic"])
    chosen = {"n": len(tail.values_n), "cutoff": tail.cutoff, "chosen_by": tail.chosen_by}
    return counts | {"tail": chosen, "fits": fits, "best": best, "comparisons": comparisons}, tail


def _power_law(tail: Tail, law: Fit, bootstraps: int, rng: np.random.Generator) -> dict[str, Any]:
    p_value = goodness(tail, bootstraps, rng)
    return law.parameters | {
        "interval": list(exponent_interval(tail)),
        "ks": ks_distance(tail),
        "p_value": p_value,
        "bootstraps": bootstraps,
        "loglikelihood": law.loglikelihood,
        "aic": law.aic,
    }


def _needed(
    query_id: str,
    found: QueryScores,
    described: Mapping[str, Mapping[str, Any]],
    fitted: Mapping[str, Tail | None],
    tails: TailsConfig,
    feeds: Sequence[str],
) -> dict[str, Any]:
    """What to believe first; then every estimate there is, with the p-value that judges the power law's."""
    if missing := _missing(feeds):
        return {"reason": missing}
    p_value = described["unfiltered"]["fits"].get("power_law", {}).get("p_value")
    plausible = p_value is None or p_value > PLAUSIBLE
    try:
        rng = _generator(tails.seed, query_id, "needed")
        answer = needed(found.unfiltered, found.bm25, fitted["unfiltered"], HEAD, rng, plausible)
    except NoFit as why:
        return {"reason": str(why)}
    return {
        "sequences": answer.sequences,
        "interval": list(answer.interval),
        "threshold": answer.threshold,
        "scanned": found.unfiltered.count,
        "method": answer.method,
        "reached": answer.reached,
        "p_value": p_value,
        "estimates": {
            method: {"sequences": estimate.sequences, "interval": list(estimate.interval)}
            for method, estimate in answer.estimates.items()
        },
    }


def _share(summary: ScoreSummary) -> list[list[float]]:
    """The share of the total positive influence that the top p % of all scores cover, from the least p with a score."""
    if not summary.positive:
        return []
    counts = [(percent, round(percent / 100 * summary.count)) for percent in PERCENT]
    return [[percent, summary.share_of_largest(count)] for percent, count in counts if count]


def _recall(query_id: str, found: QueryScores, candidates: Artifact, feeds: Sequence[str]) -> dict[str, Any]:
    if missing := _missing(feeds):
        return {"reason": missing}
    ids_K = found.unfiltered.ids_K[: max(HEADS)]
    measured = recall(ids_K, proposals(candidates, query_id, ids_K.tolist()).keys(), HEADS)
    if not measured:
        return {"reason": f"{found.unfiltered.count:,} sequences were scanned unfiltered, fewer than {min(HEADS)}"}
    return {str(head): value for head, value in measured.items()}


def _missing(feeds: Sequence[str]) -> str | None:
    """Why the feeds cannot be compared."""
    lacking = {
        "unfiltered": "nothing was scanned unfiltered (unfiltered.kind=none)",
        "bm25": "BM25 proposed nothing (prefilter.kind=none)",
    }
    return next((why for feed, why in lacking.items() if feed not in feeds), None)


# --- the stage ---


def run(context: StageContext) -> StageResult:
    """Write `tails.json` and `tails.parquet`."""
    candidates, tails = context.inputs["candidates"], context.config.tails
    query_ids = [record["query_id"] for record in context.inputs["scores"].read_json("queries.json")]
    per_feed = candidates.read_json("index.json")["per_feed"]
    feeds = [feed for feed in ("unfiltered", "bm25") if per_feed[feed]]
    totals = summarised(context, query_ids)
    arguments = [(query_id, found, candidates, tails, feeds) for query_id, found in zip(query_ids, totals, strict=True)]
    described = dict(context.cluster.map(describe_query, arguments))
    queries = {query_id: described[position][0] for position, query_id in enumerate(query_ids)}
    table = pa.concat_tables([SCHEMA.empty_table(), *(described[position][1] for position in range(len(query_ids)))])
    context.artifact.write_json("tails.json", {"settings": plain(tails), "queries": queries})
    context.artifact.write_table("tails.parquet", table)
    _tell(queries)
    scanned = {feed: sum(entry["feeds"][feed]["count"] for entry in queries.values()) for feed in feeds}
    return StageResult({"queries": len(query_ids), "points": table.num_rows, "scores": scanned})


def _tell(queries: Mapping[str, Mapping[str, Any]]) -> None:
    """One line on the unfiltered feed, or on BM25's where there is no other."""
    feeds = [next(iter(entry["feeds"].values())) for entry in queries.values()]
    fits = [feed["fits"]["power_law"] for feed in feeds if feed["fits"]]
    if not fits:
        reasons = list(dict.fromkeys(feed["reason"] for feed in feeds))
        log.info("tails: no fit: %s", reasons[0] if reasons else "there is no query")
        return
    log.info(
        "tails: a power law is plausible for %d of %d queries (p > %g) and the best of five families for %d; "
        "exponents %.2f to %.2f",
        sum(fit["p_value"] > PLAUSIBLE for fit in fits),
        len(feeds),
        PLAUSIBLE,
        sum(feed["best"] == "power_law" for feed in feeds),
        min(fit["alpha"] for fit in fits),
        max(fit["alpha"] for fit in fits),
    )


def in_short(tails: Mapping[str, Any]) -> dict[str, Any]:
    """What `summary.json` says of `tails.json`: the unfiltered tail, or BM25's where there is no other."""
    return {query_id: _short(entry) for query_id, entry in tails["queries"].items()}


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    feed, described = next(iter(entry["feeds"].items()))
    law = described["fits"].get("power_law")
    tail = (
        {"reason": described["reason"]} if law is None else {key: law[key] for key in ("alpha", "interval", "p_value")}
    )
    found = {"feed": feed, "tail": tail | ({} if law is None else {"best": described["best"]})}
    share = {f"{percent:g}": value for percent, value in entry["share"] if percent in (0.01, 0.1, 1.0, 10.0)}
    return found | {"needed": entry["needed"], "share": share, "recall": entry["recall"]}
