"""Several finished validations in one table and in the same plots: what `whence compare` does with their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from pipelines.comparing.page import text
from pipelines.export import TABLES, write_csv
from pipelines.validation.presentation.figures import labels
from pipelines.validation.presentation.folder import clear, draw
from pipelines.validation.presentation.markdown import titled
from pipelines.validation.presentation.page import page_section, whole
from pipelines.validation.presentation.several import several
from pipelines.validation.presentation.tables import flat

DOCUMENT = "validation.json"


def is_validation(folder: Path) -> bool:
    """Whether a folder is that of a finished validation."""
    return (folder / DOCUMENT).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The document of a finished validation.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    path = folder / DOCUMENT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"it is not the folder of a finished validation ({error})",
            file=str(path),
            remedy="give folders that whence validate wrote, runs/NAME/TIME",
        ) from error
    if not isinstance(found, dict) or "studies" not in found:
        raise ConfigError("it is no record of a validation", file=str(path), remedy="run whence validate again")
    return found


def together(folders: Sequence[Path], out: Path) -> str:
    """Write `compare.html`, `tables/*.csv` and `plots/*` of several validations; returns the tables for a terminal.

    Args:
        folders: of finished validations.
        out: the folder of the results; it is created.

    Raises:
        ConfigError: one of them is not the folder of a finished validation.
    """
    documents = [read(folder) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    shown, pictures = several(documents), draw(out, documents)
    for section in shown:
        write_csv(out / TABLES / f"{section.name}.csv", *flat(section))
    title = f"{len(documents)} validations: {', '.join(labels(documents))}"
    used = {name for section in shown for name in section.figures}
    rest = [picture for picture in pictures if picture.name not in used]
    parts = [f'<div class="hero"><h1>{text(title)}</h1></div>', *(page_section(each, pictures) for each in shown)]
    parts.append(page_section(None, rest))
    (out / "compare.html").write_text(whole(title, parts), encoding="utf-8", errors="replace")
    return "\n\n".join(titled(section) for section in shown)
