"""Plots: what is drawn is the data, whatever its names are; the same bytes each time; colours that people can tell."""

from __future__ import annotations

import functools
import itertools
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from pipelines.plots import (
    Cloud,
    Curve,
    LayerShares,
    PowerLaw,
    Tail,
    TokenMap,
    correlations,
    grouped_bars,
    influence_share,
    layer_shares,
    safe,
    save,
    scatter,
    slug,
    survival,
    token_map,
)
from pipelines.plots.style import CATEGORIES, NEGATIVE, POSITIVE, SIGNED, number, visible
from pipelines.plots.tails import FEEDS

NAMES = (
    "plain",
    "$x^{2$ costs $5",
    "<script>alert('&')</script>",
    "\x00\x1b[31m\r\n",
    "right \u202eto left\u2066",
    "half \ud83d of a pair",
    "中文查询",
    "_hidden",
    "",
    "%s {0} \\frac",
    "long " * 80,
)


Written = Callable[[str], tuple[Path, Path]]


def normal(size, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def curve(seed: int = 0, alpha: float = 2.5) -> Curve:
    values = np.sort((1 - np.random.default_rng(seed).random(500)) ** (-1 / (alpha - 1)))[::-1]
    return Curve(values.tolist(), (np.arange(1, 501) / 500).tolist())


def tails(names=NAMES) -> Figure:
    return survival(
        [Tail(name, {"unfiltered": curve(), "bm25": curve(1)}, PowerLaw(2.5, 2.0, 0.3), name) for name in names]
    )


def tokens(name: str) -> Figure:
    pieces = list(itertools.islice(itertools.cycle(NAMES), 30))
    return token_map(TokenMap(name, pieces, ["block 0", name], normal((30, 2))))


def all_layers(names=NAMES) -> Figure:
    groups = [f"block {n}" for n in range(5)]
    return layer_shares(
        [LayerShares(name, groups, [0.4, 0.5, -0.1, 0.1, 0.1], [0] * 5, [0.6] * 5) for name in names], 50
    )


DRAWN: dict[str, Callable[[], Figure]] = {
    "survival": tails,
    "share": lambda: influence_share({name: [(0.01, 0.1), (1, 0.4), (100, 1.0)] for name in NAMES}),
    "layers": all_layers,
    "groups": lambda: layer_shares([LayerShares("q", NAMES, [1 / 11] * 11, [0] * 11, [0.2] * 11)], 50),
    "tokens": lambda: tokens(" ".join(NAMES)),
    "bars": lambda: grouped_bars(
        {a: dict.fromkeys(NAMES, (1.0, None)) for a in NAMES[:3]}, title=NAMES[1], label=NAMES[2]
    ),
    "scatter": lambda: scatter([Cloud(n, normal(50), normal(50, 1), n) for n in NAMES], *NAMES[1:3], diagonal=True),
    "correlations": lambda: correlations(
        NAMES[:4], {n: [0.5, None, 0.2, 0.9] for n in NAMES}, label=NAMES[6], limit=1.0
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """SVG and PNG of a plot, drawn once, with every warning an error."""
    folder = tmp_path_factory.mktemp("plots")

    @functools.cache
    def draw(name: str) -> tuple[Path, Path]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vector, raster = save(DRAWN[name](), folder, name)
        return vector, raster

    return draw


@pytest.mark.parametrize("name", DRAWN)
def test_names_from_elsewhere_are_text_and_nothing_else(name: str, written: Written):
    vector, raster = written(name)
    root = ElementTree.parse(vector).getroot()
    assert not [element for element in root.iter() if element.tag.endswith(("script", "foreignObject"))]
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert all(link.startswith(("#", "data:image/png")) for link in links)
    shown = "".join(root.itertext())
    assert not [char for char in shown if (char < " " and char != "\n") or "\u202a" <= char <= "\u2069"]
    assert raster.read_bytes().startswith(b"\x89PNG")
    assert imread(raster).std() > 0.01


@pytest.mark.parametrize("name", ["survival", "share", "layers", "bars", "scatter"])
def test_an_svg_has_the_names_as_they_are(name: str, written: Written):
    shown = "".join(ElementTree.parse(written(name)[0]).getroot().itertext())
    for part in ("$x^{2$ costs $5", "<script>alert('&')", "中文查询", "_hidden", "half \ufffd of a pair"):
        assert part in shown


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_data_gives_the_same_bytes(name: str, written: Written, tmp_path: Path):
    first = [path.read_bytes() for path in written(name)]
    assert [path.read_bytes() for path in save(DRAWN[name](), tmp_path, name)] == first
    assert b"dc:date" not in first[0]


def test_the_users_settings_stay():
    matplotlib.rcParams["font.size"] = 31
    try:
        before = dict(matplotlib.rcParams)
        tails(("one",))
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()


def test_survival_shows_the_points_and_a_line_of_the_laws_slope():
    one, two = curve(0), curve(1)
    figure = survival([Tail("q", {"unfiltered": one, "bm25": two}, PowerLaw(2.5, 2.0, 0.3))])
    points, others, line = figure.axes[0].lines
    np.testing.assert_allclose(points.get_xydata(), np.column_stack([one.influences, one.survivals]))
    np.testing.assert_allclose(others.get_xydata(), np.column_stack([two.influences, two.survivals]))
    x, y = line.get_xydata().T
    assert (x[0], y[0]) == pytest.approx((2.0, 0.3))
    np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(np.log(x)), 1 - 2.5)
    assert x[-1] == pytest.approx(max(one.influences))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_a_query_without_positive_influence_says_so(tmp_path: Path):
    figure = survival([Tail("q", {"unfiltered": Curve([], [])}, None, "too few")])
    save(figure, tmp_path, "plot")
    assert "no positive influence" in [text.get_text() for text in figure.axes[0].texts]


def test_share_is_in_percent_and_tells_few_queries_apart():
    shares = {f"q{n}": [(0.1, 0.2 + n / 100), (100, 1.0)] for n in range(12)}
    lines = influence_share(shares).axes[0].lines
    np.testing.assert_allclose(lines[3].get_xydata(), [[0.1, 23], [100, 100]])
    looks = {(line.get_color(), line.get_linestyle()) for line in lines[:12]}
    assert len(looks) == 12


def test_layers_have_signed_bars_and_quartiles():
    given = LayerShares("q", ["block 0", "block 1"], [1.25, -0.25], [1.0, -0.5], [1.5, 0.0])
    axes = layer_shares([given], 50).axes[0]
    bars = next(container for container in axes.containers if isinstance(container, BarContainer))
    assert [bar.get_height() for bar in bars] == [125, -25]
    assert [bar.get_facecolor()[:3] for bar in bars] == [to_rgb(POSITIVE), to_rgb(NEGATIVE)]
    segments = axes.collections[0].get_segments()
    np.testing.assert_allclose(segments, [[[0, 100], [0, 150]], [[1, -50], [1, 0]]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]


def test_many_layers_are_not_all_named():
    groups = [f"block {n}" for n in range(64)]
    axes = layer_shares([LayerShares("q", groups, [1 / 64] * 64, [0] * 64, [0.1] * 64)], 50).axes[0]
    assert len(axes.get_xticklabels()) <= 12


def test_a_token_map_is_the_matrix_with_its_sums():
    matrix_TG = np.random.default_rng(3).normal(size=(20, 3)) ** 3
    figure = token_map(TokenMap("title", [f"t{n}" for n in range(20)], ["a", "b", "c"], matrix_TG))
    above, centre, beside = figure.axes[:3]
    image = centre.images[0]
    np.testing.assert_allclose(image.get_array(), matrix_TG.T)
    assert image.norm.vmin == -image.norm.vmax
    assert image.norm.vmax == pytest.approx(np.quantile(np.abs(matrix_TG), 0.995))
    np.testing.assert_allclose([bar.get_height() for bar in above.containers[0]], matrix_TG.sum(1))
    np.testing.assert_allclose([bar.get_width() for bar in beside.containers[0]], matrix_TG.sum(0))
    strongest = f"t{np.argmax(np.abs(matrix_TG.sum(1)))}"
    assert strongest in [text.get_text() for text in above.texts]
    np.testing.assert_allclose(SIGNED(0.5)[:3], (1, 1, 1))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (512, 96)])
def test_token_maps_of_any_size_are_drawn(shape: tuple[int, int], tmp_path: Path):
    save(
        token_map(TokenMap("t", ["x"] * shape[0], [f"block {n}" for n in range(shape[1])], np.zeros(shape))),
        tmp_path,
        "p",
    )


def test_bars_are_values_in_order_with_their_intervals():
    groups = {"first": {"a": (2.0, (1.0, 3.5)), "b": (-1.0, None)}, "second": {"a": (0.5, (0.4, 0.6))}}
    axes = grouped_bars(groups, title="t").axes[0]
    bars = axes.containers[0]
    assert [bar.get_width() for bar in bars] == [2.0, -1.0, 0.5]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
    assert middles == sorted(middles)
    assert axes.yaxis_inverted()
    assert middles[2] - middles[1] > middles[1] - middles[0]  # groups are apart
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "a"]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[1.0, 3.5], [0.4, 0.6]]
    assert {"first", "second"} <= {text.get_text() for text in axes.texts}


def test_a_scatter_is_the_scores_and_marks_the_highest():
    first, second = normal(200), normal(200, 1)
    axes = scatter([Cloud("q", first, second, "r = 0.1")], "a", "b", diagonal=True).axes[0]
    points, best_first, best_second = (collection.get_offsets() for collection in axes.collections)
    np.testing.assert_allclose(points, np.column_stack([first, second]))
    assert sorted(np.asarray(best_first)[:, 0]) == sorted(np.sort(first)[-10:])
    assert sorted(np.asarray(best_second)[:, 1]) == sorted(np.sort(second)[-10:])
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[low, low], [high, high]])
    assert not scatter([Cloud("q", first, second)], "a", "b", diagonal=False).axes[0].lines


def test_correlations_have_a_mean_of_what_is_defined():
    axes = correlations(["B", "C"], {"q": [0.8, None], "r": [0.6, 0.5]}, label="r", limit=1.0).axes[0]
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [0.7, 0.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["B", "C"]


def test_long_names_of_runs_stay_inside_the_figure():
    names = [f"{letter}: solver=ekfac_cg, rank=32, damping factor=0.001" for letter in "BC"]
    label = "Pearson's correlation with A: solver=identity, rank=32, blocks=4"
    figure = correlations(names, {"q": [0.8, 0.7]}, label=label)
    FigureCanvasAgg(figure).draw()
    (axes,), frame = figure.axes, figure.bbox
    for text in (axes.yaxis.label, *axes.get_xticklabels()):
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    first, second = (text.get_window_extent() for text in axes.get_xticklabels())
    assert first.x1 < second.x0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\n\tb", "a b"),
        ("a\x00b", "a\ufffdb"),
        ("\ud83d", "\ufffd"),
        ("a\u202eb\u200fc", "abc"),
        ("\uffff", "\ufffd"),
        ("$a$", "$a$"),
        (12, "12"),
    ],
)
def test_text_is_made_safe(given: object, expected: str):
    assert safe(given) == expected


def test_text_is_cut_with_an_ellipsis():
    assert safe("abcdef", 6) == "abcdef"
    assert safe("abcdefg", 6) == "abcde…"
    assert len(safe("x" * 10_000, 50)) == 50


def test_a_png_has_boxes_for_glyphs_that_no_font_has():
    assert visible("a\U0010fffdb") == "a□b"


@pytest.mark.parametrize("name", [*NAMES, "../../etc/passwd", "CON", "a.b", "A", "a"])
def test_file_names_are_safe(name: str):
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert 0 < len(slug(name)) < 64


def test_file_names_of_different_queries_differ():
    names = [*NAMES, "a b", "a-b", "a_b", "A-B", "capital:A", "capital-A", "x" * 100, "x" * 101]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("a-b") == "a-b"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.25, "0.25"), (1000.0, "1,000"), (-2.0, "−2"), (1e-6, "10⁻⁶"), (3e7, "3·10⁷")]
)
def test_numbers_of_ticks(value: float, text: str):
    assert number(value) == text


# Colours

MACHADO = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}


def lab(colour: str, sight: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    given = np.array(to_rgb(colour))
    linear = np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(MACHADO[sight]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    scaled = xyz / [0.95047, 1.0, 1.08883]
    f = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", MACHADO)
def test_colours_are_told_apart_by_everyone(sight: str):
    def apart(first: str, second: str) -> float:
        return float(np.linalg.norm(lab(first, sight) - lab(second, sight)))

    assert apart(POSITIVE, NEGATIVE) > 25
    assert apart(FEEDS["unfiltered"][0], FEEDS["bm25"][0]) > 25
    assert min(apart(*pair) for pair in itertools.combinations(CATEGORIES, 2)) > 8
