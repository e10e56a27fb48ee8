"""The keys of a run, read from the schema: type, default, meaning; and the options of each config group.

Neither Hydra nor OmegaConf is imported here, so that `--help` is instant.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from conf import schema

FOLDER = Path(__file__).parent
GROUPS = (
    *("model", "corpus", "factors", "queries", "prefilter", "unfiltered"),
    *("scan", "attribution", "tails", "cluster", "report", "probe", "plan", "validation", "experiment"),
)
PATHS = ("model.path", "corpus.path", "queries.path")  # without these there is nothing to trace
PROBE_PATHS = ("model.path", "corpus.path", "probe.path")  # what whence probe needs in their place
Needs = Sequence[str] | Callable[[schema.RunConfig], Sequence[str]]  # keys of paths that a job reads


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: As it is written on the command line, `factors.blocks`.
        kind: bool, int, float, str or an enum.
        optional: Whether null is a value.
        default: The schema's; `schema.MISSING` if there is none.
        meaning: One line.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    meaning: str

    @property
    def group(self) -> str:
        """The config group, empty for a key of the run itself."""
        return self.name.rpartition(".")[0]

    @property
    def field(self) -> str:
        """The name within its group."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Option:
    """A file of a config group: what it is called and what it sets."""

    name: str
    meaning: str


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every key by its name, the run's own first, in the schema's order."""
    own = _keys_of(schema.RunConfig, "")
    grouped = [key for name, cls in group_classes().items() for key in _keys_of(cls, f"{name}.")]
    return types.MappingProxyType({key.name: key for key in (*own, *grouped)})


@functools.cache
def group_classes() -> Mapping[str, type]:
    """The schema's class of each config group that has keys."""
    hints = typing.get_type_hints(schema.RunConfig)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def validation_paths(config: schema.RunConfig) -> tuple[str, ...]:
    """What whence validate needs, by its subject: a data set; the model, corpus and queries of a trace; or nothing."""
    subject = config.validation.subject
    if subject is schema.Subject.almanac:  # which is generated
        return ()
    return PATHS if subject is schema.Subject.language else ("validation.path",)


def options(group: str, folders: Iterable[Path] = ()) -> dict[str, Option]:
    """The options of a config group, those of the user's own `folders` included."""
    found: dict[str, Option] = {}
    for folder in (FOLDER, *folders):
        for file in sorted((folder / group).rglob("*.yaml")):
            name = file.relative_to(folder / group).with_suffix("").as_posix()
            found[name] = Option(name, _first_comment(file))
    return found


@functools.cache
def default_options() -> Mapping[str, str]:
    """The option of each group that the main config chooses."""
    chosen = {}
    for line in (FOLDER / "config.yaml").read_text(encoding="utf-8").splitlines():
        group, _, option = line.strip().removeprefix("- ").partition(": ")
        if line.startswith("  - ") and group in GROUPS:
            chosen[group] = option
    return chosen


def written(value: object) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(schema.plain(value))


def _keys_of(cls: type, prefix: str) -> list[Key]:
    """The keys of one dataclass of the schema, its groups left out."""
    hints = typing.get_type_hints(cls)
    comments = _comments().get(cls.__name__, {})
    found = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        members = [member for member in typing.get_args(hint) if member is not type(None)] or [hint]
        kind = members[0]
        described = issubclass(kind, Enum) and kind is not schema.Dtype
        meaning = comments.get(field.name) or (_first_sentence(kind.__doc__) if described else "")
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found.append(Key(prefix + field.name, kind, type(None) in typing.get_args(hint), default, meaning))
    return found


@functools.cache
def _comments() -> Mapping[str, Mapping[str, str]]:
    """The comment that ends the line of each field in `schema.py`, by class and field."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.lineno in by_line:
                    found.setdefault(node.name, {})[line.target.id] = by_line[line.lineno]
    return found


def _first_sentence(text: str | None) -> str:
    first = (text or "").strip().partition("\n")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _first_comment(file: Path) -> str:
    """The first line of a YAML file that is a comment of ours."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
        if line and not line.startswith("#"):
            break
    return ""
