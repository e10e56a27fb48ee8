"""Which values are allowed: key by key, then of keys together. All problems are found in one pass."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.keys import PATHS, Key, Needs, group_classes, keys, validation_paths, written
from conf.problems import ConfigProblems, Problem, did_you_mean
from conf.schema import MISSING, Dtype, Offload, PrefilterKind, RunConfig, Solver, UnfilteredKind, ValidationConfig

_FUSED = re.compile("flash|flex|kernels", re.IGNORECASE)  # of transformers' names of attention
WIDE = (Dtype.float32, Dtype.float64)


@dataclass(frozen=True)
class Limit:
    """What a key allows beyond its type."""

    text: str
    allows: Callable[[Any], bool]


def at_least(least: float) -> Limit:
    """Numbers of `least` and more."""
    return Limit(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Limit:
    """Numbers above `bound`."""
    return Limit(f"above {bound}", lambda value: value > bound)


def _is_layers(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return bool(value)


def _is_rank(value: str) -> bool:
    return value == "full" or (value.isascii() and value.isdigit() and int(value) > 0)


FOLDER_NAME = Limit("letters, digits and . _ -", lambda value: re.fullmatch(r"\w[\w.-]*", value) is not None)
NOT_EMPTY = Limit("not empty", lambda value: bool(value.strip()))
SHARE = Limit("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Limit("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)

LIMITS: Mapping[str, Limit] = {
    "store": NOT_EMPTY,
    "name": FOLDER_NAME,
    "seed": SEED,
    "model.path": NOT_EMPTY,
    "model.layers": Limit("mlp, attention, all or a regular expression over module names", _is_layers),
    "corpus.path": NOT_EMPTY,
    "corpus.text_field": NOT_EMPTY,
    "corpus.sequence_length": at_least(2),
    "corpus.limit": at_least(1),
    "corpus.part_bytes": at_least(1),
    "corpus.shard_sequences": at_least(1),
    "factors.samples": at_least(1),
    "factors.blocks": at_least(1),
    "factors.damping_factor": above(0),
    "factors.seed": SEED,
    "factors.groups": at_least(1),
    "factors.convergence_share": Limit("from 0 to 0.5", lambda value: 0 <= value <= 0.5),
    "factors.cg_iterations": at_least(1),
    "factors.cg_samples": at_least(1),
    "queries.path": NOT_EMPTY,
    "queries.rank": Limit("a whole number of at least 1, or full", _is_rank),
    "queries.fidelity": SHARE,
    "queries.fidelity_sample": at_least(0),
    "prefilter.top": at_least(1),
    "prefilter.k1": at_least(0),
    "unfiltered.sequences": at_least(1),
    "unfiltered.seed": SEED,
    "scan.batch_size": at_least(1),
    "scan.shard_sequences": at_least(1),
    "scan.product_dtype": Limit(
        "float32, float64 or bfloat16 (float16 overflows)", lambda value: value is not Dtype.float16
    ),
    "scan.sum_dtype": Limit("float32 or wider", lambda value: value in WIDE),
    "scan.agreement_sample": at_least(0),
    "scan.dense_memory": at_least(0),
    "scan.nonfinite_share": Limit("from 0 to 1", lambda value: 0 <= value <= 1),
    "scan.top": at_least(1),
    "scan.bottom": at_least(0),
    "attribution.top": at_least(0),
    "attribution.step": above(0),
    "attribution.context_characters": at_least(0),
    "tails.share": SHARE,
    "tails.count": at_least(10),
    "tails.least": at_least(10),
    "tails.bootstraps": at_least(1),
    "tails.seed": SEED,
    "cluster.address": NOT_EMPTY,
    "cluster.min_replicas": at_least(0),
    "cluster.max_replicas": at_least(1),
    "cluster.idle_seconds": at_least(0),
    "cluster.world_size": at_least(1),
    "cluster.memory_per_rank": at_least(1),
    "cluster.collective_timeout": above(0),
    "cluster.cpus_per_rank": at_least(1),
    "cluster.gpus_per_rank": at_least(0),
    "cluster.num_cpus": at_least(1),
    "cluster.progress_seconds": above(0),
    "report.sequences": at_least(1),
    "report.megabytes": at_least(1),
    "probe.path": NOT_EMPTY,
    "plan.sequences": at_least(1),
    "plan.queries": at_least(1),
    "plan.query_tokens": at_least(2),
    "plan.utilisation": SHARE,
    "plan.ranks_per_node": at_least(1),
    "plan.link_utilisation": SHARE,
    "plan.link_bytes": above(0),
    "plan.network_bytes": above(0),
    "plan.store_bytes": above(0),
    "plan.cpus": at_least(1),
    "plan.cpu_flops": above(0),
    "plan.memory_per_rank": at_least(1),
    "validation.path": NOT_EMPTY,
    "validation.limit": at_least(20),
    "validation.seed": SEED,
    "validation.points": at_least(2),
    "validation.measurements": at_least(1),
    "validation.epochs": at_least(1),
    "validation.pbo_steps": at_least(0),
    "validation.pbo_gradients": at_least(1),
    "validation.pbo_tolerance": above(0),
    "validation.epsilon": above(0),
    "validation.lissa_depth": at_least(1),
    "validation.label_draws": at_least(1),
    "validation.lissa_batch": at_least(1),
    "validation.subsets": at_least(0),
    "validation.retrainings": at_least(1),
    "validation.removal": Limit("from 0 to less than 1", lambda value: 0 <= value < 1),
    "validation.largest_blocks": at_least(0),
    "validation.largest_rank": at_least(0),
}

NAMES: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def allowed(key: Key) -> str:
    """What a key allows, in words."""
    limit = LIMITS.get(key.name)
    if issubclass(key.kind, Enum):
        text = ", ".join(member.name for member in key.kind if limit is None or limit.allows(member))
    elif limit is None:
        text = NAMES[key.kind]
    elif key.kind is str:
        text = limit.text
    else:
        text = f"{NAMES[key.kind]}, {limit.text}"
    return f"{text}; or null" if key.optional else text


def read_value(key: Key, value: object) -> Any:
    """Turn a value of YAML into one of the schema.

    Args:
        key: The setting.
        value: A scalar as YAML or the command line gave it.

    Returns:
        The value in the key's type; `schema.MISSING` stays as it is.

    Raises:
        ValueError: It is not among what the key allows; the message says what is.
    """
    if value is None and key.optional:
        return None
    if value == MISSING and key.name in PATHS:
        return MISSING
    refusal = ValueError(f"allowed: {allowed(key)}")
    if issubclass(key.kind, Enum):
        names = [member.name for member in key.kind]
        if isinstance(value, key.kind):
            converted: Any = value
        elif isinstance(value, str) and value in names:
            converted = key.kind[value]
        else:
            raise ValueError(f"{refusal}.{did_you_mean(str(value), names)}")
    else:
        converted = _read_scalar(key.kind, value)
    limit = LIMITS.get(key.name)
    if converted is None or (limit is not None and not limit.allows(converted)):
        raise refusal
    return converted


def _read_scalar(kind: type, value: object) -> Any:
    """The value as a bool, int, float or str; None if it is something else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        return str(value) if isinstance(value, str) or number else None
    if not number or not math.isfinite(value):  # type: ignore[arg-type]
        return None
    if kind is float:
        return float(value)  # type: ignore[arg-type]
    return int(value) if value == int(value) else None  # type: ignore[call-overload]


def build(
    settings: Mapping[str, object],
    *,
    complete: bool,
    cwd: str,
    planned: bool = False,
    needs: Needs = PATHS,
) -> RunConfig:
    """Make the typed config from settings by key, or say everything that is wrong with them.

    Args:
        settings: Values by full key, `factors.blocks`; a key that is absent takes the schema's default.
        complete: Whether what the job `needs` must be given and, on this machine, be there.
        cwd: The folder that relative paths start from.
        planned: Whether nothing will be run, so that `plan.sequences` and `plan.queries` stand in for files.
        needs: Keys of the paths that the job reads, or a function that says them of the config.

    Raises:
        ConfigProblems: With every problem.
    """
    known = keys()
    problems = [unknown_key(name, given) for name, given in settings.items() if name not in known]
    values: dict[str, Any] = {}
    for name, key in known.items():
        values[name] = key.default
        try:
            values[name] = read_value(key, settings.get(name, key.default))
        except ValueError as error:
            problems.append(Problem(f"{name}={written(settings[name])}", str(error), (name,)))
    wrong = {name for problem in problems for name in problem.keys}
    config = _assemble(_absolute_paths(values, cwd))
    problems += [found for rule in RULES for found in rule(config) if not wrong & set(found.keys)]
    problems += [found for found in _given(config, needs, complete, planned) if not wrong & set(found.keys)]
    reach = _store_in_reach(config, values["store"]) if complete and not planned else ()
    problems += [found for found in reach if not wrong & set(found.keys)]
    if problems:
        raise ConfigProblems(problems)
    return config


def unknown_key(name: str, given: object) -> Problem:
    """The problem of a key that the schema lacks, with what may have been meant."""
    group = name.partition(".")[0]
    inside = [key.field for key in keys().values() if key.group == group] if "." in name else []
    listing = f" Keys of {group}: {', '.join(inside)}." if inside else ""
    reason = f"there is no such key.{did_you_mean(name, (*keys(), *group_classes()))}{listing}"
    return Problem(f"{name}={written(given)}", reason, (name,))


def _assemble(values: Mapping[str, Any]) -> RunConfig:
    groups = {
        name: cls(**{key.field: values[key.name] for key in keys().values() if key.group == name})
        for name, cls in group_classes().items()
    }
    return RunConfig(**{key.name: values[key.name] for key in keys().values() if not key.group}, **groups)


def _absolute_paths(values: dict[str, Any], cwd: str) -> dict[str, Any]:
    """Local paths start at `cwd`; URIs stay, and so do names of models that no folder has."""

    def absolute(path: str) -> str:
        return os.path.normpath(os.path.join(cwd, os.path.expanduser(path)))

    found = dict(values)
    for name in ("store", *PATHS, "probe.path", "validation.path", "model.tokenizer"):
        path = values[name]
        if path in (None, MISSING, "") or "://" in path:
            continue
        hub = name.startswith("model.") and not _looks_local(path) and not os.path.exists(absolute(path))
        found[name] = path if hub else absolute(path)
    return found


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~"))


def _something_to_scan(config: RunConfig) -> Iterator[Problem]:
    if config.prefilter.kind is PrefilterKind.none and config.unfiltered.kind is UnfilteredKind.none:
        reason = "there is nothing to scan. Allowed: prefilter=bm25, unfiltered=sample, unfiltered=all, or both feeds"
        yield Problem("prefilter.kind=none with unfiltered.kind=none", reason, ("prefilter.kind", "unfiltered.kind"))


def _cpus_suffice(config: RunConfig) -> Iterator[Problem]:
    cluster = config.cluster
    wanted = cluster.max_replicas * cluster.world_size * cluster.cpus_per_rank
    if cluster.address == "local" and cluster.num_cpus is not None and wanted > cluster.num_cpus:
        parts = ("cluster.max_replicas", "cluster.world_size", "cluster.cpus_per_rank")
        reason = f"{' x '.join(parts)} asks for {wanted} CPUs. Allowed: a whole number, at least {wanted}; or null"
        yield Problem(f"cluster.num_cpus={cluster.num_cpus}", reason, ("cluster.num_cpus", *parts))


def _replicas_in_order(config: RunConfig) -> Iterator[Problem]:
    least, most = config.cluster.min_replicas, config.cluster.max_replicas
    if least > most:
        names = ("cluster.min_replicas", "cluster.max_replicas")
        yield Problem(
            f"cluster.min_replicas={least}", f"more than cluster.max_replicas={most}. Allowed: at most {most}", names
        )


def _ranks_have_whole_gpus(config: RunConfig) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.world_size > 1 and cluster.gpus_per_rank not in (0, 1):
        reason = "ranks of one replica talk over NCCL, which needs a GPU for each. Allowed: 0 or 1"
        names = ("cluster.gpus_per_rank", "cluster.world_size")
        yield Problem(f"cluster.gpus_per_rank={cluster.gpus_per_rank:g} with world_size above 1", reason, names)


def _offload_has_a_place(config: RunConfig) -> Iterator[Problem]:
    if config.model.offload is Offload.nvme and config.model.offload_path is None:
        reason = "needs model.offload_path. Allowed: a folder on a local disk of every node"
        yield Problem("model.offload=nvme", reason, ("model.offload", "model.offload_path"))


def _tail_is_fitted(config: RunConfig) -> Iterator[Problem]:
    count, least = config.tails.count, config.tails.least
    if count is not None and count < least:
        reason = f"fewer than tails.least={least} are never fitted. Allowed: at least {least}; or null"
        yield Problem(f"tails.count={count}", reason, ("tails.count", "tails.least"))


def _attention_has_forward_mode(config: RunConfig) -> Iterator[Problem]:
    """Exact Gauss-Newton products carry tangents through the attention (`influence.gauss_newton`)."""
    attention = config.model.attention
    if config.factors.solver is Solver.ekfac_cg and attention is not None and _FUSED.search(attention):
        reason = (
            "a fused kernel has no forward-mode derivative, which factors.solver=ekfac_cg needs. "
            "Allowed: null, sdpa or eager; or factors.solver=ekfac"
        )
        yield Problem(f"model.attention={attention}", reason, ("model.attention", "factors.solver"))


def _stood_in(config: RunConfig, path: str) -> bool:
    """Whether a number stands in for a file."""
    numbers = {"corpus.path": config.plan.sequences, "queries.path": config.plan.queries}
    return numbers.get(path) is not None


def _given(config: RunConfig, needs: Needs, complete: bool, planned: bool) -> Iterator[Problem]:
    """What is wrong with the paths that a job reads."""
    if not complete:
        return
    wanted = needs(config) if callable(needs) else needs
    traces = needs is not validation_paths and "model.path" in wanted
    if traces and config.model.path == MISSING and config.validation != ValidationConfig():
        reason = "brings no model, corpus and queries to trace. Allowed: whence validate, with the same settings"
        yield Problem(f"validation.subject={config.validation.subject.name}", reason, ("validation.subject",))
        return
    yield from _paths(config, [path for path in wanted if not (planned and _stood_in(config, path))])


def _paths(config: RunConfig, needed: Iterable[str]) -> Iterator[Problem]:
    """Paths that are not given; and those on this machine that are not there: a cluster's are for its nodes to find."""
    paths = {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in needed}
    for name, path in paths.items():
        if path in (None, MISSING):
            reason = f"must be given: {keys()[name].meaning}. For example {name}=..., or an experiment that sets it"
            yield Problem(name, reason, (name,))
    if config.cluster.address != "local":
        return
    if "model.path" in paths:
        paths["model.tokenizer"] = config.model.tokenizer
    for name, path in paths.items():
        if path in (None, MISSING) or "://" in path or (name.startswith("model.") and not _looks_local(path)):
            continue
        if not os.path.exists(path) and not glob.glob(path, recursive=True):
            yield Problem(f"{name}={path}", f"nothing is there. Allowed: {keys()[name].meaning}", (name,))


def _store_in_reach(config: RunConfig, given: str) -> Iterator[Problem]:
    """A store below the current folder, where nodes elsewhere write; and a job's current folder goes away with it."""
    absolute = "://" in given or os.path.isabs(os.path.expanduser(given))
    if config.cluster.address != "local" and not absolute:
        reason = (
            "is a folder below the current one, which neither other nodes nor the next job will find. Allowed: a full "
            "path on a disk that all nodes share, or a URI such as s3://bucket/whence"
        )
        yield Problem(f"store={given}", reason, ("store",))


Rule = Callable[[RunConfig], Iterator[Problem]]
RULES: tuple[Rule, ...] = (
    _something_to_scan,
    _cpus_suffice,
    _replicas_in_order,
    _ranks_have_whole_gpus,
    _offload_has_a_place,
    _tail_is_fitted,
    _attention_has_forward_mode,
)
