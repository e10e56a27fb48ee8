"""The words of `whence compare`, and what it does with them."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

SAMPLE = 100_000
SHOWN = 10


def parser() -> argparse.ArgumentParser:
    """Folders of runs and a few options; no configuration."""
    found = argparse.ArgumentParser(
        prog="whence compare",
        description="Say how far two or more finished runs agree on the same queries: models of different size, ranks, "
        "blocks, layers, samples of factors. Queries are matched by query_id, sequences by their number where corpus "
        "and tokens are the same, else by document. Runs of whence validate are put side by side instead: methods by "
        "data sets.",
        epilog="The folder of results gets compare.html, compare.json, tables/*.csv and plots/*.svg, *.png. A sweep: "
        "whence compare multirun/NAME/TIME/[0-9]*",
    )
    found.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, runs/NAME/TIME; two or more")
    found.add_argument("--out", metavar="FOLDER", help="for the results; by default runs/compare/TIME")
    found.add_argument(
        "--sequences", type=_positive, default=SHOWN, metavar="N", help=f"shown side by side for a query ({SHOWN})"
    )
    found.add_argument(
        "--sample",
        type=_positive,
        default=SAMPLE,
        metavar="N",
        help=f"sequences of which rank correlations are taken where runs scanned more, about ({SAMPLE:,})",
    )
    found.add_argument("--seed", type=int, default=0, metavar="N", help="of that sample (0)")
    return found


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word}: a number from 1 up")
    return value


def run(given: argparse.Namespace) -> str:
    """Compare, write the results, and return the table for the terminal.

    Raises:
        ConfigError: a folder is not one of a finished run, or the runs have nothing to compare.
        WhenceError: a file cannot be read.
    """
    from pipelines.validation.together import is_validation, together

    folders = [Path(folder) for folder in given.runs]
    folder = Path(given.out or Path("runs", "compare", datetime.now().strftime("%Y-%m-%d_%H-%M-%S")))
    if any(map(is_validation, folders)):
        return f"{together(folders, folder)}\n\n{folder / 'compare.html'}"

    from pipelines.comparing.agreement import compare
    from pipelines.comparing.output import render, write
    from pipelines.comparing.runs import load

    comparison = compare(load(folders), given.sample, given.seed)
    write(comparison, folder, given.sequences)
    return f"{render(comparison)}\n\n{folder / 'compare.html'}"
