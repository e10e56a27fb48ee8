"""The end of a sweep: a table with a row for each of its jobs, finished or not.

A job leaves `job.json` in its folder: when it starts, and again when it has ended, however it ended. The table is made
from these records, from the `summary.json`, `top.parquet` and `scores/` of the jobs that finished, and from nothing
else, so that it does not matter in which process or on which node a job ran, as long as its folder is in reach.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from actors.errors import WhenceError
from pipelines.comparison import SUMMARY, Agreement, Outcome, compare, load_outcome
from pipelines.ending import JobStopped, rearm

log = logging.getLogger(__name__)

RECORD = "job.json"
COLUMNS = ("state", "seconds", "computed", "cached", "rank", "fidelity", "top10", "top100", "spearman")


@dataclass(frozen=True)
class _Running:
    """A sweep of this process."""

    folder: Path
    own_ray: bool


_RUNNING: list[_Running] = []  # the latest last


@dataclass(frozen=True)
class JobRecord:
    """What a job says of itself.

    Attributes:
        number: Its place in the sweep.
        overrides: All overrides that it was given.
        state: `unfinished` until it has ended; then `done`, `failed` or `stopped`.
        seconds: From its start to its end.
        error: The first line of what went wrong.
    """

    number: int
    overrides: tuple[str, ...]
    state: str = "unfinished"
    seconds: float = 0.0
    error: str = ""

    def write(self, folder: Path) -> None:
        """Write it into the job's folder."""
        aside = folder / f".{RECORD}"
        aside.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        aside.rename(folder / RECORD)

    @classmethod
    def read(cls, file: Path) -> JobRecord:
        """Read it again."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**fields, "overrides": tuple(fields["overrides"])})


class SweepFolder(Callback):
    """Prepares a sweep, and remembers where it goes: Hydra does not say when it ends with an error."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Note the folder, where records of an earlier sweep may be; start Ray for the launcher that will need it."""
        folder = Path(config.hydra.sweep.dir).absolute()
        for old in folder.rglob(RECORD):
            old.unlink()
        on_ray = "ray" in config.hydra.launcher
        own = on_ray and _start_ray(OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True))
        _RUNNING.append(_Running(folder, own))


def _start_ray(settings: Any) -> bool:
    """Start or join Ray before the launcher does, which would not explain what is wrong with an address.

    Returns:
        Whether it was not there yet.
    """
    import ray

    from pipelines.cluster import join

    if ray.is_initialized():
        return False
    try:
        if settings.get("address") == "local":
            ray.init(**settings, logging_level=logging.WARNING)
        else:
            join(settings.get("address") or "auto")
    except WhenceError as error:
        log.error("%s", error)
        raise JobStopped(error) from error  # Hydra keeps back what else a callback raises
    rearm()
    return True


@contextmanager
def recorded() -> Iterator[None]:
    """Leave a record of the job of Hydra's that this process is running."""
    hydra = HydraConfig.get()
    folder, record = Path(hydra.runtime.output_dir), JobRecord(int(hydra.job.num), tuple(hydra.overrides.task))
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder)
    started, state, error = time.monotonic(), "stopped", ""
    try:
        yield
        state = "done"
    except Exception as failure:
        state, error = "failed", _line(failure)
        raise
    finally:
        seconds = time.monotonic() - started
        dataclasses.replace(record, state=state, seconds=seconds, error=error).write(folder)


def _line(error: Exception) -> str:
    text = str(getattr(error, "cause", error)).strip() or type(error).__name__
    return text.splitlines()[0]


@dataclass(frozen=True)
class Row:
    """A job in the table.

    Attributes:
        job: Its record.
        swept: Its values of the keys in which jobs differ.
        outcome: What it left; None unless it is done.
        agreement: With the reference's scores; None unless both are done.
    """

    job: JobRecord
    swept: Mapping[str, str]
    outcome: Outcome | None
    agreement: Agreement | None

    def cells(self) -> dict[str, Any]:
        """The values by column; None where there is none."""
        outcome, agreement = self.outcome, self.agreement
        return {
            "job": self.job.number,
            **self.swept,
            "state": self.job.state + (f": {self.job.error}" if self.job.error else ""),
            "seconds": self.job.seconds if self.job.state != "unfinished" else None,
            "computed": outcome and outcome.computed,
            "cached": outcome and outcome.cached,
            "rank": outcome and (outcome.rank if outcome.rank is not None else "full"),
            "fidelity": outcome and outcome.fidelity,
            "top10": agreement and agreement.top10,
            "top100": agreement and agreement.top100,
            "spearman": agreement and agreement.spearman,
        }


@dataclass(frozen=True)
class SweepTable:
    """The table of a sweep.

    Attributes:
        rows: In the order of the jobs.
        reference: Number of the job that the others' scores are compared with; None if none is done.
    """

    rows: tuple[Row, ...]
    reference: int | None

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        swept = dict.fromkeys(key for row in self.rows for key in row.swept)
        return ["job", *swept, *COLUMNS]

    def markdown(self) -> str:
        """The table for people."""
        body = [[_shown(row.cells().get(name)) for name in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *body, strict=True)]
        lines = [_joined(cells, widths) for cells in (self.columns, ["-" * width for width in widths], *body)]
        return "\n".join([*lines, "", self.legend()])

    def legend(self) -> str:
        """What the columns mean."""
        if self.reference is None:
            return "No job is done, so there is nothing to compare."
        return (
            "computed, cached: steps. rank: mean over queries and layers. fidelity: correlation with full-rank scores, "
            f"the worst query. top10, top100, spearman: share of the same top sequences, and rank correlation of "
            f"scores, with job {self.reference}, means over queries."
        )

    def write(self, folder: Path) -> None:
        """Write `sweep.md` and `sweep.csv`."""
        (folder / "sweep.md").write_text(self.markdown() + "\n", encoding="utf-8")
        with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(row.cells() for row in self.rows)


def table_of(folder: Path) -> SweepTable:
    """The table of a sweep, from what its jobs left below its folder."""
    places = {JobRecord.read(file): file.parent for file in folder.rglob(RECORD)}
    records = sorted(places, key=lambda record: record.number)
    finished = [record for record in records if record.state == "done" and (places[record] / SUMMARY).exists()]
    outcomes = {record.number: load_outcome(places[record]) for record in finished}
    best = highest_rank(outcomes)
    swept = swept_values([record.overrides for record in records])
    rows = []
    for record, values in zip(records, swept, strict=True):
        mine = outcomes.get(record.number)
        agreement = None if mine is None or best is None else compare(mine.folder, outcomes[best].folder)
        rows.append(Row(record, values, mine, agreement))
    return SweepTable(tuple(rows), best)


def highest_rank(outcomes: Mapping[int, Outcome]) -> int | None:
    """The job to compare with: the one of the highest rank, full before any number; of several the first."""

    def order(number: int) -> tuple[float, int]:
        rank = outcomes[number].rank
        return (-float("inf") if rank is None else -rank, number)

    return min(outcomes, key=order, default=None)


def swept_values(jobs: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """Of each job's overrides, those in which jobs differ, by key."""
    settings = [{key.lstrip("+"): value for key, _, value in (text.partition("=") for text in job)} for job in jobs]
    keys = dict.fromkeys(key for job in settings for key in job)
    differing = [key for key in keys if len({job.get(key) for job in settings}) > 1]
    return [{key: job[key] for key in differing if key in job} for job in settings]


def finish_sweep() -> str:
    """Write the table of the sweep that this process started last; returns it for the terminal, with its place."""
    if not _RUNNING:
        return ""
    sweep = _RUNNING.pop()
    if sweep.own_ray:
        _stop_ray()  # whose jobs' last lines should not come after the table
    if not any(sweep.folder.rglob(RECORD)):
        return ""
    table = table_of(sweep.folder)
    table.write(sweep.folder)
    return f"{table.markdown()}\n\n{sweep.folder / 'sweep.md'}"


def _stop_ray() -> None:
    import ray

    ray.shutdown()


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
