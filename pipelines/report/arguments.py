"""The words of `whence report`, and what it does with them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import ReportConfig


def parser() -> argparse.ArgumentParser:
    """The folder of a run and settings of the group `report`."""
    found = argparse.ArgumentParser(
        prog="whence report",
        description="Write report.html of a finished run again, from its folder alone. Settings that are not given "
        "stay as the run had them.",
        epilog="whence report runs/NAME/TIME report.sequences=50 report.megabytes=10 report.title='For reviewers'",
    )
    found.add_argument("run", metavar="RUN", help="folder of a finished run, runs/NAME/TIME")
    found.add_argument("settings", nargs="*", metavar="report.KEY=VALUE", help="keys: whence trace --help, report")
    return found


def run(given: argparse.Namespace) -> str:
    """Write the report, and the tables and plots beside it; return its path.

    Raises:
        ConfigProblems: a setting is not allowed.
        ConfigError: the folder is not one of a run.
        ReportError: a file of the run cannot be read.
    """
    from pipelines.export import export
    from pipelines.report import write_report
    from pipelines.report.reading import read_summary

    changes = given_settings(given.settings)
    summary = read_summary(Path(given.run))
    report = write_report(Path(given.run), dataclasses.replace(settings_of(summary), **changes))
    export(Path(given.run))
    return str(report)


def given_settings(words: Sequence[str]) -> dict[str, Any]:
    """Fields of the group `report` that the words set, checked as those of every other verb.

    Raises:
        ConfigProblems: a word is no setting, none of this group, or of a value that is not allowed.
    """
    from conf.load import compose_config
    from conf.problems import ConfigProblems, Problem

    foreign = [word for word in words if not word.lstrip("+~").startswith(("report.", "report="))]
    if foreign:
        reason = "whence report takes the folder of one run and settings report.KEY=VALUE. Everything else is done"
        raise ConfigProblems([Problem(word, reason, (word,)) for word in foreign])
    composed = compose_config(list(words), complete=False).report
    keys = [word.partition("=")[0].partition(".")[2] for word in words]
    return {key: getattr(composed, key) for key in keys if key}


def settings_of(summary: Mapping[str, Any]) -> ReportConfig:
    """The group `report` as a run had it; keys that came later have their default."""
    known = {field.name for field in dataclasses.fields(ReportConfig)}
    return ReportConfig(**{key: value for key, value in summary["config"]["report"].items() if key in known})
