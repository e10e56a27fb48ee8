"""The steps of a trace and what determines the bits of each: the one place where identities are written down.

A step's fingerprint covers its identity and the fingerprints of its inputs. What is not named here (threads, replicas,
batch sizes, folders) moves no bit beyond rounding, and recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from actors.corpus import corpus_digest
from actors.model import model_digest
from actors.probes import read_probes, sequences_digest
from actors.queries import queries_digest
from actors.tokeniser import load_tokeniser, model_limits
from conf.schema import PrefilterKind, RunConfig, UnfilteredKind, plain
from influence.solvers import SOLVERS
from pipelines.stages import (
    agreement,
    attribution,
    candidates,
    compression,
    convergence,
    correction,
    covariance,
    eigenbasis,
    fidelity,
    gradients,
    ihvp,
    layers,
    probe,
    refinement,
    scan,
    tails,
    tokenise,
    top,
)
from pipelines.steps import Step

# Raise a version when a stage's code changes what it writes.
VERSIONS = {
    "layers": 1,
    "sequences": 1,
    "covariance": 1,
    "eigenbasis": 1,
    "correction": 1,
    "gradients": 1,
    "convergence": 1,
    "refinement": 1,
    "ihvp": 1,
    "queries": 2,
    "fidelity": 1,
    "candidates": 2,
    "scores": 3,
    "agreement": 1,
    "top": 1,
    "attribution": 1,
    "tails": 2,
    "probe": 1,
}


def build_steps(config: RunConfig) -> list[Step]:
    """The steps of a trace, in the order in which they run.

    Reads the model's and the corpus's digests, so their files must be there.
    """
    solver = SOLVERS[config.factors.solver.name]
    factors = ["eigenbasis"] * solver.needs_covariance + ["correction"] * solver.needs_correction
    model, tokeniser = _model(config), _tokeniser(config)
    steps = [
        _step("layers", (), {"model": model, "layers": config.model.layers}, layers.run),
        _step("sequences", (), {"corpus": _corpus(config), "tokeniser": tokeniser}, tokenise.run),
    ]
    if solver.needs_covariance:
        sampling = _sampling(config) | {"model": model, "precision": _precision(config)}
        steps += [
            _step("covariance", ("layers", "sequences"), sampling | {"blocks": config.factors.blocks}, covariance.run),
            _step("eigenbasis", ("layers", "covariance"), {"sums": config.scan.sum_dtype.name}, eigenbasis.run),
        ]
        if solver.needs_correction:
            steps.append(_step("correction", ("layers", "sequences", "eigenbasis"), sampling, correction.run))
    return steps + _query_steps(config, model, tokeniser, tuple(factors))


def build_probe_steps(config: RunConfig) -> list[Step]:
    """The steps of `whence probe`: those of a trace up to its queries, and the scores of the user's own sequences.

    Args:
        config: `queries.path` is where the queries of the probes are.
    """
    identity = {
        "sequences": sequences_digest(read_probes(config)),
        "tokeniser": _tokeniser(config),
        "collapse_newlines": config.corpus.collapse_newlines,
        "model": _model(config),
        "precision": _precision(config),
        "contraction": _contraction(config),
    }
    probed = _step("probe", ("layers", "queries"), identity, probe.run)
    return [*steps_up_to(build_steps(config), ("queries", "fidelity", "agreement")), probed]


def steps_up_to(steps: Sequence[Step], names: Collection[str]) -> list[Step]:
    """The named steps and all that they depend on.

    Args:
        steps: Each after its inputs.
        names: Of the steps that are wanted.

    Returns:
        Those of `steps`, in their order.

    Raises:
        ValueError: If there is no step of a name.
    """
    wanted = set(names)
    if unknown := wanted - {step.name for step in steps}:
        raise ValueError(f"there are no steps {sorted(unknown)}: {[step.name for step in steps]}")
    for step in reversed(steps):
        if step.name in wanted:
            wanted.update(step.inputs)
    return [step for step in steps if step.name in wanted]


def _query_steps(config: RunConfig, model: dict, tokeniser: dict, factors: tuple[str, ...]) -> list[Step]:
    queries = {"queries": queries_digest(config), "tokeniser": tokeniser}
    inverse: dict[str, Any] = {"solver": config.factors.solver.name, "sums": config.scan.sum_dtype.name}
    if factors:
        inverse["damping_factor"] = config.factors.damping_factor
    refined = [_refinement(config, model, factors)] if SOLVERS[config.factors.solver.name].refined else []
    factors += tuple(step.name for step in refined)
    return [
        _step(
            "gradients",
            ("layers",),
            queries | {"model": model, "measurement": config.queries.measurement.name},
            gradients.run,
        ),
        _step("convergence", ("layers", "sequences", "gradients"), _convergence(config, model), convergence.run),
        *refined,
        _step("ihvp", ("layers", "gradients", *factors), inverse | {"kept": list(ihvp.kept(config.queries))}, ihvp.run),
        _step(
            "queries",
            ("layers", "gradients", "ihvp"),
            {"rank": config.queries.rank, "fidelity": config.queries.fidelity},
            compression.run,
        ),
        _step("candidates", ("sequences",), queries | _feeds(config), candidates.run),
        _step(  # a leaf, listed before the scan: whoever asked for more should read so before hours of it
            "fidelity",
            ("layers", "sequences", "gradients", "queries", *factors),
            _sample(config, fidelity.sample_size(config.queries), model),
            fidelity.run,
        ),
        _step(
            "scores",
            ("layers", "sequences", "queries", "candidates"),
            {
                "model": model,
                "precision": _precision(config),
                "contraction": _contraction(config),
                "shard_sequences": config.scan.shard_sequences,
            },
            scan.run,
        ),
        _step(
            "agreement",
            ("layers", "sequences", "queries"),
            _sample(config, agreement.sample_size(config), model, contraction=_contraction(config)),
            agreement.run,
        ),
        _step("top", ("sequences", "candidates", "scores"), _heads(config) | {"tokeniser": tokeniser}, top.run),
        _step(
            "attribution",
            ("layers", "sequences", "queries", "top"),
            _attribution(config, model, tokeniser),
            attribution.run,
        ),
        _step("tails", ("candidates", "scores"), {"tails": plain(config.tails)}, tails.run),
    ]


def _convergence(config: RunConfig, model: dict) -> dict[str, Any]:
    """Of the fits on halves; where nothing is fitted, nothing else moves it."""
    factors, solver = config.factors, convergence.fitted_solver(config.factors)
    if not factors.convergence_share or solver is None:
        return {"share": 0}
    fits = {"solver": solver, "blocks": factors.blocks, "damping_factor": factors.damping_factor}
    scored = {"scored": convergence.SCORED, "queries": convergence.QUERIES}
    sampled = _sampling(config) | {"model": model, "precision": _precision(config)}
    return {"share": factors.convergence_share} | fits | scored | sampled


def _refinement(config: RunConfig, model: dict, factors: tuple[str, ...]) -> Step:
    sample = refinement.cg_sample(config.factors)
    identity = {
        "solver": config.factors.solver.name,
        "damping_factor": config.factors.damping_factor,
        "iterations": sample.cg_iterations,
        "samples": sample.samples,
        "seed": sample.seed,
        "groups": sample.groups,
        "model": model,
        "precision": _precision(config),
    }
    return _step("refinement", ("layers", "sequences", "gradients", *factors), identity, refinement.run)


def _step(name: str, inputs: tuple[str, ...], identity: dict[str, Any], run: Any) -> Step:
    return Step(name, name, inputs, {"version": VERSIONS[name]} | identity, run)


def _model(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {
        "digest": model_digest(model.path, model.revision),
        "dtype": model.dtype.name,
        "attention": model.attention,
        "trust_remote_code": model.trust_remote_code,
    }


def _tokeniser(config: RunConfig) -> dict[str, Any]:
    limits = model_limits(config.model)
    return {
        "digest": load_tokeniser(config.model).digest(),
        "vocabulary": limits.vocabulary,
        "context": limits.context,
        "add_bos": config.corpus.add_bos,
        "add_eos": config.corpus.add_eos,
    }


def _corpus(config: RunConfig) -> dict[str, Any]:
    fields = plain(config.corpus)
    assert isinstance(fields, dict)
    del fields["path"]
    return fields | {"digest": corpus_digest(config.corpus)}


def _sampling(config: RunConfig) -> dict[str, Any]:
    factors = config.factors
    return {
        "labels": factors.labels.name,
        "samples": factors.samples,
        "seed": factors.seed,
        "label_seed": config.seed,
        "groups": factors.groups,
    }


def _precision(config: RunConfig) -> dict[str, str]:
    return {"product": config.scan.product_dtype.name, "sums": config.scan.sum_dtype.name}


def _contraction(config: RunConfig) -> list[Any]:
    return [config.scan.contraction.name, config.scan.dense_memory]


def _sample(config: RunConfig, size: int, model: dict, **more: Any) -> dict[str, Any]:
    """Of a comparison on a sample; where there is none, nothing else moves it."""
    if not size:
        return {"sample": 0}
    return {"sample": size, "seed": config.seed, "model": model, "precision": _precision(config)} | more


def _heads(config: RunConfig) -> dict[str, Any]:
    """Of the rankings: what is not asked for is not named."""
    scan = config.scan
    return {"top": scan.top} | ({"bottom": scan.bottom} if scan.bottom else {})


def _attribution(config: RunConfig, model: dict, tokeniser: dict) -> dict[str, Any]:
    """Where nothing is taken apart, nothing else moves it."""
    if not config.attribution.top:
        return {"top": 0}
    fields = plain(config.attribution)
    assert isinstance(fields, dict)
    precision = {"model": model, "precision": _precision(config)}
    return fields | precision | {"tokeniser": tokeniser, "shard_sequences": config.scan.shard_sequences}


def _feeds(config: RunConfig) -> dict[str, Any]:
    prefilter, unfiltered = config.prefilter, config.unfiltered
    feeds: dict[str, Any] = {"prefilter": prefilter.kind.name, "unfiltered": unfiltered.kind.name}
    if prefilter.kind is PrefilterKind.bm25:
        feeds |= {"top": prefilter.top}  # not k1, which cancels out of Equation 28
    if unfiltered.kind is UnfilteredKind.sample:
        feeds |= {"sequences": unfiltered.sequences, "seed": unfiltered.seed}
    return feeds
