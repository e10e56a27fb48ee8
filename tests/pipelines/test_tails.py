"""The stage `tails` against brute force over all scores: feeds, shares, recall, what is said where nothing can be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from actors.scores import ShardReport, write_scores
from actors.sequences import candidate_rows, proposals_within
from actors.store import Artifact, Store
from conf.schema import PrefilterConfig, PrefilterKind, RunConfig, TailsConfig, UnfilteredConfig, UnfilteredKind
from conf.validate import build
from influence.bm25 import TopK
from pipelines.progress import Progress
from pipelines.stages import candidates, tails
from pipelines.stages.unfiltered import choose
from pipelines.steps import StageContext

CORPUS = 6000
PROPOSED = 300
NAMES = ["one", "two", "three"]
LEFT_OUT = 77  # a sequence that the scan set aside
TAILS = TailsConfig(count=100, bootstraps=50)


@dataclass(frozen=True)
class Scanned:
    """A scan that has been made, and what brute force needs of it.

    Attributes:
        config: Of the run.
        scores_NQ: By sequence id; NaN where a sequence was not scanned.
        unfiltered_N: Whether the unfiltered feed holds it.
        proposed: Sequences that BM25 proposed, by query.
        inputs: Artifacts.
        folder: Of the test.
    """

    config: RunConfig
    scores_NQ: np.ndarray
    unfiltered_N: np.ndarray
    proposed: list[np.ndarray]
    inputs: dict[str, Artifact]
    folder: Path

    def context(self, name: str = "tails", settings: TailsConfig = TAILS, turn: Any = list) -> StageContext:
        """The stage's, with tasks in this process; `turn` gives the order in which they finish."""

        def one_by_one(function: Any, arguments: list) -> Iterator:
            return iter(turn([(position, function(*given)) for position, given in enumerate(arguments)]))

        return StageContext(
            replace(self.config, tails=settings),
            SimpleNamespace(map=one_by_one),
            Store(str(self.folder)).folder("tails", f"{name:0<64}"),
            self.inputs,
            partial(Progress, every=1e9, terminal=False),
        )

    def described(self, **settings: Any) -> dict[str, Any]:
        """What the stage writes of the queries."""
        context = self.context(settings=replace(TAILS, **settings))
        tails.run(context)
        return context.artifact.read_json("tails.json")["queries"]

    def feed(self, query: int, feed: str) -> np.ndarray:
        """The scores of a feed, descending."""
        inside = np.isin(np.arange(CORPUS), self.proposed[query]) if feed == "bm25" else self.unfiltered_N
        values = self.scores_NQ[inside, query]
        return np.sort(values[~np.isnan(values)])[::-1].astype(np.float64)


def scan(folder: Path, prefilter: PrefilterKind, kind: UnfilteredKind, sequences: int = 3000) -> Scanned:
    """Scores with a heavy tail; those that BM25 proposes to a query are higher on that query."""
    config = RunConfig(
        prefilter=PrefilterConfig(kind=prefilter), unfiltered=UnfilteredConfig(kind=kind, sequences=sequences)
    )
    rng, store = np.random.default_rng(0), Store(str(folder))
    scores_NQ = stats.t(2).rvs((CORPUS, len(NAMES)), random_state=rng).astype(np.float32)
    proposed = [np.empty(0, np.int64)] * len(NAMES)
    if prefilter is PrefilterKind.bm25:
        proposed = [np.sort(rng.choice(CORPUS, PROPOSED, replace=False)) for _ in NAMES]
    for query, ids in enumerate(proposed):
        scores_NQ[ids, query] *= 3
    given = StageContext(
        config, None, store.folder("candidates", "1" * 64), {}, partial(Progress, every=1e9, terminal=False)
    )
    best = [TopK(ids, np.ones(len(ids))) for ids in proposed]
    chosen = choose(config.unfiltered, CORPUS)
    given.artifact.write_json("index.json", candidates.write_blocks(given, NAMES, best, chosen, CORPUS))
    scores = store.folder("scores", "2" * 64)
    for shard, first in enumerate(range(0, CORPUS, 500)):
        ids, feeds = candidate_rows(given.artifact, first, first + 500)
        kept = ids != LEFT_OUT
        names = np.asarray(feeds, object)[kept].tolist()
        write_scores(scores, shard, ids[kept], names, scores_NQ[ids[kept]], ShardReport(len(ids)))
    scores.write_json("queries.json", [{"query_id": name} for name in NAMES])
    scores.commit({}, {}, {}, 0.0)
    scores_NQ[LEFT_OUT] = np.nan
    unfiltered_N = np.zeros(CORPUS, dtype=bool)
    unfiltered_N[chosen.within(0, CORPUS)] = True
    inputs = {"scores": scores, "candidates": given.artifact}
    return Scanned(config, scores_NQ, unfiltered_N, proposed, inputs, folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    return scan(tmp_path_factory.mktemp("both"), PrefilterKind.bm25, UnfilteredKind.sample)


@pytest.fixture(scope="module")
def found(both: Scanned) -> dict[str, Any]:
    return both.described()


def test_each_feed_is_what_was_scanned_for_it(both: Scanned, found: dict[str, Any]):
    for query, name in enumerate(NAMES):
        for feed in ("unfiltered", "bm25"):
            expected, entry = both.feed(query, feed), found[name]["feeds"][feed]
            assert entry["count"] == len(expected)
            assert entry["positive"] == (expected > 0).sum()
            assert entry["negative"] == (expected < 0).sum()
            assert entry["sum_positive"] == math.fsum(expected[expected > 0])
            assert entry["tail"] == {"n": 100, "cutoff": expected[99], "chosen_by": "count"}
            law = entry["fits"]["power_law"]
            assert law["alpha"] == pytest.approx(1 + 100 / np.log(expected[:100] / expected[99]).sum())
            assert law["interval"][0] < law["alpha"] < law["interval"][1]
            assert entry["fits"].keys() == {"power_law", *entry["comparisons"]}
            assert entry["best"] == min(entry["fits"], key=lambda family: entry["fits"][family]["aic"])
            for family, compared in entry["comparisons"].items():
                ratio = law["loglikelihood"] - entry["fits"][family]["loglikelihood"]
                assert compared["loglikelihood_ratio"] == pytest.approx(ratio, abs=1e-6)
                assert 0 <= compared["p_value"] <= 1


def test_recall_is_over_what_was_scanned_unfiltered_and_proposed_to_the_query_itself(
    both: Scanned, found: dict[str, Any]
):
    ids = np.flatnonzero(both.unfiltered_N & ~np.isnan(both.scores_NQ[:, 0]))
    for query, name in enumerate(NAMES):
        order = sorted(ids, key=lambda at, query=query: (-both.scores_NQ[at, query], at))
        expected = {str(k): np.isin(order[:k], both.proposed[query]).mean() for k in (10, 100, 1000)}
        assert found[name]["recall"] == expected
        assert found[name]["recall_by_chance"] == np.isin(ids, both.proposed[query]).mean()
        assert 0 < expected["10"] <= 1


def test_the_share_is_that_of_the_unfiltered_feed(both: Scanned, found: dict[str, Any]):
    for query, name in enumerate(NAMES):
        values = both.feed(query, "unfiltered")
        positive = np.maximum(values, 0)
        shares = found[name]["share"]
        assert [percent for percent, _ in shares][-1] == 100
        assert {0.1, 1.0, 10.0} <= {percent for percent, _ in shares}
        for percent, share in shares:
            count = round(percent / 100 * len(values))
            assert share == pytest.approx(positive[:count].sum() / positive.sum(), rel=0.01)


def test_the_number_needed_is_counted_or_extrapolated(both: Scanned, found: dict[str, Any]):
    for query, name in enumerate(NAMES):
        threshold = both.feed(query, "bm25")[9]
        values, entry = both.feed(query, "unfiltered"), found[name]["needed"]
        assert entry["threshold"] == threshold
        assert entry["scanned"] == len(values)
        assert entry["reached"] == (values >= threshold).sum()
        assert entry["interval"][0] < entry["sequences"] < entry["interval"][1]
        law, estimates = found[name]["feeds"]["unfiltered"]["fits"]["power_law"], entry["estimates"]
        rate = 100 / len(values) * (threshold / law["xmin"]) ** (1 - law["alpha"])  # the threshold is in the tail
        assert estimates["power_law"]["sequences"] == pytest.approx(10 / rate)
        assert estimates["empirical"]["sequences"] == pytest.approx(10 * len(values) / entry["reached"])
        assert entry["p_value"] == law["p_value"]
        assert entry["method"] == ("power_law" if law["p_value"] > 0.1 else "empirical")
        assert estimates[entry["method"]] == {"sequences": entry["sequences"], "interval": entry["interval"]}


def test_a_poor_fit_is_not_believed_where_something_was_counted(both: Scanned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tails, "goodness", lambda *_: 0.02)
    for entry in both.described().values():
        needed = entry["needed"]
        assert (needed["method"], needed["p_value"], list(needed["estimates"])) == (
            "empirical",
            0.02,
            ["power_law", "empirical"],
        )
        assert needed["sequences"] == needed["estimates"]["empirical"]["sequences"]


def test_survival_curves_hold_both_feeds_of_every_query(both: Scanned):
    context = both.context("curves")
    tails.run(context)
    table = context.artifact.read_table("tails.parquet")
    assert table.schema.equals(tails.SCHEMA)
    rows = table.to_pylist()
    for query, name in enumerate(NAMES):
        for feed in ("unfiltered", "bm25"):
            values = both.feed(query, feed)
            mine = [row for row in rows if (row["query_id"], row["feed"]) == (name, feed)]
            assert 50 < len(mine) <= tails.POINTS
            for row in mine:
                assert row["survival"] == (values >= row["influence"]).mean()
            assert max(row["influence"] for row in mine) == values[0]


def test_groups_of_files_blocks_of_rows_and_the_order_of_tasks_move_nothing(
    both: Scanned, monkeypatch: pytest.MonkeyPatch
):
    whole = both.context("whole")
    tails.run(whole)
    monkeypatch.setattr(tails, "SHARDS_A_TASK", 2)
    monkeypatch.setattr(tails, "ROWS", 600)
    pieces = both.context("pieces", turn=lambda done: done[::-1])
    tails.run(pieces)
    for name in ("tails.json", "tails.parquet"):
        assert whole.artifact.read_bytes(name) == pieces.artifact.read_bytes(name)


def test_what_is_said_of_a_query_does_not_hang_on_the_others(both: Scanned, found: dict[str, Any]):
    summaries = tails.summarised(both.context(), NAMES)
    alone, _ = tails.describe_query("two", summaries[1], both.inputs["candidates"], TAILS, ["unfiltered", "bm25"])
    assert json.loads(json.dumps(alone)) == found["two"]


def test_proposals_of_a_range_are_those_of_each_query(both: Scanned):
    for first, stop in ((0, CORPUS), (1000, 1500), (5999, 6000)):
        mine = proposals_within(both.inputs["candidates"], first, stop)
        for query, name in enumerate(NAMES):
            ids = both.proposed[query]
            expected = ids[(ids >= first) & (ids < stop)].tolist()
            assert mine.get(name, np.empty(0)).tolist() == expected


def test_few_sequences_give_reasons_instead_of_numbers(both: Scanned, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        found = both.described(count=None, share=0.0001)
    for entry in found.values():
        feed = entry["feeds"]["unfiltered"]
        assert feed["tail"] is None
        assert feed["fits"] == feed["comparisons"] == {}
        assert feed["best"] is None
        assert "of 2,999 scores: 0 values, and fewer than tails.least=50" in feed["reason"]
        assert entry["needed"]["method"] == "empirical"  # which needs no fit
    assert "tails: no fit: the top 0.01 % of 2,999 scores" in caplog.text
    short = tails.in_short({"queries": found})
    assert short["one"]["tail"] == {"reason": found["one"]["feeds"]["unfiltered"]["reason"]}


def test_without_a_prefilter_nothing_is_compared(tmp_path: Path):
    found = scan(tmp_path, PrefilterKind.none, UnfilteredKind.sample).described()
    for entry in found.values():
        assert list(entry["feeds"]) == ["unfiltered"]
        assert entry["share"]
        for part in ("needed", "recall"):
            assert entry[part] == {"reason": "BM25 proposed nothing (prefilter.kind=none)"}


def test_without_an_unfiltered_feed_bm25_is_described_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made = scan(tmp_path, PrefilterKind.bm25, UnfilteredKind.none)
    with caplog.at_level("INFO"):
        found = made.described()
    for query, name in enumerate(NAMES):
        assert list(found[name]["feeds"]) == ["bm25"]
        assert found[name]["feeds"]["bm25"]["count"] == len(made.feed(query, "bm25"))
        assert found[name]["share"] == []
        for part in ("needed", "recall"):
            assert found[name][part] == {"reason": "nothing was scanned unfiltered (unfiltered.kind=none)"}
    assert "a power law is plausible for" in caplog.text
    short = tails.in_short({"queries": found})["one"]
    assert short["feed"] == "bm25"
    assert short["tail"]["alpha"] == found["one"]["feeds"]["bm25"]["fits"]["power_law"]["alpha"]


def test_a_whole_corpus_of_a_few_sequences(tmp_path: Path):
    """Both feeds hold every proposal; five sequences are fewer than what recall looks at."""
    made = scan(tmp_path, PrefilterKind.bm25, UnfilteredKind.all)
    for query, entry in enumerate(made.described().values()):
        feeds = entry["feeds"]
        assert feeds["unfiltered"]["count"] == CORPUS - 1
        assert feeds["bm25"]["count"] == len(made.feed(query, "bm25"))
    few = scan(tmp_path / "few", PrefilterKind.bm25, UnfilteredKind.sample, sequences=5).described()
    for entry in few.values():
        assert entry["recall"] == {"reason": "5 sequences were scanned unfiltered, fewer than 10"}
        assert "of 5 scores are positive" in entry["feeds"]["unfiltered"]["reason"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tails.share": 0.0}, r"tails\.share=0\.0: allowed: a number, above 0 and at most 1"),
        ({"tails.count": 30}, r"tails\.count=30: fewer than tails\.least=50 are never fitted"),
        ({"tails.least": 3}, r"tails\.least=3: allowed: a whole number, at least 10"),
    ],
)
def test_settings_that_would_fit_nothing_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        build(settings, complete=False, cwd="/")


def test_an_empty_table_has_the_schema(both: Scanned):
    _, table = tails.describe_query(
        "one",
        tails.nothing({"per_feed": {"unfiltered": 0}, "per_query": {}}, TAILS),
        both.inputs["candidates"],
        TAILS,
        [],
    )
    assert table.equals(tails.SCHEMA.empty_table())
    assert isinstance(table, pa.Table)
