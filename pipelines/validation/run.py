"""The job of `whence validate`: the steps, then the run's folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.store import Artifact, Store
from conf.schema import RunConfig, Subject
from pipelines.cluster import Cluster
from pipelines.runner import Runner, StageOutcome
from pipelines.validation.graph import build_validation_steps
from pipelines.validation.presentation.folder import write_folder
from pipelines.validation.presentation.markdown import terminal
from pipelines.validation.results.document import summarise, write_pairs

log = logging.getLogger(__name__)

DOCUMENT = "validation.json"


@dataclass(frozen=True)
class ValidationResult:
    """What a validation left.

    Attributes:
        run_dir: folder of the run.
        document: the content of `validation.json`; its studies are described in `pipelines.validation.results`.
        outcomes: what became of each step, with its artifact.
    """

    run_dir: Path
    document: Mapping[str, Any]
    outcomes: Mapping[str, StageOutcome]

    @property
    def page_path(self) -> Path:
        """Tables and plots of all studies, and what they mean."""
        return self.run_dir / "validation.html"

    def artifact(self, step: str) -> Artifact:
        """The artifact of a step."""
        return self.outcomes[step].artifact

    def table(self) -> str:
        """The tables, for a terminal."""
        return terminal(self.document)


def run_validation(config: RunConfig, run_dir: str | Path) -> ValidationResult:
    """Measure responses and retrain as far as the settings say, compare every method with them, and write the folder.

    Args:
        config: the run; `config.validation` says what is measured.
        run_dir: folder to write; it is created.

    Returns:
        What the run left.

    Raises:
        WhenceError: for data that cannot be used, or work that keeps failing; the message names the remedy.
    """
    started = time.time()
    folder = Path(run_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    config = prepared(config)
    steps = build_validation_steps(config)
    outcomes = Runner(Store(config.store), steps, config, lambda: Cluster(config)).run()
    document = summarise(config, outcomes, started)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8", errors="replace")
    write_pairs(folder, outcomes)
    write_folder(folder, document)
    result = ValidationResult(folder, document, outcomes)
    log.info("page of the validation: %s", result.page_path)
    return result


def prepared(config: RunConfig) -> RunConfig:
    """A config whose language model, if it has one, is there: the almanac is generated and trained on here."""
    if config.validation.subject not in (Subject.almanac, Subject.language):
        return config
    from pipelines.validation.language.subject import prepare

    return prepare(config)
