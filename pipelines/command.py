"""The command: a verb, then Hydra overrides.

Everything that can be wrong with a configuration is found here, before Hydra makes a folder and before torch or Ray
is imported; each verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.errors import ConfigError, WhenceError
from conf.keys import PATHS, PROBE_PATHS, Needs, validation_paths
from conf.problems import ConfigProblems, did_you_mean
from pipelines.ending import (
    FAILED,
    INTERRUPTED,
    KEPT,
    REFUSED,
    TERMINATED,
    JobFailed,
    JobStopped,
    Terminated,
    terminable,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig


JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for the command of a job
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks what a job brings along


LOG = logging.getLogger(__name__)


def logged(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Make a job write its error to the run's log: the message of one that has a name, else the traceback."""

    @functools.wraps(job)
    def run(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except (WhenceError, ConfigProblems) as error:
            LOG.error("%s", getattr(error, "cause", error))
            raise
        except Exception:
            LOG.exception("Stopped by an error that has no name yet; please report it")
            raise

    return run


@logged
def trace_job(cfg: DictConfig) -> None:
    """Run a whole trace and print its table of top sequences."""
    from hydra.core.hydra_config import HydraConfig

    from conf.load import to_config

    runtime = HydraConfig.get().runtime
    config = to_config(cfg, cwd=runtime.cwd)

    from pipelines.tracing import run_trace

    _warn_in_a_job(config.cluster.address, runtime.output_dir)
    result = run_trace(config, runtime.output_dir)
    sys.stdout.write(f"{result.table()}\n")


def _warn_in_a_job(address: str, folder: str) -> None:
    """What is easily forgotten where `ray job submit` runs the command."""
    if JOB_FOLDER in folder:
        LOG.warning("the run's folder goes away with this job: set hydra.run.dir to a folder that stays")
    if JOB_VARIABLE in os.environ and address == "local":
        LOG.warning("cluster.address=local starts a Ray of its own inside this job: auto is the cluster that runs it")


@logged
def probe_job(cfg: DictConfig) -> None:
    """Score sequences of the user's own and print what each partition comes to."""
    from hydra.core.hydra_config import HydraConfig

    from conf.load import to_config

    runtime = HydraConfig.get().runtime
    config = to_config(cfg, cwd=runtime.cwd, needs=PROBE_PATHS)

    from pipelines.probing import run_probe

    _warn_in_a_job(config.cluster.address, runtime.output_dir)
    result = run_probe(config, runtime.output_dir)
    sys.stdout.write(f"{result.table()}\n")


@logged
def validate_job(cfg: DictConfig) -> None:
    """Compare methods with measured responses and retrained models, and print the tables."""
    from hydra.core.hydra_config import HydraConfig

    from conf.load import to_config

    runtime = HydraConfig.get().runtime
    config = to_config(cfg, cwd=runtime.cwd, needs=validation_paths)

    from pipelines.validation.run import run_validation

    _warn_in_a_job(config.cluster.address, runtime.output_dir)
    result = run_validation(config, runtime.output_dir)
    sys.stdout.write(f"{result.table()}\n")


@logged
def plan_job(cfg: DictConfig) -> None:
    """Print what a trace would do, and run nothing."""
    from hydra.core.hydra_config import HydraConfig

    from conf.load import to_config

    config = to_config(cfg, cwd=HydraConfig.get().runtime.cwd, planned=True)

    from pipelines.plan import run_plan

    sys.stdout.write(f"{run_plan(config)}\n")


@logged
def demo_job(cfg: DictConfig) -> None:
    """Trace the facts of a generated almanac, whose true sources are known."""
    from hydra.core.hydra_config import HydraConfig

    from conf.load import to_config

    hydra = HydraConfig.get()
    to_config(cfg, complete=False, cwd=hydra.runtime.cwd)

    from pipelines.almanac import demo

    demo(list(hydra.overrides.task), hydra.runtime.output_dir)


def compare_arguments() -> argparse.ArgumentParser:
    """What `whence compare` takes."""
    from pipelines.comparing.arguments import parser

    return parser()


def compare_runs(given: argparse.Namespace) -> str:
    """Compare finished runs; returns what the terminal shows."""
    from pipelines.comparing.arguments import run

    return run(given)


def report_arguments() -> argparse.ArgumentParser:
    """What `whence report` takes."""
    from pipelines.report.arguments import parser

    return parser()


def report_again(given: argparse.Namespace) -> str:
    """Write a finished run's report again; returns its path."""
    from pipelines.report.arguments import run

    return run(given)


@dataclass(frozen=True)
class Verb:
    """A word of the command line.

    Attributes:
        name: The word.
        summary: One line for the help.
        job: What Hydra runs with the composed config; None for a verb of a later release.
        complete: Whether the paths that it needs must be given.
        overrides: Put before the user's, which win.
        named: Whether an experiment's own settings win over `overrides` too.
        compared: Whether a sweep ends with a table of its jobs.
        needs: Keys of the paths that it reads, or a function that says them of the config.
        needed: What the help says of them, where a list of keys does not say it.
        arguments: Makes the parser of a verb that takes no configuration, and no Hydra.
        direct: What runs with what that parser made of the words; returns what the terminal shows.
    """

    name: str
    summary: str
    job: Callable[[DictConfig], None] | None = None
    complete: bool = True
    overrides: tuple[str, ...] = ()
    named: bool = False
    compared: bool = False
    needs: Needs = PATHS
    needed: str = ""
    arguments: Callable[[], argparse.ArgumentParser] | None = None
    direct: Callable[[argparse.Namespace], str] | None = None

    @property
    def ready(self) -> bool:
        """Whether this release has it."""
        return self.job is not None or self.direct is not None


NO_FOLDER = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=whence_console")
VERBS = (
    Verb("trace", "find the training sequences with the highest influence on each query", trace_job, compared=True),
    Verb(
        "plan", "say what trace would do: steps, cached or not, and their cost; run nothing", plan_job, True, NO_FOLDER
    ),
    Verb(
        "probe",
        "score sequences of your own, which the corpus need not have, on queries of their own",
        probe_job,
        overrides=("name=probe",),
        needs=PROBE_PATHS,
    ),
    Verb("demo", "trace the facts of a small generated world", demo_job, False, ("name=almanac",)),
    Verb(
        "validate",
        "check influence scores against measured responses, retrained models and known answers",
        validate_job,
        overrides=("name=validate",),
        named=True,
        needs=validation_paths,
        needed="validation.path of a data set or of facts; model.path, corpus.path and queries.path for "
        "validation.subject=language; nothing for experiment=almanac",
    ),
    Verb(
        "report",
        "write the report of a finished run again: whence report RUN [report.key=value]",
        arguments=report_arguments,
        direct=report_again,
    ),
    Verb(
        "compare",
        "say how far finished runs agree on the same queries: whence compare RUN RUN ...",
        arguments=compare_arguments,
        direct=compare_runs,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words after the command's own name; those of the process if None.

    Returns:
        The exit status: 0; 1 for an error with a name; 2 for a wrong command or configuration; 130 if interrupted,
        143 if terminated.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        from pipelines.manual import version

        sys.stdout.write(f"whence {version()}\n")
        return 0
    verb = next((verb for verb in VERBS if words and verb.name == words[0]), None)
    own_help = verb is not None and verb.arguments is not None
    if words and not own_help and (words[0] == "help" or {"-h", "--help"} & set(words)):
        from pipelines.manual import manual

        sys.stdout.write(manual(VERBS, verb))
        return 0
    if verb is None:
        return _refuse("whence", _unknown_verb(words))
    if not verb.ready:
        return _refuse(f"whence {verb.name}", "This verb comes with a later release. Ready now: " + _ready())
    return _execute(verb, words[1:])


def _execute(verb: Verb, words: list[str]) -> int:
    """Check the configuration of every job, then let Hydra run them."""
    name = f"whence {verb.name}"
    try:
        with terminable():
            if verb.arguments and verb.direct:
                sys.stdout.write(f"{verb.direct(verb.arguments().parse_args(words))}\n")
            else:
                _check(verb, words)
                _run_hydra(verb, words)
    except ConfigProblems as error:
        count = len(error.problems)
        lines = [f"{count} settings are not allowed; nothing was started."] if count > 1 else []
        lines += [str(problem) for problem in error.problems]
        return _refuse(name, "\n  ".join(lines) + f"\nEvery key and what it means: {name} --help")
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted. {KEPT}\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write(f"{name}: terminated. {KEPT}\n")
        return TERMINATED
    except JobStopped as stopped:
        return _status(stopped.error)
    except JobFailed as failed:
        return failed.status
    except WhenceError as error:
        sys.stderr.write(f"{name}: {getattr(error, 'cause', error)}\n")
        return _status(error)
    return 0


def _check(verb: Verb, words: list[str]) -> None:
    """Raise `ConfigProblems` if any job's configuration is wrong."""
    from conf.load import check_command

    flags = _flags(verb, words)
    runs = not (flags.cfg or flags.info or flags.hydra_help or flags.shell_completion or flags.experimental_rerun)
    check_command(
        [*_own_overrides(verb, words), *flags.overrides],
        multirun=_sweeps(words),
        complete=verb.complete and runs,
        config_dir=flags.config_dir,
        config_name=flags.config_name or "config",
        planned=verb.job is plan_job,
        needs=verb.needs,
    )


def _own_overrides(verb: Verb, words: list[str]) -> tuple[str, ...]:
    """What the verb itself sets, before the user's words."""
    by_experiment = verb.named and any(word.startswith("experiment=") for word in words)
    return () if by_experiment else verb.overrides


def _flags(verb: Verb, words: list[str]) -> argparse.Namespace:
    """Hydra's own flags, and the overrides among and after them."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"whence {verb.name}"
    parser.usage = f"whence {verb.name} [--multirun] [--cfg job] [--config-dir FOLDER] [group=option] [group.key=value]"
    return parser.parse_intermixed_args(words)


def _run_hydra(verb: Verb, words: list[str]) -> None:
    """Hand over to `hydra.main`, which reads `sys.argv`; its errors come back to `_execute`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from conf.load import composition_problem

    assert verb.job is not None
    own, overrides = _own_overrides(verb, words), _flags(verb, words).overrides
    flags = list(words)
    for override in overrides:
        flags.remove(override)
    sweeps = verb.compared and _sweeps(words)
    job = _in_sweep(verb.job) if sweeps else verb.job if _sweeps(words) else _alone(verb.job)
    task = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(job)
    given, sys.argv = sys.argv, ["whence", *flags, f"hydra.job.name={verb.name}", *own, *overrides]
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit
    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigProblems([composition_problem(error)]) from error
    except SystemExit:
        sweeps = False  # there are seconds left, if that
        raise
    finally:
        if sweeps:
            _finish_sweep()
        sys.argv = given
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _sweeps(words: list[str]) -> bool:
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(words))


def _alone(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A job whose error ends the command; in a sweep the other jobs go on."""

    @functools.wraps(job)
    def run(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except Exception as error:
            raise JobStopped(error) from error

    return run


def _in_sweep(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A job of a sweep: it leaves a record for the table; it may run in another process than this one."""

    @functools.wraps(job)
    def run(cfg: DictConfig) -> None:
        from pipelines.sweep import recorded

        try:
            with recorded():
                job(cfg)
        except Exception as error:
            raise JobFailed(str(error), _status(error)) from error  # which is in the log already

    return run


def _finish_sweep() -> None:
    from pipelines.sweep import finish_sweep

    sys.stdout.write(f"\n{finish_sweep()}\n")


def _status(error: Exception) -> int:
    return REFUSED if isinstance(error, (ConfigError, ConfigProblems)) else FAILED


def _unknown_verb(words: list[str]) -> str:
    names = [verb.name for verb in VERBS]
    listing = f"Verbs: {', '.join(names)}. Help: whence --help"
    if not words:
        return f"What shall be done? {listing}"
    return f"{words[0]}: the first word must be a verb.{did_you_mean(words[0], names)} {listing}"


def _ready() -> str:
    return ", ".join(verb.name for verb in VERBS if verb.ready)


def _refuse(name: str, text: str) -> int:
    sys.stderr.write(f"{name}: {text}\n")
    return REFUSED
