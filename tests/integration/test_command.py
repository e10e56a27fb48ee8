"""The command from a shell: its folder, its table, its exit status; two of them on one store."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.tracing import TraceResult
from tests.integration.processes import command, finished
from tests.integration.world import World


@pytest.mark.slow
def test_two_commands_on_one_store_share_the_work_and_give_the_bits_of_a_single_process(
    world: World, traced: TraceResult, tmp_path: Path
):
    overrides = world.overrides(tmp_path / "store", cluster__num_cpus=3, scan__batch_size=8)
    folders = [tmp_path / "first", tmp_path / "second"]
    with (
        command("trace", *overrides, "cluster.max_replicas=2", run_dir=folders[0]) as first,
        command("trace", *overrides, run_dir=folders[1]) as second,
    ):
        finished([first, second], [folder / "output.txt" for folder in folders])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for stage in traced.summary["stages"]:
        assert sorted(summary["stages"][stage]["cached"] for summary in summaries) == [False, True], stage
    said = [(folder / "output.txt").read_text() for folder in folders]
    assert any("is being computed by process" in text for text in said)
    for folder, text in zip(folders, said, strict=True):
        assert pq.read_table(folder / "scores").unify_dictionaries().equals(traced.scores_table())
        assert pq.read_table(folder / "top.parquet").equals(traced.top)
        assert (folder / "report.html").exists()
        assert traced.table() in text
