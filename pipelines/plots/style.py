"""One look for all plots, and what makes text from a corpus safe to draw.

Text is drawn as it is: no `$...$` becomes mathematics, no control character reaches a file. An SVG keeps text as text,
so its viewer finds glyphs for any script; in a PNG a character that no font here has becomes a box.

The same data gives the same bytes, with the same matplotlib and fonts: no date, ids from a fixed salt.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

POSITIVE, NEGATIVE = "#b8321f", "#00798c"  # red and teal: influence that raises f, and that lowers it
INK, SOFT, LINE = "#1f2328", "#6b7280", "#d0d7de"
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#9a6324")
DASHES = ("-", "--", ":", "-.")  # with the colours they tell 32 lines apart
SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#004b57", NEGATIVE, "#8fc7cf", "#ffffff", "#eba99f", POSITIVE, "#6e170b"], N=257
)
DPI = 160
FALLBACKS = (  # fonts with Chinese, Japanese and Korean glyphs, where one of them is installed
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)
MISSING, ODD = "\u25a1", "\ufffd"
_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.cache
def families() -> tuple[str, ...]:
    """Fonts in the order in which a glyph is looked for."""
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that these fonts have a glyph for."""
    paths = [font_manager.findfont(name) for name in families()]
    return frozenset(code for path in paths for code in font_manager.get_font(path).get_charmap())


def rc() -> AbstractContextManager[None]:
    """The style, while a figure is made or written; the user's own settings are back afterwards."""
    return matplotlib.rc_context(
        {
            "text.parse_math": False,
            "text.usetex": False,
            "text.color": INK,
            "font.family": [*families(), "sans-serif"],
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.labelcolor": INK,
            "axes.edgecolor": SOFT,
            "axes.linewidth": 0.7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.unicode_minus": True,
            "axes.formatter.use_mathtext": False,
            "grid.color": LINE,
            "grid.linewidth": 0.5,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "lines.linewidth": 1.4,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "svg.fonttype": "none",
            "svg.hashsalt": "whence",
            "path.simplify": True,
        }
    )


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function that draws in this style."""

    @functools.wraps(draw)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with rc():
            return draw(*args, **kwargs)

    return run


def safe(text: object, most: int | None = None) -> str:
    """Text on one line without what could change its surroundings: controls, marks of direction, half surrogates.

    Args:
        text: Anything; white space becomes single spaces.
        most: Characters, of which the last is an ellipsis where there were more.
    """
    line = re.sub(r"\s+", " ", str(text)).strip()
    kept = "".join(_harmless(char) for char in (line if most is None else line[: 4 * most]))
    return kept if most is None or len(kept) <= most else kept[: most - 1].rstrip() + "…"


def _harmless(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":  # marks of direction, joiners, soft hyphens
        return ""
    return ODD if category in ("Cc", "Cs", "Cn", "Co", "Zl", "Zp") else char


def visible(text: str) -> str:
    """The text with a box for each character that no font here has."""
    return "".join(char if ord(char) in _glyphs() or char == "\n" else MISSING for char in text)


def slug(text: str) -> str:
    """A file name for any text: letters, digits and dashes; with a digest where that lost something."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48]
    if plain and plain == text:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}-{digest}" if plain else digest


def panels(count: int, columns: int, width: float, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, each of this size in inches, and those of them that are used."""
    across = max(1, min(columns, count))
    down = max(1, math.ceil(count / across))
    figure = Figure(figsize=(across * width, down * height), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def legend(place: Axes | Figure, handles: Sequence, names: Sequence[str], **where: object) -> None:
    """A legend whose names are taken as they are: matplotlib hides those that begin with an underscore."""
    drawn = place.legend(list(handles), [f"entry {number}" for number in range(len(names))], **where)  # type: ignore[arg-type]
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_text(safe(name, 48))


def number(value: float) -> str:
    """A number for a tick: plain where that is short, else with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}".replace("-", "\u2212")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = f"{value / 10**exponent:.3g}".replace("-", "\u2212")
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"


def powers(axis: Axis, low: float, high: float, most: int = 5) -> None:
    """Ticks of a logarithmic axis over this range, without mathematical markup."""
    wide = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `NAME.svg` and `NAME.png` into a folder.

    Args:
        figure: Of one of the functions here. Its text is changed: glyphs that the PNG lacks.
        folder: It is there.
        name: Without an ending; see `slug`.
    """
    vector, raster = folder / f"{name}.svg", folder / f"{name}.png"
    with rc(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # whoever shows the SVG has other fonts
        figure.savefig(vector, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))  # type: ignore[attr-defined]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_locator(), FixedLocator):  # names at ticks, which are made anew by drawing
                names = axis.get_major_formatter().format_ticks(list(axis.get_majorticklocs()))
                axis.set_major_formatter(FixedFormatter([visible(name) for name in names]))
    with rc():
        figure.savefig(raster, format="png", dpi=DPI, metadata={"Software": None})
    return [vector, raster]
