"""Stage `dataset`: the data that a small network learns, split and normalised, as every later step reads it."""

from __future__ import annotations

from pipelines.steps import StageContext, StageResult
from pipelines.validation.datasets import SETS, Table, load

TENSORS = "split.safetensors"
RECORD = "dataset.json"


def run(context: StageContext) -> StageResult:
    """Write `split.safetensors` (x_train, y_train, x_valid, y_valid, x_test, y_test) and `dataset.json`.

    `dataset.json`: subject, train, valid, test (examples), inputs (features or channels), outputs (targets or classes),
    regression (bool), statistics (what was subtracted and divided by; `pipelines.validation.datasets.Split`).
    """
    validation, output = context.config.validation, context.artifact
    found = load(validation.subject, validation.path, validation.seed, validation.limit)
    tensors = {}
    for name, part in found.parts.items():
        tensors |= {f"x_{name}": part.inputs, f"y_{name}": part.targets}
    counts = {name: len(part.inputs) for name, part in found.parts.items()}
    output.write_tensors(TENSORS, tensors)
    record = {
        "subject": validation.subject.name,
        **counts,
        "inputs": found.inputs,
        "outputs": found.outputs,
        "regression": isinstance(SETS[validation.subject], Table),
        "statistics": dict(found.statistics),
    }
    output.write_json(RECORD, record)
    return StageResult(counts)
