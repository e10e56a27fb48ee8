"""Stage `probe`: the scores of sequences that the user wrote, one task and one Parquet file a probe.

What partitions are called is no part of it: to name them otherwise computes nothing again.
"""

from __future__ import annotations

from actors.probe_files import probe_file
from actors.probes import read_probes, tokenise_probes
from actors.tasks import Done, ProbeTask
from actors.tokeniser import load_tokeniser, model_limits
from pipelines.steps import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `probe-000000.parquet`, ..., by `actors.probe_files.SCHEMA`, and `queries.json`."""
    output, config = context.artifact, context.config
    probes = read_probes(config)
    rows = tokenise_probes(probes, load_tokeniser(config.model), model_limits(config.model), config)
    lengths = [len(ids) for probe in rows for ids in probe]
    mean = max(1, round(sum(lengths) / len(lengths)))
    finished = set(output.list("probe-"))
    tasks = [
        ProbeTask(output, number, tuple(tuple(ids.tolist()) for ids in rows[number]), context.inputs["queries"], mean)
        for number in range(len(probes))
        if probe_file(number) not in finished
    ]
    behind = len(lengths) - sum(len(task.rows) for task in tasks)
    progress = context.progress("probes", len(lengths), "sequences")
    progress.resume(behind)

    def done(task: ProbeTask, _report: Done) -> None:
        nonlocal behind
        behind += len(task.rows)
        progress.advance_to(behind)

    if tasks:
        context.cluster.pool.run("probe", tasks, done, lambda running: progress.advance_to(behind + running))
    progress.close()
    output.write_json("queries.json", context.inputs["queries"].read_json("queries.json"))
    return StageResult({"probes": len(probes), "sequences": len(lengths), "tokens": sum(lengths)})
