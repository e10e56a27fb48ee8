"""Statistics that are summed over fixed groups: the sample, what is dealt, what is added up, what is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import ConfigError, NonFiniteShare
from actors.factors import save_selection
from actors.reduction import Parts
from actors.store import Store
from actors.tasks import Done, GroupTask
from conf.schema import FactorsConfig, Labels, RunConfig, ScanConfig
from influence.layers import LayerSelection, TrackedLayer
from pipelines.progress import Progress
from pipelines.stages.grouped import MIN_GROUP, Part, Statistic, check_share, run_statistic, sample_groups
from pipelines.steps import StageContext, StageResult

CORPUS = 5 * MIN_GROUP


def flat(groups: Iterable[Sequence[int]]) -> list[int]:
    return [number for group in groups for number in group]


def test_all_of_the_corpus_is_cut_into_even_groups_in_order():
    groups = sample_groups(1000, FactorsConfig(samples=None, groups=7))
    assert flat(groups) == list(range(1000))
    assert {len(group) for group in groups} == {142, 143}
    assert sample_groups(1000, FactorsConfig(samples=1000, groups=7)) == groups


def test_a_sample_is_seeded_without_repetition_and_ascending():
    sample = flat(sample_groups(10_000, FactorsConfig(samples=500)))
    assert len(set(sample)) == 500
    assert sample == sorted(sample)
    assert sample == flat(sample_groups(10_000, FactorsConfig(samples=500, groups=3)))
    assert sample != flat(sample_groups(10_000, FactorsConfig(samples=500, seed=1)))


@pytest.mark.parametrize(("corpus", "groups"), [(1, 1), (31, 1), (63, 1), (64, 2), (10_000, 16)])
def test_a_small_sample_has_fewer_groups(corpus: int, groups: int):
    assert len(sample_groups(corpus, FactorsConfig(samples=None))) == groups


class FakeCluster:
    """Replicas that write what they are told to, and tasks that run at once.

    Attributes:
        dealt: The groups that were dealt.
        merged: The arguments of every merge.
    """

    def __init__(
        self, excluded: dict[int, str] | None = None, dies_after: int = 99, seen_in: str | None = None
    ) -> None:
        self.pool = SimpleNamespace(run=self._run)
        self.seen_in = seen_in  # the layer whose pass alone notices what has to be set aside
        self.dealt: list[int] = []
        self.merged: list[Any] = []
        self._excluded, self._dies_after = excluded or {}, dies_after

    def _run(self, method: str, tasks: Sequence[GroupTask], done: Callable, tick: Callable) -> None:
        assert method == "statistic"
        for task in tasks:
            if len(self.dealt) == self._dies_after:
                raise KeyboardInterrupt
            self.dealt.append(task.group)
            noticed = self._excluded if self.seen_in in (None, *task.layers) else {}
            noticed = noticed | dict(task.excluded)
            excluded = {str(n): why for n, why in noticed.items() if n in task.sequence_ids}
            kept = len(task.sequence_ids) - len(excluded)
            counts = {"sequences": kept, "tokens": 10 * kept, "rows": {task.layers[0]: 7 * kept}, "seconds": 0.5}
            task.output.write_json(f"{task.folder}/done.json", counts | {"excluded": excluded, "ranks": 1})
            done(task, Done(kept))
            tick(0)

    def map(self, function: Callable, arguments: Iterable[tuple], _memory: list[int]) -> Iterator[tuple[int, Any]]:
        for position, argument in enumerate(arguments):
            yield position, function(*argument)


LAYERS = tuple(TrackedLayer(name, (name,), 4, 4, False, False, name) for name in ("first", "second", "third"))
STATISTIC = Statistic("statistic", lambda layer, ranks, blocks, itemsize: 100 * itemsize // ranks, lambda run: [run])


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    store = Store(str(tmp_path / "store"))
    sequences, layers = store.folder("sequences", "0" * 64), store.folder("layers", "2" * 64)
    sequences.write_json("index.json", {"sequences": CORPUS})
    save_selection(layers, LayerSelection(LAYERS, (), 1))
    output = store.folder("statistic", "1" * 64)
    progress = partial(Progress, every=1e9, terminal=False)
    return StageContext(RunConfig(), None, output, {"sequences": sequences, "layers": layers}, progress)


def limited(context: StageContext, memory: int) -> StageContext:
    """With room for `memory` bytes of factors in a rank; each layer has 400."""
    cluster = replace(context.config.cluster, memory_per_rank=memory)
    return replace(context, config=replace(context.config, cluster=cluster))


def attempt(context: StageContext, cluster: FakeCluster, fails: bool = False) -> StageResult:
    def merge(parts: Parts, layers: tuple[TrackedLayer, ...]) -> None:
        if fails:
            raise KeyboardInterrupt
        cluster.merged.append((len(parts.groups), *(layer.name for layer in layers)))
        parts.output.write_json(f"mean-{layers[0].name}.json", 0)

    def task(part: Part) -> GroupTask:
        sequences, excluded = context.inputs["sequences"], part.excluded
        return GroupTask(
            context.artifact,
            part.folder,
            part.group,
            part.layers,
            part.sequence_ids,
            sequences,
            Labels.sampled,
            0,
            excluded=excluded,
        )

    return run_statistic(
        replace(context, cluster=cluster), STATISTIC, task, lambda totals, bundles: (merge, list(bundles), [])
    )


def test_counts_are_added_up_and_parts_discarded(context: StageContext):
    cluster = FakeCluster()
    result = attempt(context, cluster)
    assert cluster.dealt == [0, 1, 2, 3, 4]
    assert cluster.merged == [(5, "first", "second", "third")]
    assert result.counts == {"sequences": CORPUS, "tokens": 10 * CORPUS, "excluded": 0}
    assert result.extra == {"excluded": {}, "replica_seconds": 2.5}
    assert context.artifact.list() == ["mean-first.json", "merged.json"]
    assert context.artifact.read_json("merged.json")["rows"] == {"first": 7 * CORPUS}


def test_committed_groups_are_not_dealt_again(context: StageContext):
    with pytest.raises(KeyboardInterrupt):
        attempt(context, FakeCluster(dies_after=3))
    cluster = FakeCluster()
    result = attempt(context, cluster)
    assert cluster.dealt == [3, 4]
    assert result.counts["sequences"] == CORPUS


def test_a_merge_that_was_cut_short_is_done_again_without_the_replicas(context: StageContext):
    with pytest.raises(KeyboardInterrupt):
        attempt(context, FakeCluster(), fails=True)
    cluster = FakeCluster()
    assert attempt(context, cluster).counts["sequences"] == CORPUS
    assert (cluster.dealt, cluster.merged) == ([], [(5, "first", "second", "third")])


def test_what_was_merged_is_used_even_if_its_parts_are_gone(context: StageContext):
    first = attempt(context, FakeCluster())
    cluster = FakeCluster()
    assert attempt(context, cluster) == first
    assert (cluster.dealt, cluster.merged) == ([], [])


def test_sequences_set_aside_are_counted_over_groups(context: StageContext):
    config = replace(context.config, scan=ScanConfig(nonfinite_share=0.1))
    result = attempt(replace(context, config=config), FakeCluster(excluded={3: "why", CORPUS - 1: "also"}))
    assert result.counts["sequences"] == CORPUS - 2
    assert result.extra["excluded"] == {"3": "why", str(CORPUS - 1): "also"}


def test_too_many_set_aside_fail_and_a_larger_share_goes_on(context: StageContext):
    with pytest.raises(NonFiniteShare, match=r"1 of 160 .* scan\.nonfinite_share=0\.001 allows; the first: 3 \(why\)"):
        attempt(context, FakeCluster(excluded={3: "why"}))
    config = replace(context.config, scan=ScanConfig(nonfinite_share=0.1))
    cluster = FakeCluster()
    result = attempt(replace(context, config=config), cluster)
    assert cluster.dealt == []
    assert result.counts["excluded"] == 1


@pytest.mark.parametrize(
    ("count", "share", "fails"), [(0, 0.0, False), (1, 0.0, True), (1, 0.1, False), (2, 0.1, True)]
)
def test_the_share_that_may_be_set_aside(count: int, share: float, fails: bool):
    excluded = {str(number): "the loss is not finite" for number in range(count)}
    if not fails:
        check_share(excluded, 10, share)
        return
    with pytest.raises(NonFiniteShare, match=rf"^{count} of 10 sequences .*nonfinite_share={share} .*or raise scan"):
        check_share(excluded, 10, share)


def test_layers_that_exceed_a_rank_are_summed_in_several_passes(context: StageContext):
    cluster = FakeCluster()
    result = attempt(limited(context, 900), cluster)
    assert cluster.dealt == 2 * [0, 1, 2, 3, 4]
    assert cluster.merged == [(5, "first", "second"), (5, "third")]
    assert result.counts == {"sequences": CORPUS, "tokens": 10 * CORPUS, "excluded": 0}
    assert context.artifact.read_json("merged.json")["rows"] == {"first": 7 * CORPUS, "third": 7 * CORPUS}


def test_a_layer_that_exceeds_a_rank_alone_is_refused_by_name(context: StageContext):
    with pytest.raises(ConfigError, match=r"cluster\.memory_per_rank=399 is too small for first"):
        attempt(limited(context, 399), FakeCluster())


def test_a_sequence_that_one_pass_sets_aside_counts_in_none(context: StageContext):
    config = replace(context.config, scan=ScanConfig(nonfinite_share=0.1))
    wide = limited(replace(context, config=config), 400)
    cluster = FakeCluster(excluded={3: "the gradient at layer third is not finite"}, seen_in="third")
    result = attempt(wide, cluster)
    assert cluster.dealt == [*3 * [0, 1, 2, 3, 4], 0, 0]  # the first group again for the first and the second layer
    assert result.counts["sequences"] == CORPUS - 1
    rows = context.artifact.read_json("merged.json")["rows"]
    assert set(rows.values()) == {7 * (CORPUS - 1)}


def test_parts_of_another_division_into_passes_are_not_used(context: StageContext):
    with pytest.raises(KeyboardInterrupt):
        attempt(limited(context, 900), FakeCluster(dies_after=3))
    cluster = FakeCluster()
    assert attempt(context, cluster).counts["sequences"] == CORPUS
    assert cluster.dealt == [0, 1, 2, 3, 4]


def test_a_message_names_five_at_most():
    with pytest.raises(NonFiniteShare) as caught:
        check_share({str(number): "why" for number in range(50)}, 100, 0.1)
    assert str(caught.value).count("(why)") == 5
