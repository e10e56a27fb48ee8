"""`whence --help`: verbs, config groups with their options, and every key with its default and meaning.

All of it is read from the schema and the config files, so it cannot fall behind them.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from conf.keys import GROUPS, Key, default_options, group_classes, keys, options, written
from conf.schema import MISSING
from conf.validate import LIMITS, allowed

if TYPE_CHECKING:
    from pipelines.command import Verb

KEY_WIDTH = 26
DEFAULT_WIDTH = 16
FLAGS = (
    ("--multirun, -m", "run every combination of the values that are given as key=a,b; a table compares the runs"),
    ("--cfg job", "print the composed configuration and run nothing; --resolve fills in references"),
    ("--config-dir FOLDER", "a folder of your own options, such as experiment/mine.yaml"),
    ("--help, --version", "this text; the version"),
)
EXAMPLES = (
    (
        "the training sequences behind each completion",
        "whence trace model.path=MODEL corpus.path=TEXT queries.path=Q.jsonl",
    ),
    ("what that would cost", "whence plan model.path=MODEL corpus.path=TEXT queries.path=Q.jsonl"),
    ("a ready experiment, with another corpus", "whence trace experiment=tinystories corpus.path='stories/*.jsonl'"),
    (
        "sequences of your own, instead of the corpus's",
        "whence probe model.path=MODEL corpus.path=TEXT probe.path=P.yaml",
    ),
    ("how far its scores can be trusted, on a data set", "whence validate experiment=concrete"),
    (
        "no prefilter, the whole corpus, two replicas",
        "whence trace ... prefilter=none unfiltered=all cluster=replicas2",
    ),
    ("a regular expression, in quotes", "whence trace ... \"model.layers='.*\\.(gate|up)_proj'\""),
    (
        "four runs that share their factors",
        "whence trace ... --multirun queries.rank=16,32 factors.damping_factor=0.01,0.1",
    ),
    ("a sweep on Ray", "whence trace ... --multirun hydra/launcher=whence_ray queries.rank=16,32,full"),
    ("on the cluster that this process can join", "whence trace ... cluster=autoscaled store=s3://bucket/whence"),
)


def version() -> str:
    """The version of the installed distribution; of its sources where it is not installed."""
    try:
        return importlib.metadata.version("whence")
    except importlib.metadata.PackageNotFoundError:
        return "from sources"


def manual(verbs: Iterable[Verb], verb: Verb | None = None) -> str:
    """The help.

    Args:
        verbs: All verbs.
        verb: The one that help is asked for; all of them if None.
    """
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 130)
    parts = ["whence: which training sequences made the model say this?"]
    parts.append(f"usage: whence {verb.name if verb else 'VERB'} [group=option] [group.key=value] [flags]")
    parts.append(_verbs([verb] if verb else list(verbs), width))
    if verb and verb.complete and verb.job:
        needed = verb.needed or ", ".join(() if callable(verb.needs) else verb.needs)
        said = f"Must be given, on the command line or by an experiment: {needed}."
        parts.append("\n".join(textwrap.wrap(said, width, break_on_hyphens=False)))
    if verb is None or verb.job:
        parts.append(_run_keys(width))
        parts += [_group(group, width) for group in GROUPS]
    parts.append("examples\n" + "\n".join(f"  # {what}\n  {command}" for what, command in EXAMPLES))
    parts.append("flags\n" + "\n".join(_row(f"  {flag}", 24, text, width) for flag, text in FLAGS))
    parts.append(
        "A run's folder is runs/NAME/TIME, the jobs of a sweep are in multirun/NAME/TIME/NUMBER (hydra.run.dir,\n"
        "hydra.sweep.dir). Relative paths start from the current folder. Exit status: 0, or 1 for a run that stopped\n"
        "at an error, 2 for a setting that is not allowed (nothing was started then), 130 and 143 if it was stopped\n"
        "from outside (Ctrl-C, SIGTERM): what was committed stays, and the same command goes on from there."
    )
    return "\n\n".join(parts) + "\n"


def _verbs(verbs: Iterable[Verb], width: int) -> str:
    rows = [
        _row(f"  {verb.name}", 12, verb.summary + ("" if verb.ready else " (comes with a later release)"), width)
        for verb in verbs
    ]
    return "\n".join(["verbs", *rows])


def _run_keys(width: int) -> str:
    rows = [_key(key, width) for key in keys().values() if not key.group]
    return "\n".join(["keys of the run: name, default, meaning [allowed]", *rows])


def _group(group: str, width: int) -> str:
    """One config group: what it is, its options, its keys."""
    cls = group_classes().get(group)
    summary = (
        (inspect.getdoc(cls) or "").partition("\n")[0] if cls else "A ready set of the others; yours: --config-dir."
    )
    rows = [f"{group}: {summary}"]
    for option in options(group).values():
        mark = " (default)" if default_options().get(group) == option.name else ""
        rows.append(_row(f"  {group}={option.name}{mark}", KEY_WIDTH + 10, option.meaning, width))
    rows += [_key(key, width) for key in keys().values() if key.group == group]
    return "\n".join(rows)


def _key(key: Key, width: int) -> str:
    default = "(none)" if key.default == MISSING else written(key.default)
    note = f" [{allowed(key)}]" if _worth_saying(key) else ""
    head = f"    {key.name:<{KEY_WIDTH}} {default:<{DEFAULT_WIDTH - 1}}"
    return _row(head, KEY_WIDTH + DEFAULT_WIDTH + 5, re.sub(r"\bNone\b", "null", key.meaning) + note, width)


def _worth_saying(key: Key) -> bool:
    """Whether what is allowed says more than default and meaning do."""
    if issubclass(key.kind, Enum):
        return True
    return key.name in LIMITS and LIMITS[key.name].text != "not empty" and key.name not in ("model.layers",)


def _row(head: str, indent: int, text: str, width: int) -> str:
    """A left column and a wrapped right one."""
    lines = textwrap.wrap(text, width - indent, break_long_words=False) or [""]
    first = f"{head:<{indent - 1}} {lines[0]}".rstrip()
    return "\n".join([first, *(" " * indent + line for line in lines[1:])])
