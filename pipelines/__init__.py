"""whence: which training sequences made a language model say this?

from pipelines import trace
result = trace("model.path=...", "corpus.path=...", "queries.path=...")
result.top.to_pandas()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.probing import ProbeResult
    from pipelines.tracing import TraceResult
    from pipelines.validation.run import ValidationResult

__all__ = ["probe", "trace", "validate"]


def trace(*overrides: str, run_dir: str | Path | None = None) -> TraceResult:
    """Run a trace from Python, as `whence trace OVERRIDES` does from a shell.

    Args:
        overrides: Hydra overrides, such as `"model.path=gpt2"` and `"queries.rank=64"`.
        run_dir: folder of the run; by default one under `runs/` named by date and time.

    Returns:
        The run's folder, summary, top sequences and scores.

    Raises:
        ConfigProblems: listing every setting that is not allowed.
        WhenceError: for bad input or work that keeps failing.
    """
    from datetime import datetime

    from conf.load import compose_config
    from pipelines.tracing import run_trace

    config = compose_config(list(overrides))
    folder = run_dir or Path("runs") / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return run_trace(config, folder)


def probe(*overrides: str, run_dir: str | Path | None = None) -> ProbeResult:
    """Score sequences of one's own from Python, as `whence probe OVERRIDES` does from a shell.

    Args:
        overrides: Hydra overrides, such as `"probe.path=probes.yaml"`.
        run_dir: folder of the run; by default one under `runs/` named by date and time.

    Returns:
        The run's folder, summary and sequences.

    Raises:
        ConfigProblems: listing every setting that is not allowed.
        WhenceError: for a file that cannot be used or work that keeps failing.
    """
    from datetime import datetime

    from conf.keys import PROBE_PATHS
    from conf.load import compose_config
    from pipelines.probing import run_probe

    config = compose_config(["name=probe", *overrides], needs=PROBE_PATHS)
    folder = run_dir or Path("runs") / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return run_probe(config, folder)


def validate(*overrides: str, run_dir: str | Path | None = None) -> ValidationResult:
    """Compare methods with measured responses from Python, as `whence validate OVERRIDES` does from a shell.

    Args:
        overrides: Hydra overrides, such as `"experiment=concrete"`.
        run_dir: folder of the run; by default one under `runs/` named by date and time.

    Returns:
        The run's folder, and what was found.

    Raises:
        ConfigProblems: listing every setting that is not allowed.
        WhenceError: for data that cannot be used or work that keeps failing.
    """
    from datetime import datetime

    from conf.keys import validation_paths
    from conf.load import compose_config
    from pipelines.validation.run import run_validation

    named = any(word.startswith("experiment=") for word in overrides)
    config = compose_config([*(() if named else ("name=validate",)), *overrides], needs=validation_paths)
    folder = run_dir or Path("runs") / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return run_validation(config, folder)
