"""What the command line says, checked against the schema and the config groups before Hydra composes anything."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from conf.keys import GROUPS, keys, options
from conf.problems import Problem, did_you_mean
from conf.validate import unknown_key

MOST_JOBS = 64
NOT_TEXT = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as something else


@dataclass(frozen=True)
class Checked:
    """Overrides that passed, job by job, and the problems of those that did not.

    Attributes:
        jobs: The overrides of each job; of a sweep of more than `MOST_JOBS`, a few in which every value occurs.
        problems: Of the overrides that were left out.
        partial: Whether something is left out that may give what a run needs, such as its experiment.
    """

    jobs: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]
    partial: bool


def check_overrides(overrides: Sequence[str], *, multirun: bool = False, folders: Iterable[Path] = ()) -> Checked:
    """Check keys and group options, and expand a sweep into its jobs.

    Args:
        overrides: In Hydra's grammar.
        multirun: Whether a list of values is a sweep; if not, it is refused.
        folders: The user's own config folders.
    """
    folders = tuple(folders)
    parser = OverridesParser.create()
    searched_elsewhere = any("hydra.searchpath" in text for text in overrides)
    problems: list[Problem] = []
    choices: dict[str, list[str]] = {}
    partial = False
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(_unreadable(text, error))
            continue
        found = _problems_of(override, text, multirun, folders, searched_elsewhere)
        problems += found
        values = [] if found else _values(override, text)
        partial = partial or (not values and (not found or override.key_or_group == "experiment"))
        if values:
            choices[override.get_key_element()] = values
    return Checked(_jobs(list(choices.values())), tuple(problems), partial)


def override_strings(settings: Mapping[str, object]) -> list[str]:
    """Write settings as Hydra overrides, quoted where they must be.

    `{"queries": {"rank": 16}, "corpus.path": "my stories.txt", "prefilter": "none"}` becomes
    `["queries.rank=16", "corpus.path='my stories.txt'", "prefilter=none"]`.
    """
    strings: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            strings += override_strings({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            strings.append(f"{key}={_quoted(value)}")
    return strings


def _quoted(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_quoted(item) for item in value)}]"
    text = str(value)
    return (
        text
        if text.isidentifier() and text.lower() not in NOT_TEXT
        else QuotedString(text=text, quote=Quote.single).with_quotes()
    )


def _unreadable(text: str, error: HydraException) -> Problem:
    if "=" not in text:
        return Problem(text, "a setting is written key=value, a group's option group=option")
    key, _, value = text.partition("=")
    remedy = f"Put quotes around what holds brackets, commas, equals signs or spaces: \"{key}='{value}'\""
    return Problem(text, f"the value cannot be read ({str(error).partition(chr(10))[0]}). {remedy}", (key,))


def _problems_of(
    override: Override, text: str, multirun: bool, folders: Iterable[Path], searched_elsewhere: bool
) -> list[Problem]:
    """What is wrong with one override; values are judged later, in the composed config."""
    key = override.key_or_group
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return _launcher_problems(override, text)
    if key not in GROUPS and key not in keys():
        return [unknown_key(key, text.partition("=")[2])]
    if override.is_sweep_override() and not multirun:
        reason = "several values. Add --multirun to run each of them; put quotes around a value that holds a comma"
        return [Problem(text, reason, (key,))]
    if override.is_add() and not override.is_force_add() and key in keys():
        return [Problem(text, f"the key exists already. Leave out the plus sign: {text.lstrip('+')}", (key,))]
    if override.is_delete() and key != "experiment":
        return [Problem(text, f"a setting cannot be taken away. Give it a value: {key}=...", (key,))]
    if key in GROUPS and not override.is_delete() and not searched_elsewhere:
        return _option_problems(key, _options_given(override), options(key, folders))
    return []


def _options_given(override: Override) -> list[object]:
    if override.is_sweep_override():
        discrete = override.is_discrete_sweep() and "glob(" not in (override.input_line or "")
        return list(override.sweep_string_iterator()) if discrete else []
    value = override.value()
    return list(value) if isinstance(value, list) else [value]


def _option_problems(group: str, given: Iterable[object], known: Mapping[str, object]) -> list[Problem]:
    problems = []
    for option in given:
        if str(option) in known or (group == "experiment" and option in (None, "null")):
            continue
        listing = ", ".join((*known, *(("null",) if group == "experiment" else ())))
        shown = "null" if option is None else option
        reason = f"there is no such option. Allowed: {listing}.{did_you_mean(str(option), known)}"
        problems.append(Problem(f"{group}={shown}", reason, (group,)))
    return problems


def _launcher_problems(override: Override, text: str) -> list[Problem]:
    if override.key_or_group != "hydra/launcher" or override.value() not in ("whence_ray", "ray"):
        return []
    if importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        return []
    return [Problem(text, "needs hydra-ray-launcher. Install it: pip install 'whence[sweep]'", ("hydra/launcher",))]


def _values(override: Override, text: str) -> list[str]:
    """The override once for each value that a sweep gives it; none of a sweep that only a sweeper can draw."""
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep() or "glob(" in text:
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _jobs(choices: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """All combinations, or, where they are many, as many as it takes for every value to occur."""
    if math.prod(len(values) for values in choices) <= MOST_JOBS:
        return tuple(itertools.product(*choices))
    longest = max(len(values) for values in choices)
    return tuple(tuple(values[job % len(values)] for values in choices) for job in range(longest))
