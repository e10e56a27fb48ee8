"""What is wrong with a configuration, said so that the reader can act: the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        setting: The key, or `key=value` as it was given.
        reason: What is wrong with it, what is allowed, and what may have been meant.
        keys: Every key that has a part in it.
    """

    setting: str
    reason: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}" if self.setting else self.reason


class ConfigProblems(ValueError):
    """All that is wrong with a configuration, found before anything was started."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigProblems], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest of `allowed`, with a space before it; empty when none is near."""
    group, _, tail = given.rpartition(".")
    tails: dict[str, str] = {}
    for name in allowed:
        tails.setdefault(name.rpartition(".")[2] if not group or name.startswith(f"{group}.") else name, name)
    near = [tails[tail]] if tail in tails else []
    near += [tails[match] for match in difflib.get_close_matches(tail, tails, n=2, cutoff=0.55)]
    near += difflib.get_close_matches(given, tails.values(), n=2, cutoff=0.8)
    near = list(dict.fromkeys(near))[:2]
    return f" Did you mean {' or '.join(near)}?" if near else ""
