"""From overrides to a validated `RunConfig`: Hydra composes, `to_config` converts once; no DictConfig goes further.

Hydra is given the schema's keys and defaults as a plain tree; types and limits are checked by `conf.validate`, which
finds every problem where a typed tree would stop at the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.keys import FOLDER, GROUPS, PATHS, Needs, group_classes
from conf.overrides import check_overrides, override_strings
from conf.problems import ConfigProblems, Problem
from conf.schema import MISSING, RunConfig, cores, plain
from conf.validate import build

__all__ = ["ConfigProblems", "check_command", "compose_config", "override_strings", "register", "to_config"]


def register() -> None:
    """Tell Hydra the schema's keys with their defaults, and OmegaConf what the config files ask for."""
    ConfigStore.instance().store(name="whence_schema", node=plain(RunConfig()), provider="whence")
    OmegaConf.register_new_resolver("whence.conf", lambda file: str(FOLDER / file), replace=True)
    OmegaConf.register_new_resolver("whence.sweep_cpus", _sweep_cpus, replace=True)


def _sweep_cpus(jobs: int, *, _root_: DictConfig) -> int | None:
    """CPUs that a Ray of a sweep's own promises, for so many jobs side by side; None where Ray is there already."""
    cluster = _root_.cluster
    if cluster.address != "local" or cluster.num_cpus is not None:
        return cluster.num_cpus if cluster.address == "local" else None
    return jobs * cluster.max_replicas * cluster.world_size * cluster.cpus_per_rank + cores()


register()


def compose_config(
    overrides: Sequence[str] = (),
    *,
    complete: bool = True,
    config_dir: str | None = None,
    planned: bool = False,
    needs: Needs = PATHS,
) -> RunConfig:
    """Compose a run's config without `hydra.main`: the Python API's way in.

    Args:
        overrides: As on the command line, `["experiment=tinystories", "queries.rank=16"]`.
        complete: Whether what the job `needs` must be given and, on this machine, be there.
        config_dir: A folder of further options, such as one's own experiments.
        planned: Whether nothing will be run, so that `plan.sequences` and `plan.queries` stand in for files.
        needs: Keys of the paths that the job reads, or a function that says them of the config.

    Raises:
        ConfigProblems: With everything that is wrong, each with its key, its value and what is allowed.
    """
    return check_command(overrides, complete=complete, config_dir=config_dir, planned=planned, needs=needs)[0]


def check_command(
    overrides: Sequence[str],
    *,
    multirun: bool = False,
    complete: bool = True,
    config_dir: str | None = None,
    config_name: str = "config",
    planned: bool = False,
    needs: Needs = PATHS,
) -> list[RunConfig]:
    """Compose and validate every job that a command line asks for, before any of them starts.

    Raises:
        ConfigProblems: With the problems of all jobs.
    """
    folders = [Path(config_dir)] if config_dir else []
    if not all(folder.is_dir() for folder in folders):
        raise ConfigProblems([Problem(f"--config-dir {config_dir}", "there is no such folder", ("--config-dir",))])
    checked = check_overrides(overrides, multirun=multirun, folders=folders)
    problems = list(checked.problems)
    configs = []
    for job in checked.jobs:
        try:
            composed = _composed(job, folders, config_name)
            wanted = complete and not checked.partial
            configs.append(to_config(composed, complete=wanted, planned=planned, needs=needs))
        except ConfigProblems as error:
            problems += error.problems
    if problems:
        named = {key for problem in checked.problems for key in problem.keys}
        raise ConfigProblems(p for p in problems if p in checked.problems or not named & set(p.keys))
    return configs


def to_config(
    cfg: DictConfig,
    *,
    complete: bool = True,
    cwd: str | None = None,
    planned: bool = False,
    needs: Needs = PATHS,
) -> RunConfig:
    """Turn Hydra's tree into the typed config, with all validation.

    Args:
        cfg: The composed tree; its `hydra` node is ignored.
        complete: Whether what the job `needs` must be given and, on this machine, be there.
        cwd: The folder that relative paths start from; the current one if None.
        planned: Whether nothing will be run, so that `plan.sequences` and `plan.queries` stand in for files.
        needs: Keys of the paths that the job reads, or a function that says them of the config.

    Raises:
        ConfigProblems: With everything that is wrong.
    """
    problems: list[Problem] = []
    settings = dict(_settings(cfg, problems))
    try:
        config = build(settings, complete=complete, cwd=cwd or os.getcwd(), planned=planned, needs=needs)
    except ConfigProblems as error:
        named = {key for problem in problems for key in problem.keys}
        raise ConfigProblems([*problems, *(p for p in error.problems if not named & set(p.keys))]) from error
    if problems:
        raise ConfigProblems(problems)
    return config


def _composed(overrides: Iterable[str], folders: Iterable[Path], config_name: str) -> DictConfig:
    """Compose with a Hydra of its own, so that it also works inside a running Hydra application."""
    searched = [f"file://{folder.absolute()}" for folder in folders]
    extra = [f"hydra.searchpath=[{','.join(searched)}]"] if searched else []
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return compose(config_name, overrides=[*extra, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigProblems([composition_problem(error)]) from error
    finally:
        GlobalHydra.instance().hydra = state


def composition_problem(error: Exception) -> Problem:
    """What Hydra or OmegaConf says, on one line, with the cause."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines() if "full_key" not in line]
    return Problem("", "; ".join(dict.fromkeys(line for line in lines if line and "object_type" not in line)))


def _settings(cfg: DictConfig, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """The leaves of the tree by full key, interpolations resolved."""
    for name in cfg:
        if name == "hydra" or (name in GROUPS and name not in group_classes()):
            continue
        if name not in group_classes():
            yield str(name), _leaf(cfg, str(name), str(name), problems)
            continue
        node = _leaf(cfg, str(name), str(name), problems, keep=True)
        if not isinstance(node, DictConfig):
            problems.append(Problem(f"{name}={node}", f"is a group of keys. Write {name}.KEY=value", (str(name),)))
            continue
        for field in node:
            yield f"{name}.{field}", _leaf(node, str(field), f"{name}.{field}", problems)


def _leaf(node: DictConfig, field: str, name: str, problems: list[Problem], keep: bool = False) -> Any:
    if OmegaConf.is_missing(node, field):
        return MISSING
    try:
        value = node[field]
        return value if keep or not isinstance(value, Container) else OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        problems.append(Problem(name, str(error).partition("\n")[0], (name,)))
        return MISSING
