"""`validation.html`: one file without scripts, in the look of the report; tables, plots, and what each number means."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pipelines.comparing.page import text
from pipelines.report.rendering import style_text
from pipelines.validation.presentation.markdown import called
from pipelines.validation.presentation.sections import headline, sections
from pipelines.validation.presentation.tables import Column, Document, Section, written

BROAD = 7.0  # inches, above which a plot gets a row of its own


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: Of its file, without an ending.
        caption: What it shows.
        svg: The file.
        width: In inches.
    """

    name: str
    caption: str
    svg: bytes
    width: float


def write_page(path: Path, document: Document, pictures: Sequence[Picture]) -> None:
    """Write the page.

    Args:
        path: The file.
        document: The content of `validation.json`.
        pictures: The plots, which are shown in the sections that name them.
    """
    shown = sections(document)
    warned = [(section.name, warning) for section in shown for warning in section.warnings]
    parts = [_hero(document), _warnings(document, warned), _contents(shown), _facts(document)]
    parts += [page_section(section, pictures) for section in shown]
    parts.append(_how(document))
    path.write_text(whole(f"Validation: {called(document)}", parts), encoding="utf-8", errors="replace")


def whole(title: str, parts: Sequence[str]) -> str:
    """A page around its parts: no script, no request, the style by its hash."""
    own = resources.files("pipelines.validation.presentation").joinpath("page.css").read_text(encoding="utf-8")
    style = f"{style_text()}\n{own}"
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _hero(document: Document) -> str:
    lines = "".join(f'<p class="lead">{text(line)}</p>' for line in headline(document))
    return f'<div class="hero"><h1>Validation: {text(called(document))}</h1>{lines}</div>'


def _warnings(document: Document, warned: Sequence[tuple[str, str]]) -> str:
    own = [("model", warning) for warning in document["studies"]["model"]["warnings"]]
    items = "".join(f'<li>{text(warning)} <a href="#{name}">there</a></li>' for name, warning in [*warned, *own])
    if not items:
        return ""
    return f'<div class="notice failed"><b>Mind these before the numbers:</b><ul>{items}</ul></div>'


def _contents(shown: Sequence[Section]) -> str:
    items = "".join(f'<li><a href="#{section.name}">{text(section.title)}</a></li>' for section in shown)
    return f'<nav class="contents"><ul>{items}</ul></nav>'


def _facts(document: Document) -> str:
    facts = document["studies"]["model"]["facts"]
    entries = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    return f'<h2 id="model">The model</h2><dl class="facts">{entries}</dl>'


def page_section(section: Section | None, pictures: Sequence[Picture]) -> str:
    """A section with those of the pictures that belong to it; or pictures that belong to none."""
    wanted = [picture.name for picture in pictures] if section is None else section.figures
    mine = [picture for name in wanted for picture in pictures if picture.name == name]
    figures = f'<div class="plots">{"".join(map(figure, mine))}</div>' if mine else ""
    if section is None:
        return figures and f"<h2>More plots</h2>{figures}"
    warned = "".join(f'<p class="notice failed">{text(warning)}</p>' for warning in section.warnings)
    about = "".join(f'<p class="note">{text(paragraph)}</p>' for paragraph in section.about)
    return f'<h2 id="{section.name}">{text(section.title)}</h2>{warned}{table(section)}{about}{figures}'


def table(section: Section) -> str:
    """The section's table."""
    head = "".join(
        f"<th{' class=numeric' if column.numeric else ''}>{text(column.title)}</th>" for column in section.columns
    )
    body = "".join(
        f"<tr>{''.join(_cell(column, row.get(column.key)) for column in section.columns)}</tr>" for row in section.rows
    )
    return f'<div class="wide"><table class="found"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(column: Column, value: object) -> str:
    shown = written(column, value)
    if not column.numeric:
        return f"<td>{text(shown)}</td>"
    mean, bracket, interval = shown.partition(" [")
    ends = f" <small>[{text(interval)}</small>" if bracket else ""
    return f'<td class="numeric">{text(mean)}{ends}</td>'


def figure(picture: Picture) -> str:
    """A picture as data: nothing in it can run, and its ids are its own."""
    data = base64.b64encode(picture.svg).decode("ascii")
    broad = ' class="broad"' if picture.width > BROAD else ""
    return (
        f'<figure{broad}><img alt="{text(picture.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
    )


def _how(document: Document) -> str:
    """Where the numbers come from: settings, machine, time of each step."""
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{'from the store' if stage['cached'] else 'computed'}</td>"
        f'<td class="numeric">{text(written(Column("", "", "seconds"), stage["seconds"]))}</td></tr>'
        for name, stage in document["stages"].items()
    )
    settings = "".join(
        f"<dt>validation.{text(key)}</dt><dd>{text(value)}</dd>"
        for key, value in document["config"]["validation"].items()
    )
    hardware, versions = document["hardware"], document["versions"]
    machine = f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 1e9:.0f} GB"
    graphics = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ", no GPU"
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "ray", "whence") if name in versions
    )
    return (
        f'<h2 id="how">How it was run</h2><p class="note">{text(document["date"])}; {text(machine + graphics)}; '
        f"{text(software)}. The seconds of a step are those of the attempt that finished it.</p>"
        f'<div class="columns"><div class="wide"><table class="found"><thead><tr><th>step</th><th></th>'
        f"<th class=numeric>time</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<details><summary>Settings</summary><dl class="facts">{settings}</dl></details></div>'
    )
