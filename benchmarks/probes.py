"""Does word order matter to the influences of small models? Trains two, probes them, fills docs/results/probes.md.

    OMP_NUM_THREADS=1 python -m benchmarks.probes [reversal] [translation] [almanac] [--data ../shared/data]

- reversal: a small Llama reads about sixty people, each described in one order only; 8 kinds of sequences about each.
- translation: a small Llama reads English and Mandarin, one after the other, half of the pairs in either order; the
  most influential documents of held-out pairs, as they are and flipped.
- almanac: the probes of the demo, from the run that `--almanac RUN_DIR` names.

Models, runs and their store are kept in `.whence/probes`; a second call trains nothing. Tables go between the markers
of the page, whose prose is written by hand.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.probe_sets import as_queries, people, person_probe, translation_probe, translations
from conf.keys import PATHS, PROBE_PATHS
from conf.load import compose_config, override_strings
from conf.schema import RunConfig
from pipelines.almanac.results import TRAINED
from pipelines.almanac.train import BOS, EOS, PAD, SPECIAL, UNKNOWN, TrainSpec, completion_accuracy, train_on
from pipelines.almanac.world import Query
from pipelines.fingerprint import fingerprint
from pipelines.probing import ProbeResult, run_probe
from pipelines.probing.measures import median_interval, over_probes
from pipelines.tracing import run_trace

PAGE = Path("docs/results/probes.md")
WORK = Path(".whence/probes")
WORDINGS = (2, 3, 6)  # of the sequences; the queries have wording 1, which no sequence has
PAIRS = 20  # held-out pairs that are asked for, in either order
TOP = 10  # documents of either order that are flipped, for each query
LISTED = 100  # highest documents of which the order is counted, as in the paper
PEOPLE_SPEC = TrainSpec(hidden=128, intermediate=352, context=96, epochs=8, most_epochs=14)
TRANSLATION_SPEC = TrainSpec(context=96, epochs=5, most_epochs=5, accuracy=0.0)


def trained(name: str, texts: Sequence[str], queries: Sequence[Query], spec: TrainSpec, vocabulary: int) -> Path:
    """A folder with a model of these texts and `training.json`, made once."""
    identity = {"texts": list(texts), "spec": asdict(spec), "vocabulary": vocabulary}
    folder = WORK / f"{name}-{fingerprint(identity, {})[:12]}"
    if not (folder / "training.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        found = asdict(train_on(texts, queries, byte_pairs(texts, vocabulary), spec, folder / "model"))
        found["cpu_seconds"] = time.process_time() - started
        (folder / "training.json").write_text(json.dumps(found))
        lines = (json.dumps({"text": text}) for text in texts)
        (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def byte_pairs(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, show_progress=False, special_tokens=list(SPECIAL), initial_alphabet=alphabet
        ),
    )
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def config_of(folder: Path, needs: Sequence[str], **settings: Any) -> RunConfig:
    """The run of a trained model: every document is a sequence, the factors are fitted on all of them."""
    given = {
        "store": str(WORK.absolute() / "store"),
        "model.path": str((folder / "model").absolute()),
        "corpus.path": str((folder / "corpus.jsonl").absolute()),
        "corpus.pack": False,
        "corpus.sequence_length": 96,
        "factors.samples": None,
        "unfiltered": "all",
        "prefilter": "none",
        "cluster.cpus_per_rank": 1,
        "scan.batch_size": 32,
        "attribution.top": 0,
    }
    return compose_config(override_strings(given | settings), needs=needs)


def probed(folder: Path, probes: Sequence[Mapping[str, Any]], **settings: Any) -> ProbeResult:
    """Write the probes and run them."""
    path = (folder / "probes.yaml").absolute()
    path.write_text(yaml.safe_dump(list(probes), allow_unicode=True, sort_keys=False, width=1000), encoding="utf-8")
    given = {"probe.path": str(path), "name": "probe"} | settings
    return run_probe(config_of(folder, PROBE_PATHS, **given), folder / "run")


def reversal(data: Path) -> str:
    """People described in one order only; asked for in that order and in the other."""
    everybody = people(data / "facts/reversal_curse")
    texts = [text for person in everybody for text in person.trained]
    learnt = as_queries([person.sentences[person.learnt][WORDINGS[0] - 1] for person in everybody])
    folder = trained("reversal", texts, learnt, PEOPLE_SPEC, vocabulary=2000)
    rng, probes, kinds = random.Random(0), [], {}
    for person in everybody:
        alike = [other for other in everybody if other.learnt == person.learnt and other is not person]
        for asked in ("name first", "description first"):
            probe = person_probe(person, asked, rng.sample(alike, len(WORDINGS)), WORDINGS)
            probes.append(probe)
            kinds[probe["id"]] = ("as learnt" if asked == person.learnt else "inverted", asked)
    result = probed(folder, probes)
    by_kind = {
        (how, asked): [probe for probe in result.summary["probes"] if kinds[probe["probe_id"]] == (how, asked)]
        for how in ("as learnt", "inverted")
        for asked in ("name first", "description first")
    }
    completed = {kind: _completed(folder, found) for kind, found in by_kind.items()}
    lines = [
        _training_line(folder, f"{len(everybody)} people, {len(texts):,} sentences"),
        f"{len(probes)} probes of {result.rows.num_rows:,} sequences; " + _fidelity_line(result),
        "",
        "| query | log p of the completion, mean | completed greedily |",
        "| --- | ---: | ---: |",
    ]
    for (how, asked), found in by_kind.items():
        measured = np.mean([probe["measured"] for probe in found])
        lines.append(f"| {asked}, {how} | {measured:.2f} | {completed[how, asked]:.0%} of {len(found)} |")
    tables = {f"{asked}, {how}": over_probes(found) for (how, asked), found in by_kind.items()}
    return "\n".join([*lines, "", _partition_table(tables), "", _noise_line(result)])


def translation(data: Path) -> str:
    """English and Mandarin: the highest documents of held-out pairs, as they are and flipped."""
    pairs = translations(data / "parallel/tatoeba_en_zh_8000.tsv")
    fit = [pair for pair in pairs if 4 <= len(pair.english.split()) <= 8]
    held, shown = fit[:PAIRS], [pair for pair in pairs if pair not in fit[:PAIRS]]
    asked = [(pair, first) for first in (True, False) for pair in held]
    told = as_queries([pair.query(first) for pair, first in asked])
    folder = trained("translation", [pair.text() for pair in shown], told, TRANSLATION_SPEC, vocabulary=3000)
    names = [f"{'English' if first else 'Mandarin'} first: {pair.english}" for pair, first in asked]
    rows = (
        {"query_id": name, **dict(zip(("prompt", "completion"), pair.query(first), strict=True))}
        for name, (pair, first) in zip(names, asked, strict=True)
    )
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fitted = {"factors.samples": 3000}
    settings = {"queries.path": str(path.absolute()), "scan.top": LISTED}
    trace = run_trace(config_of(folder, PATHS, **settings | fitted), folder / "trace")
    table = trace.scores_table()
    ids = table.column("sequence_id").to_numpy()
    scores_NQ = np.asarray(table.column("scores").to_pylist())
    assert sorted(ids) == list(range(len(shown))), "a document is not one sequence"
    probes, shares = [], {True: [], False: []}
    for number, (name, (pair, first)) in enumerate(zip(names, asked, strict=True)):
        order = ids[np.argsort(-scores_NQ[:, number], kind="stable")]
        ranked = [shown[index] for index in order]
        shares[first].append(np.mean([found.english_first == first for found in ranked[:LISTED]]))
        top = {order: [found for found in ranked if found.english_first == order][:TOP] for order in (True, False)}
        probes.append(translation_probe(name, pair, first, top))
    result = probed(folder, probes, **fitted)
    lines = [
        _training_line(folder, f"{len(shown):,} pairs, {sum(pair.english_first for pair in shown):,} English first"),
        _fidelity_line(result),
        "",
        f"| query | documents of its order among the {LISTED} highest, median [95 % interval] | flipped scores lower |"
        " by ten times or more | not above 97.5 % of other probes' sequences |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    tables, paired = {}, []
    for first, label in ((True, "English → Mandarin"), (False, "Mandarin → English")):
        chosen = [probe for probe, (_, order) in zip(result.summary["probes"], asked, strict=True) if order == first]
        tables[label] = over_probes(chosen)
        lower, much, noise, count = _flips(result, [probe["probe_id"] for probe in chosen])
        share = f"{np.median(shares[first]):.0%}{_interval(median_interval(shares[first]), percent=True)}"
        cells = [share, f"{lower} of {count}", f"{much} of {count}", f"{noise} of {count}"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        paired.append(_paired_line(label, chosen, _completed(folder, chosen)))
    return "\n".join([*lines, "", _partition_table(tables), "", *paired])


def almanac(run_dir: Path) -> str:
    """The demo's probes, from its results."""
    results = json.loads((run_dir / "almanac.json").read_text(encoding="utf-8"))
    summary = json.loads((run_dir / "probes/summary.json").read_text(encoding="utf-8"))
    count = sum(found["sequences"] for probe in summary["probes"] for found in probe["partitions"].values())
    tables = {TRAINED[order]: partitions for order, partitions in results["probes"].items()}
    fidelity = summary["fidelity"]["minimum"]
    head = f"{len(summary['probes'])} probes of {count} sequences; fidelity of rank 32 at worst {fidelity:.4f}."
    return f"{head}\n\n{_partition_table(tables)}"


def _flips(result: ProbeResult, probe_ids: Sequence[str]) -> tuple[int, int, int, int]:
    """Of the top documents: how many score lower when flipped, ten times lower, no higher than others; of how many."""
    ranges = {probe["probe_id"]: probe["others"]["range"] for probe in result.summary["probes"]}
    by_place = {(row["probe_id"], row["partition"], row["index"]): row["score"] for row in result.rows.to_pylist()}
    lower = much = noise = count = 0
    for (probe_id, partition, index), score in by_place.items():
        if probe_id in probe_ids and partition == "top, order of the query":
            flipped = by_place[probe_id, "the same, flipped", index]
            count += 1
            lower += flipped < score
            much += flipped < score / 10
            noise += flipped <= ranges[probe_id][1]
    return lower, much, noise, count


def _paired_line(label: str, probes: Sequence[Mapping[str, Any]], completed: float) -> str:
    """In how many probes flipping moves the mean down, and in how many up where it brings the query's order."""
    means = [{name: found["mean"] for name, found in probe["partitions"].items()} for probe in probes]
    down = sum(mean["the same, flipped"] < mean["top, order of the query"] for mean in means)
    up = sum(mean["the same, flipped to the query's"] > mean["top, other order"] for mean in means)
    itself = sum(mean["the pair itself, flipped"] < mean["the pair itself"] for mean in means)
    measured = np.mean([probe["measured"] for probe in probes])
    return (
        f"{label}: flipped away from the query's order, the mean falls in {down} of {len(means)} probes; flipped "
        f"to it, it rises in {up}; the pair itself scores lower flipped in {itself}. log p of the completion is "
        f"{measured:.1f} on average; {completed:.0%} are completed greedily."
    )


def _completed(folder: Path, probes: Sequence[Mapping[str, Any]]) -> float:
    """The share of queries that the model completes greedily."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    torch.set_num_threads(1)
    return completion_accuracy(model, tokenizer, as_queries([(p["prompt"], p["completion"]) for p in probes]))


def _training_line(folder: Path, what: str) -> str:
    found = json.loads((folder / "training.json").read_text())
    took = f" in {found['cpu_seconds']:.0f} CPU seconds" if "cpu_seconds" in found else ""
    return (
        f"{what}; a Llama of {found['parameters']:,} parameters, byte-level BPE of {found['vocabulary']:,} tokens, "
        f"{found['epochs']} epochs{took}, loss {found['loss']:.2f} nats a token."
    )


def _fidelity_line(result: ProbeResult) -> str:
    fidelity = result.summary["fidelity"]
    return f"fidelity of rank 32 at worst {fidelity['minimum']:.4f} ({fidelity['sample']} sequences)."


def _noise_line(result: ProbeResult) -> str:
    """How many sequences of each partition stand out from those of other probes."""
    totals: dict[str, list[int]] = {}
    for probe in result.summary["probes"]:
        for name, found in probe["partitions"].items():
            entry = totals.setdefault(name, [0, 0])
            entry[0] += found["above_others"] or 0
            entry[1] += found["sequences"]
    parts = "; ".join(f"{name} {above:,} of {count:,}" for name, (above, count) in totals.items())
    return f"Sequences that score above 97.5 % of those of other probes on the same query: {parts}."


def _partition_table(tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    counts = {label: max(found["probes"] for found in table.values()) for label, table in tables.items()}
    lines = ["| partition | " + " | ".join(f"{label} ({count})" for label, count in counts.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(tables))
    names = dict.fromkeys(name for table in tables.values() for name in table)
    lines += [f"| {name} | " + " | ".join(_cell(table.get(name)) for table in tables.values()) + " |" for name in names]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["median"] is None:
        return "–"
    below = "" if found["below"] is None else f", {found['below']} of {found['defined']}"
    return f"{found['median']:.2f}{_interval(found['interval'])}{below}"


def _interval(ends: Sequence[float] | None, percent: bool = False) -> str:
    if ends is None:
        return ""
    return f" [{ends[0]:.0%}, {ends[1]:.0%}]" if percent else f" [{ends[0]:.2f}, {ends[1]:.2f}]"


def write_section(page: Path, name: str, text: str) -> None:
    """Put a section between its markers, `<!-- NAME -->` and `<!-- /NAME -->`."""
    whole = page.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert len(marks.findall(whole)) == 1, f"{page} has no place for {name}"
    page.write_text(marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", whole), encoding="utf-8")


def main() -> None:
    """Run the sets that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=["reversal", "translation", "almanac"], default=[])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--almanac", type=Path, help="folder of a finished `whence demo`")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    jobs: dict[str, Callable[[], str]] = {
        "reversal": lambda: reversal(given.data),
        "translation": lambda: translation(given.data),
        "almanac": lambda: almanac(given.almanac),
    }
    for name in given.sets or ["reversal", "translation"]:
        text = jobs[name]()
        print(f"{name}\n\n{text}\n")
        write_section(given.page, name, text)


if __name__ == "__main__":
    main()
