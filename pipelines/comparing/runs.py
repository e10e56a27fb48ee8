"""The folders of finished runs, the queries that they share, and what differs between their settings."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from pipelines.report.reading import read_run

KEPT = 1000  # top sequences a query that are compared and shown, at most
WORDING = ("prompt", "completion", "contrast")
SCALING = ("model.path", "model.revision", "factors.solver", "factors.damping_factor", "queries.measurement")
ELSEWHERE = ("cluster", "plan", "report", "store", "name")  # settings that move no score


@dataclass(frozen=True)
class ComparedRun:
    """A finished run among others.

    Attributes:
        label: A letter.
        folder: Of the run.
        summary: Its `summary.json`.
        top: Rows of `top.parquet` by query, in the order of their ranks.
        query_ids: In the order of the scores.
        files: Of scores, ascending by sequence.
    """

    label: str
    folder: Path
    summary: Mapping[str, Any]
    top: Mapping[str, list[dict[str, Any]]]
    query_ids: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def scanned(self) -> int:
        """Sequences that it scanned."""
        return self.summary["stages"]["scores"]["counts"]["sequences"]

    @property
    def rank(self) -> float | None:
        """Singular values a query and layer, the mean; None for full rank."""
        totals = [query["total_rank"] for query in self.summary["queries"]]
        layers = self.summary["stages"]["layers"]["counts"]["layers"]
        return None if None in totals or not totals else sum(totals) / len(totals) / layers


@dataclass(frozen=True)
class SharedQueries:
    """What can be compared.

    Attributes:
        queries: Records of the queries that all runs have, in the order of the first run.
        left_out: Why another is not among them, by query id.
    """

    queries: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str]

    @property
    def ids(self) -> list[str]:
        """Their ids."""
        return [query["query_id"] for query in self.queries]


def load(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read what is small of each run.

    Raises:
        ConfigError: fewer than two folders, the same one twice, or one that is not that of a finished run.
        WhenceError: a file cannot be read.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(folders) < 2:
        raise ConfigError(
            "there is one run only, and nothing to compare it with",
            file=str(folders[0]) if folders else None,
            remedy="give two or more folders: whence compare runs/NAME/TIME runs/NAME/TIME",
        )
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ConfigError("this folder is given twice", file=str(folders[number]), remedy="give different runs")
    return [_load(label, folder) for label, folder in zip(_labels(len(folders)), folders, strict=True)]


def _labels(count: int) -> list[str]:
    letters = string.ascii_uppercase
    return [letters[n] if n < len(letters) else f"{letters[n % 26]}{n // 26}" for n in range(count)]


def _load(label: str, folder: Path) -> ComparedRun:
    found = read_run(folder, KEPT)
    files = tuple(sorted((folder / "scores").glob("shard-*.parquet")))
    if not files:
        raise ConfigError(
            "this run's folder has no scores",
            file=str(folder / "scores"),
            remedy="run whence trace again with the same settings: it writes the folder anew from the store",
        )
    top = {query: rows for (query, side), rows in found.rows.items() if side == "top"}
    ids = tuple(query["query_id"] for query in found.summary["queries"])
    return ComparedRun(label, folder, found.summary, top, ids, files)


def shared_queries(runs: Sequence[ComparedRun]) -> SharedQueries:
    """The queries that all runs have, worded the same.

    Raises:
        ConfigError: there is none.
    """
    records = [{query["query_id"]: query for query in run.summary["queries"]} for run in runs]
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(name for found in records for name in found):
        lacking = [run.label for run, found in zip(runs, records, strict=True) if name not in found]
        if lacking:
            left_out[name] = f"not in {', '.join(lacking)}"
        elif len({tuple(found[name].get(key) for key in WORDING) for found in records}) > 1:
            left_out[name] = "worded differently, though its query_id is the same"
    shared = tuple(record for name, record in records[0].items() if name not in left_out)
    if not shared:
        first = next(iter(left_out.items()), ("", "the runs have no queries"))
        raise ConfigError(
            f"no query is in all of these runs with the same wording ({first[0]}: {first[1]})",
            file=", ".join(str(run.folder) for run in runs),
            remedy="trace the same queries.path in all runs, or compare others",
        )
    return SharedQueries(shared, left_out)


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Settings in which runs differ, one value a run, those that can move scores first; None where a run has none."""
    flat = [_flat(run.summary["config"]) for run in runs]
    keys = dict.fromkeys(key for found in flat for key in found)
    found = {key: [settings.get(key) for settings in flat] for key in keys}
    differing = {key: values for key, values in found.items() if any(value != values[0] for value in values)}
    return dict(sorted(differing.items(), key=lambda item: moves_nothing(item[0])))


def moves_nothing(key: str) -> bool:
    """Whether a setting leaves scores as they are."""
    return key.partition(".")[0] in ELSEWHERE


def scales_differ(first: ComparedRun, second: ComparedRun) -> bool:
    """Whether the runs' scores are of different sizes by their settings, such as the solver."""
    return any(key in SCALING for key in differences([first, second]))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def names(runs: Sequence[ComparedRun]) -> list[str]:
    """What tells each run apart, for plots and tables: its letter and the settings that differ, as far as they fit."""
    differing = {key: values for key, values in differences(runs).items() if not moves_nothing(key)}
    found = []
    for number, run in enumerate(runs):
        parts = [f"{key.rpartition('.')[2]}={_short(values[number])}" for key, values in list(differing.items())[:2]]
        found.append(f"{run.label}: {', '.join(parts)}" if parts else run.label)
    return found


def _short(value: Any) -> str:
    text = str(value)
    if "/" in text:  # the last folder of a path
        text = text.rstrip("/").rpartition("/")[2]
    return text if len(text) <= 24 else f"{text[:23]}…"
