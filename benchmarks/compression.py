"""How well compressed queries keep full-rank scores: our weighting and allotment against plain SVD.

    python benchmarks/compression.py RUN_DIR [--ranks 4,16,32] [--sequences 128]

RUN_DIR is the folder of a finished `whence trace`; its factors, query gradients and sequences are used. For each rank
the table gives 1 - r, with r the Pearson correlation of compressed with full-rank scores over a random sample of
sequences, averaged over queries: (a) plain SVD in the Frobenius norm, the same rank in each layer (the paper's);
(b) weighted by the curvature, the same rank in each layer; (c) weighted, ranks spread over layers (what whence does).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.factors import fit_solver, load_selection, read_token_factors
from actors.model import load_model
from actors.sequences import StoredSequences
from actors.store import Artifact, Store
from conf.schema import ModelConfig
from influence.batch import Batch
from influence.compression import ScoreWeights, Spectrum, allot_ranks, pearson, weighted_spectrum
from influence.layers import LayerSelection
from influence.scoring import LayerQueries
from influence.solvers import apply
from influence.worker import Worker


def artifacts(summary: dict) -> dict[str, Artifact]:
    """The artifacts of a run, opened from the URIs in its summary."""
    found = {}
    for name, uri in summary["artifacts"].items():
        root, kind, short = uri.rsplit("/", 2)
        record = json.loads(Path(uri, "artifact.json").read_text())
        found[name] = Store(root).folder(kind, record["fingerprint"])
        assert record["fingerprint"].startswith(short)
    return found


def sample_scores(worker: Worker, rows: list, queries: dict[str, LayerQueries]) -> Tensor:
    """Scores of the sample, eight sequences at a time; [N, Q]."""
    blocks = []
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        blocks.append(worker.scores(Batch.collate(range(len(part)), part), queries).scores_BQ)
    return torch.cat(blocks)


def plain_spectrum(full_OI: Tensor) -> Spectrum:
    """Plain SVD of a preconditioned gradient."""
    left, values, right_t = torch.linalg.svd(full_OI.double(), full_matrices=False)
    return Spectrum((left * values).float(), right_t.T.float(), values, float(values.square().sum()))


def truncated(spectra: list[dict[str, Spectrum]], ranks: list[dict[str, int]], name: str) -> LayerQueries:
    """One layer's queries at given ranks, as full matrices."""
    dense = [
        query[name].left_OK[:, : rank[name]] @ query[name].right_IK[:, : rank[name]].T
        for query, rank in zip(spectra, ranks, strict=True)
    ]
    return LayerQueries(len(dense), dense_QOI=torch.stack(dense))


def decompose(store: dict[str, Artifact], config: dict, selection: LayerSelection, queries: int) -> tuple:
    """Full matrices, plain and weighted spectra of every query and layer."""
    full: dict[str, Tensor] = {}
    plain: list[dict[str, Spectrum]] = [{} for _ in range(queries)]
    weighted: list[dict[str, Spectrum]] = [{} for _ in range(queries)]
    factors = {name: store[name] for name in ("eigenbasis", "correction") if name in store}
    for layer in selection.layers:
        state, weights = fit_solver(config["solver"], factors, layer, config["damping_factor"])
        assert isinstance(weights, ScoreWeights)
        mine = []
        for query, gradient in enumerate(read_token_factors(store["gradients"], layer.name, range(queries))):
            mine.append(apply(state, gradient.gradient()).float())
            plain[query][layer.name] = plain_spectrum(mine[-1])
            weighted[query][layer.name] = weighted_spectrum(gradient.gradient(), state, weights, None)
        full[layer.name] = torch.stack(mine)
    return full, plain, weighted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ranks", default="4,16,32")
    parser.add_argument("--sequences", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    summary = json.loads((options.run / "summary.json").read_text())
    store, config = artifacts(summary), summary["config"]
    selection = load_selection(store["layers"])
    worker = Worker(load_model(ModelConfig(path=config["model"]["path"])), selection)
    count = summary["corpus"]["sequences"]
    ids = np.sort(np.random.default_rng(1).choice(count, min(options.sequences, count), replace=False)).tolist()
    rows = StoredSequences(store["sequences"]).read(ids)
    queries = len(summary["queries"])
    full, plain, weighted = decompose(store, config["factors"], selection, queries)
    names = list(full)
    exact = sample_scores(worker, rows, {name: LayerQueries(queries, dense_QOI=full[name]) for name in names})
    print(f"{len(names)} layers, {queries} queries, {len(rows)} sequences; 1 - r, mean over queries")
    print(f"{'rank':>5} {'plain, equal':>14} {'weighted, equal':>16} {'weighted, spread':>17} {'predicted':>10}")
    for rank in map(int, options.ranks.split(",")):
        equal = [dict.fromkeys(names, rank) for _ in range(queries)]
        allotted = [
            allot_ranks(
                {name: query[name].values_K for name in names}, {name: query[name].energy for name in names}, rank, None
            )
            for query in weighted
        ]
        losses = []
        for spectra, ranks in ((plain, equal), (weighted, equal), (weighted, [entry.ranks for entry in allotted])):
            scores = sample_scores(worker, rows, {name: truncated(spectra, ranks, name) for name in names})
            losses.append(np.mean([1 - pearson(scores[:, q], exact[:, q]) for q in range(queries)]))
        predicted = np.mean([1 - entry.predicted_fidelity for entry in allotted])
        print(f"{rank:>5} {losses[0]:>14.2e} {losses[1]:>16.2e} {losses[2]:>17.2e} {predicted:>10.2e}")


if __name__ == "__main__":
    main()
