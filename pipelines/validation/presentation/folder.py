"""The files of a validation's folder that are made from its document: tables, plots, text and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.export import PLOTS, TABLES, write_csv
from pipelines.plots import save
from pipelines.validation.presentation.figures import PAIRS, figures
from pipelines.validation.presentation.markdown import markdown
from pipelines.validation.presentation.page import Picture, write_page
from pipelines.validation.presentation.sections import sections
from pipelines.validation.presentation.tables import Document, flat


def write_folder(folder: Path, document: Document) -> None:
    """Write `tables/*.csv`, `plots/*.svg` and `*.png`, `validation.md` and `validation.html`.

    Args:
        folder: Of the run; `pairs.parquet` is there if responses were measured.
        document: The content of `validation.json`.
    """
    clear(folder)
    for section in sections(document):
        write_csv(folder / TABLES / f"{section.name}.csv", *flat(section))
    pictures = draw(folder, [document], folder / PAIRS)
    paths = {picture.name: f"{PLOTS}/{picture.name}.svg" for picture in pictures}
    (folder / "validation.md").write_text(markdown(document, paths), encoding="utf-8", errors="replace")
    write_page(folder / "validation.html", document, pictures)


def clear(folder: Path) -> None:
    """Make the folders of tables and plots; what an earlier run left in them goes."""
    for name, endings in ((TABLES, ("csv",)), (PLOTS, ("svg", "png"))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stale in [file for ending in endings for file in (folder / name).glob(f"*.{ending}")]:
            stale.unlink()


def draw(folder: Path, documents: Sequence[Document], pairs: Path | None = None) -> list[Picture]:
    """Write the plots of one run or of several together, as SVG and PNG."""
    drawn = []
    for name, caption, figure in figures(documents, pairs):
        vector, _ = save(figure, folder / PLOTS, name)
        drawn.append(Picture(name, caption, vector.read_bytes(), figure.get_figwidth()))
    return drawn
