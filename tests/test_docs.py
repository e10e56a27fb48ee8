"""What the documentation names exists: commands, settings, options, make targets, files, symbols, links, messages.

In code blocks, `...` stands for settings that the reader fills in, and MODEL, TEXT, Q.jsonl for the reader's own paths.
A YAML block with a line `# path/name.yaml` is a file of the reader's; commands with `--config-dir` find it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conf.keys import GROUPS, default_options, keys, options
from conf.load import check_command
from pipelines.command import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("conf", "influence", "actors", "pipelines")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs")
FLAGS = {"--multirun", "-m", "--resolve", "--help", "--version"}
SETTING = re.compile(rf"(?<![\w./])(?:{'|'.join(GROUPS)})\.(?!py\b|md\b|csv\b|jsonl?\b|ya?ml\b|html\b|parquet\b)\w+")
OPTION = re.compile(rf"({'|'.join(GROUPS)})=(\w+)")
FILE = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/[\w./-]+|[\w-]+\.(?:yaml|toml|txt)|Makefile)")
SYMBOL = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    language: str
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(page, language, text) for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments; a command runs on after a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def whence_words(words: list[str]) -> list[str] | None:
    """What follows `whence` or `python -m pipelines` in a command, in whatever it is wrapped."""
    if "whence" in words:
        return words[words.index("whence") + 1 :]
    for index in range(len(words) - 2):
        if words[index].endswith("python") and words[index + 1 : index + 3] == ["-m", "pipelines"]:
            return words[index + 3 :]
    return None


def shell_commands() -> list[tuple[Path, list[str]]]:
    return [(page, words) for page in PAGES for block in blocks(page, "sh") for words in commands(block.text)]


@functools.cache
def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))


@functools.cache
def literals() -> tuple[str, ...]:
    """Every piece of text in our code, where neighbouring literals are one."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return tuple(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the YAML files that the pages show; the current one."""
    for page in PAGES:
        for block in blocks(page, "yaml"):
            for path in re.findall(r"^# ([\w/.-]+\.yaml)$", block.text, re.MULTILINE):
                file = tmp_path / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pages_show_commands() -> None:
    assert len(shell_commands()) > 30


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_whence_commands_are_accepted(page: Path, own_configs: Path) -> None:
    for words in [whence_words(words) for where, words in shell_commands() if where == page]:
        if not words:
            continue
        ready = {verb.name: verb for verb in VERBS if verb.ready}
        assert words[0] in ready.keys() | FLAGS, words
        arguments = ready[words[0]].arguments if words[0] in ready else None
        if arguments is not None:
            arguments().parse_args(words[1:])
            continue
        rest, config_dir = [word for word in words[1:] if word != "..."], None
        for flag in ("--config-dir", "--cfg"):
            if flag in rest:
                index = rest.index(flag)
                value = rest[index + 1]
                config_dir = str(own_configs / value) if flag == "--config-dir" else config_dir
                del rest[index : index + 2]
        launchers = [word for word in rest if word.startswith("hydra/launcher=")]  # their packages are an extra
        assert all((ROOT / "conf/hydra/launcher" / f"{word.partition('=')[2]}.yaml").exists() for word in launchers)
        overrides = [word for word in rest if word not in FLAGS and word not in launchers]
        check_command(overrides, multirun=bool({"--multirun", "-m"} & set(rest)), complete=False, config_dir=config_dir)


def test_make_targets_exist() -> None:
    used = [words[1] for _, words in shell_commands() if words[0] == "make"]
    used += [span.split()[1] for page in PAGES for span in spans(page) if re.fullmatch(r"make [a-z]+", span)]
    assert {"demo", "test", "check"} <= set(used) <= targets()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path) -> None:
    found = {setting for span in spans(page) if not _resolves(span) for setting in SETTING.findall(span)}
    assert found <= set(keys())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_group_options_exist(page: Path) -> None:
    for span in spans(page):
        for group, option in re.findall(rf"(?<![\w.]){OPTION.pattern}", span):
            assert option in options(group), span


def test_readme_lists_every_group_and_option() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    for group in GROUPS:
        default = default_options().get(group)
        listed = re.findall(r"`(\w+)`", rows[group])
        assert sorted(listed) == sorted(options(group)), group
        assert re.findall(r"\*\*`(\w+)`\*\*", rows[group]) == ([default] if default and default != "null" else [])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_exist(page: Path) -> None:
    own = {first for other in PAGES for first in re.findall(r"^# ([\w/.-]+\.yaml)$", other.read_text("utf-8"), re.M)}
    for span in spans(page):
        if FILE.fullmatch(span) and span not in own and "NAME" not in span:
            assert (ROOT / span).exists() or (page.parent / span).exists(), span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_symbols_exist(page: Path) -> None:
    for span in spans(page):
        if SYMBOL.fullmatch(span) and span not in keys() and not (ROOT / span).exists():
            assert _resolves(span), span


def _resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES or not all(part.isidentifier() for part in parts):
        return False
    for count in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:count])
        if module.with_suffix(".py").exists() or (module / "__init__.py").exists():
            found: object = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
                    return False
                found = getattr(found, part, None)
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_messages_of_the_guide_are_those_of_the_code() -> None:
    section = prose(ROOT / "docs/guide.md").partition("## When something is wrong")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for piece in filter(None, (piece.strip() for piece in message.split("…"))):
            assert any(piece in text for text in literals()), piece


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_json_and_yaml_parse(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("trace", "validate"):
                check_command([ast.literal_eval(argument) for argument in node.args], complete=False)
    for block in blocks(page, "json"):
        for line in block.text.splitlines():
            assert {"query_id", "prompt", "completion"} <= json.loads(line).keys()
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block.text)
