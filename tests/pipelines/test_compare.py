"""`whence compare`: numbers against numpy and scipy, however files are cut; what is refused, and how it looks."""

from __future__ import annotations

import csv
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import pearsonr, spearmanr

from actors.errors import ConfigError, WhenceError
from actors.store import Store
from pipelines.command import main
from pipelines.comparing import scores as streaming
from pipelines.comparing.agreement import Comparison, compare
from pipelines.comparing.matching import Matching
from pipelines.comparing.output import render, write
from pipelines.comparing.runs import differences, load, shared_queries
from pipelines.comparing.scores import Batch, Moments, chosen, side_by_side
from tests.pipelines.finished import HOSTILE, finished_run

RNG = np.random.default_rng(11)
ALL = np.arange(1200)
TRUE_NQ = RNG.standard_t(2.5, (len(ALL), 3))
NAMES = ("one", "two", "three")


def noisy(amount: float, seed: int) -> np.ndarray:
    return (TRUE_NQ + amount * np.random.default_rng(seed).normal(size=TRUE_NQ.shape)).astype(np.float32)


def scanned(seed: int, share: float = 0.8) -> np.ndarray:
    return np.flatnonzero(np.random.default_rng(seed).random(len(ALL)) < share)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three runs that scanned different sequences, whose queries are in different orders."""
    first, second, third = scanned(1), scanned(2), scanned(3, 0.3)
    return [
        finished_run(tmp_path / "a", first, noisy(0.1, 1)[first], NAMES, shards=4, settings={"queries": {"rank": "8"}}),
        finished_run(tmp_path / "b", second, noisy(0.5, 2)[second][:, [2, 0, 1]], ("three", "one", "two"), shards=9),
        finished_run(tmp_path / "c", third, noisy(0.9, 3)[third], NAMES, shards=2, text=HOSTILE),
    ]


def compared(folders: list[Path], most: int = 10**6, seed: int = 0) -> Comparison:
    return compare(load(folders), most, seed)


def expected(first: int, second: int, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that two of the three runs have in common."""
    ids = [scanned(1), scanned(2), scanned(3, 0.3)]
    values = [noisy(0.1, 1), noisy(0.5, 2), noisy(0.9, 3)]
    both = np.intersect1d(ids[first], ids[second])
    return values[first][both, query], values[second][both, query]


@pytest.mark.parametrize("numbers", [3, 30, 1 << 22])
def test_correlations_are_those_of_numpy_and_scipy(folders: list[Path], numbers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "BATCH_NUMBERS", numbers)
    found = compared(folders)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair, (column, query) in itertools.product(found.pairs, enumerate(NAMES)):
        x, y = expected(pair.first, pair.second, column)
        assert pair.common == pair.ranked == len(x)
        assert pair.queries[query].pearson == pytest.approx(
            pearsonr(x.astype(float), y.astype(float)).statistic, abs=1e-10
        )
        assert pair.queries[query].spearman == pytest.approx(spearmanr(x, y).statistic, abs=1e-10)


def test_overlap_is_of_the_first_of_each_run(folders: list[Path]):
    found = compared(folders)
    ids, values = [scanned(1), scanned(2)], [noisy(0.1, 1), noisy(0.5, 2)]
    for depth in (10, 100):
        tops = [
            set(of[np.argsort(-given[of, 1], kind="stable")][:depth]) for of, given in zip(ids, values, strict=True)
        ]
        assert found.pairs[0].queries["two"].overlap[depth] == len(tops[0] & tops[1]) / depth


def test_a_run_agrees_with_its_copy(tmp_path: Path):
    ids = scanned(4)
    folders = [
        finished_run(tmp_path / name, ids, noisy(0.1, 4)[ids], NAMES, shards=n) for name, n in (("a", 2), ("b", 7))
    ]
    pair = compared(folders).pairs[0]
    for agreement in pair.queries.values():
        assert agreement.values() == pytest.approx({"top10": 1, "top100": 1, "spearman": 1, "pearson": 1})


def test_of_many_sequences_ranks_are_of_a_sample_and_the_rest_is_exact(folders: list[Path]):
    whole, some = compared(folders), compared(folders, most=300, seed=5)
    pair = some.pairs[0]
    assert some.share == pytest.approx(300 / len(scanned(1)), rel=0.05)
    assert 0.5 < pair.ranked / (some.share * pair.common) < 1.5
    assert pair.common == whole.pairs[0].common
    assert pair.queries["one"].pearson == pytest.approx(whole.pairs[0].queries["one"].pearson, abs=1e-12)
    x, y = (noisy(amount, seed) for amount, seed in ((0.1, 1), (0.5, 2)))
    both = np.intersect1d(scanned(1), scanned(2))
    both = both[chosen(both, some.share, 5)]
    assert pair.ranked == len(both)
    assert pair.queries["one"].spearman == pytest.approx(spearmanr(x[both, 0], y[both, 0]).statistic)
    best = both[:0].tolist() + scanned(1)[np.argsort(-x[scanned(1), 0])[:10]].tolist()
    assert set(best) & set(scanned(2)) <= set(some.samples[0].ids_N.tolist())  # for the plot, sampled or not


def test_samples_are_random_and_the_same_everywhere():
    ids = np.arange(200_000)
    first, second = chosen(ids, 0.1, 0), chosen(ids, 0.1, 1)
    assert first.sum() == pytest.approx(20_000, rel=0.03)
    assert (first & second).sum() == pytest.approx(2_000, rel=0.1)
    np.testing.assert_array_equal(chosen(ids[::7], 0.1, 0), first[::7])
    assert chosen(ids, 1.0, 0).all()
    runs_of_same = np.flatnonzero(np.diff(first.astype(int)) != 0)
    assert len(runs_of_same) == pytest.approx(2 * 0.1 * 0.9 * len(ids), rel=0.05)  # as independent draws would


def test_every_sequence_of_two_runs_meets_itself():
    rng = np.random.default_rng(0)
    ids = [np.flatnonzero(rng.random(500) < share) for share in (0.9, 0.2, 0.6)]

    def stream(of: np.ndarray, size: int):
        yield Batch(of[:0], np.empty((0, 1)))
        for start in range(0, len(of), size):
            yield Batch(of[start : start + size], of[start : start + size, None].astype(float))

    met = [np.empty(0, int)] * 3
    pairs = dict.fromkeys(itertools.combinations(range(3), 2), 0)
    for window in side_by_side([stream(of, size) for of, size in zip(ids, (7, 50, 13), strict=True)], 1):
        met = [np.concatenate([old, batch.ids_N]) for old, batch in zip(met, window, strict=True)]
        for first, second in pairs:
            pairs[first, second] += len(np.intersect1d(window[first].ids_N, window[second].ids_N))
    for (first, second), count in pairs.items():
        assert count == len(np.intersect1d(ids[first], ids[second]))
    for of, seen in zip(ids, met, strict=True):
        np.testing.assert_array_equal(seen, of[: len(seen)])


def test_moments_merge_without_losing_digits_to_a_large_mean():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5000, 2)) + 1e6, rng.normal(size=(5000, 2)) - 1e6
    y += 0.5 * x
    parts = [Moments.of(x[rows], y[rows]) for rows in np.array_split(np.arange(5000), 37)]
    merged = Moments.of(x[:0], y[:0])
    for part in parts:
        merged = merged.merge(part)
    expected_Q = [np.corrcoef(x[:, q], y[:, q])[0, 1] for q in range(2)]
    np.testing.assert_allclose(merged.pearson(), expected_Q, rtol=1e-9)
    assert merged.count == 5000
    assert np.isnan(Moments.of(np.ones((4, 1)), x[:4, :1]).pearson()).all()


def test_undefined_measures_are_none(tmp_path: Path):
    constant = np.zeros((50, 1), np.float32)
    a = finished_run(tmp_path / "a", ALL[:50], constant, ("one",), top=5)
    b = finished_run(tmp_path / "b", ALL[:50], noisy(0.1, 1)[:50, :1], ("one",))
    found = compared([a, b])
    values = found.pairs[0].queries["one"].values()
    assert values == {"top10": None, "top100": None, "spearman": None, "pearson": None}
    write(found, tmp_path / "out", 5)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["pairs"][0]["mean"]["pearson"] is None


# Queries and settings


def test_queries_that_are_not_the_same_are_left_out_with_the_reason(tmp_path: Path):
    a = finished_run(tmp_path / "a", ALL, noisy(0, 1), NAMES)
    b = finished_run(tmp_path / "b", ALL, noisy(0, 1), ("one", "two", "four"))
    summary = json.loads((b / "summary.json").read_text())
    summary["queries"][1]["prompt"] = "another prompt"
    (b / "summary.json").write_text(json.dumps(summary))
    shared = shared_queries(load([a, b]))
    assert shared.ids == ["one"]
    assert shared.left_out == {
        "two": "worded differently, though its query_id is the same",
        "three": "not in B",
        "four": "not in A",
    }
    assert "two (worded differently" in render(compared([a, b]))


def test_settings_that_differ_are_shown_those_that_matter_first(folders: list[Path]):
    assert differences(load(folders)) == {"queries.rank": ["8", "32", "32"]}
    changed = json.loads((folders[2] / "summary.json").read_text())
    changed["config"]["cluster"]["max_replicas"] = 3
    changed["config"]["scan"]["top"] = 7
    (folders[2] / "summary.json").write_text(json.dumps(changed))
    keys = list(differences(load(folders)))
    assert keys.index("scan.top") < keys.index("cluster.max_replicas")


# Which sequences are the same


def identity(**changes: Any) -> dict[str, Any]:
    corpus = {"digest": "d", "format": "auto", "text_field": "text", "pack": True, "sequence_length": 64}
    tokeniser = {"digest": "t", "add_bos": True, "add_eos": True, "vocabulary": 100, "context": 64}
    corpus |= {key: value for key, value in changes.items() if key in (*corpus, "id_field", "limit")}
    tokeniser |= changes.get("tokeniser", {})
    return {"version": 1, "corpus": corpus, "tokeniser": tokeniser}


def two_corpora(tmp_path: Path, first: dict, second: dict, count: int = len(ALL)) -> list[Path]:
    found = []
    for name, given, total in (("a", first, len(ALL)), ("b", second, count)):
        corpus = {"sequences": total, "tokens": 9, "documents": 4, "skipped": {}, "identity": given}
        folder = finished_run(
            tmp_path / name, ALL, noisy(0, 1), NAMES, sequences=f"/store/sequences/{name}", corpus=corpus
        )
        found.append(folder)
    return found


def test_models_with_other_limits_number_sequences_alike(tmp_path: Path):
    folders = two_corpora(tmp_path, identity(), identity(tokeniser={"vocabulary": 200, "context": 4096}))
    found = compared(folders)
    assert found.how is Matching.sequence
    assert found.pairs[0].common == len(ALL)


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({"digest": "other"}, len(ALL), "holds other documents"),
        ({"text_field": "body"}, len(ALL), "read with another text_field"),
        ({"tokeniser": {"digest": "other"}}, len(ALL), "cut into other sequences"),
        ({"sequence_length": 32}, len(ALL), "cut into other sequences"),
        ({"tokeniser": {"vocabulary": 50}}, 7, "cut into other sequences"),  # which left documents out
    ],
)
def test_sequences_that_are_not_the_same_are_refused(tmp_path: Path, changes: dict, count: int, message: str):
    folders = two_corpora(tmp_path, identity(), identity(**changes), count)
    with pytest.raises(ConfigError, match=message) as error:
        compared(folders)
    assert str(tmp_path) in str(error.value)
    assert "Remedy:" in str(error.value)


def test_a_store_out_of_reach_is_said(tmp_path: Path):
    a = finished_run(tmp_path / "a", ALL, noisy(0, 1), NAMES, sequences=f"{tmp_path}/gone/sequences/aaaa")
    b = finished_run(tmp_path / "b", ALL, noisy(0, 1), NAMES, sequences=f"{tmp_path}/gone/sequences/bbbb")
    with pytest.raises(ConfigError, match=r"gone/sequences/aaaa.* cannot be read"):
        compared([a, b])


def cut_corpus(store: Store, name: str, lengths: list[tuple[str, int]]) -> tuple[str, np.ndarray, list[str], list[int]]:
    """A tokenised corpus in the store: so many sequences of each document."""
    rows = [(document, 64 * part) for document, parts in lengths for part in range(parts)]
    documents, offsets = [row[0] for row in rows], [row[1] for row in rows]
    artifact = store.folder("sequences", name * 64)
    half = len(rows) // 2
    shards = []
    for number, part in enumerate((slice(0, half), slice(half, None))):
        ids = np.arange(len(rows))[part]
        table = pa.table(
            {"sequence_id": ids, "document_id": documents[part], "offset": pa.array(offsets[part], pa.int64())}
        )
        artifact.write_table(f"shard-{number:05d}.parquet", table)
        shards.append({"name": f"shard-{number:05d}.parquet", "first_sequence_id": int(ids[0]), "rows": len(ids)})
    artifact.write_json("index.json", {"shards": shards})
    artifact.commit(identity(pack=False, tokeniser={"digest": name}), {}, {}, 0.0)
    return artifact.uri, np.arange(len(rows)), documents, offsets


def test_other_tokens_are_matched_by_the_beginnings_of_documents(tmp_path: Path):
    store, rng = Store(str(tmp_path / "store")), np.random.default_rng(2)
    names = [f"d{n}" for n in range(300)]
    by_document = {name: rng.standard_t(3) for name in names}
    folders, starts = [], []
    for run, most in (("a", 3), ("b", 2)):
        lengths = [(name, int(rng.integers(1, most + 1))) for name in names if name == "d0" or rng.random() < 0.9]
        lengths += [("d0", 1)] * (run == "a")  # an id that two documents have
        uri, ids, documents, offsets = cut_corpus(store, run, lengths)
        values = np.array([by_document[name] + rng.normal() for name in documents], np.float32)[:, None]
        folders.append(finished_run(tmp_path / run, ids, values, ("one",), sequences=uri, documents=documents))
        starts.append({name: float(values[n, 0]) for n, name in enumerate(documents) if offsets[n] == 0})
    found = compared(folders)
    assert found.how is Matching.document
    both = [name for name in starts[0] if name in starts[1] and name != "d0"]
    pair = found.pairs[0]
    x, y = ([of[name] for name in both] for of in starts)
    assert pair.common == len(both)
    assert pair.queries["one"].spearman == pytest.approx(spearmanr(x, y).statistic)
    assert pair.queries["one"].pearson == pytest.approx(pearsonr(x, y).statistic)
    assert "beginning of the same document" in render(found)
    few = compared(folders, most=100)
    assert few.pairs[0].common < 60


# What is refused


def test_refusals_name_the_folder_and_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture):
    ids = ALL[:50]
    good = finished_run(tmp_path / "sweep" / "good", ids, noisy(0, 1)[:50], NAMES)
    assert main(["compare", str(good)]) == 2
    assert "there is one run only" in capsys.readouterr().err
    assert main(["compare", str(good), str(good / ".." / "good")]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["compare", str(good), str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere: there is no such folder" in capsys.readouterr().err
    assert main(["compare", str(good), str(tmp_path / "sweep")]) == 2
    assert f"{good} is one" in capsys.readouterr().err
    other = finished_run(tmp_path / "other", ids, noisy(0, 1)[:50], ("x", "y", "z"))
    assert main(["compare", str(good), str(other)]) == 2
    assert "no query is in all of these runs" in capsys.readouterr().err
    for file in (other / "scores").iterdir():
        file.unlink()
    assert main(["compare", str(good), str(other)]) == 2
    assert f"{other}/scores: this run's folder has no scores" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(good), str(other), "--sample", "0"])
    assert ended.value.code == 2
    assert "--sample" in capsys.readouterr().err


def test_damaged_scores_are_named(folders: list[Path], tmp_path: Path):
    file = folders[1] / "scores" / "shard-000001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(WhenceError, match=r"b/scores/shard-000001\.parquet"):
        compared(folders)


def test_scores_that_do_not_ascend_are_refused(folders: list[Path]):
    first, second = (folders[0] / "scores" / f"shard-00000{n}.parquet" for n in (0, 1))
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)
    with pytest.raises(WhenceError, match="do not ascend"):
        compared(folders)


def test_help_is_its_own(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: whence compare" in out
    assert "--sample" in out
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


# What it leaves


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_prints_a_table_and_leaves_a_folder(folders: list[Path], tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--out", str(out), "--sequences", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(str(out / "compare.html"))
    assert "A B   mean of 3" in shown
    record = json.loads((out / "compare.json").read_text())
    assert [run["label"] for run in record["runs"]] == ["A", "B", "C"]
    assert record["differences"] == {"queries.rank": {"A": "8", "B": "32", "C": "32"}}
    assert record["pairs"][0]["queries"]["one"] == compared(folders).pairs[0].queries["one"].values()
    with (out / "tables" / "agreement.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert float(rows[0]["spearman"]) == record["pairs"][0]["queries"]["one"]["spearman"]
    names = {path.name for path in (out / "plots").iterdir()}
    assert {"pearson.svg", "spearman.png", "scatter-A-B.svg", "scatter-A-C.svg", "scatter-B-C.png"} <= names
    with (out / "tables" / "sequences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["rank_in_A"] == "1"
    assert all(row["rank_in_B"] == row["rank"] for row in rows if row["run"] == "B")


def test_the_page_is_inert_and_shows_what_is_side_by_side(folders: list[Path], tmp_path: Path):
    write(compared(folders), tmp_path / "out", 3)
    page = Page()
    page.feed((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert not {"script", "iframe", "object", "embed", "form", "link"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert sources
    assert all(value.startswith("data:image/svg+xml;base64,") for value in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "<script>alert(1)</script>" in page.text
    assert "中文 😀" in page.text
    assert not [char for char in page.text if (char < " " and char not in "\n\t") or char == "\x7f"]
    ids = scanned(1)
    assert f"sequence {ids[np.argmax(noisy(0.1, 1)[ids, 0])]}" in page.text


def test_of_many_runs_scatter_plots_are_with_the_reference(tmp_path: Path):
    runs = [finished_run(tmp_path / name, ALL, noisy(0.1, n), NAMES) for n, name in enumerate("abcd")]
    write(compared(runs), tmp_path / "out", 2)
    drawn = sorted(path.stem for path in (tmp_path / "out" / "plots").glob("scatter-*.svg"))
    assert drawn == ["scatter-A-B", "scatter-A-C", "scatter-A-D"]
