"""Stage `language_halves`: the almanac's model, trained again on random halves of its documents.

Legend: Q queries, N documents, S subsets, R seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from conf.schema import RunConfig
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.retraining import documents, measured_by_seed, retrain_all, seconds_of, seed_of

SHARE = 0.5
SUBSETS = 4  # tells the draws of a validation's seed apart


def run(context: StageContext) -> StageResult:
    """Write `measured.safetensors` {measured_QSR, kept_SN} and `halves.json`.

    The JSON: `subsets`, `seeds`, `documents`, `share`, `loss` (mean a token), `seconds`, `seconds_a_training`.
    Reads of the config: `validation.seed`, `.subsets`, `.retrainings`.
    """
    config = context.config
    settings, output = config.validation, context.artifact
    kept_SN = halves(documents(config), settings.subsets, settings.seed)
    names = [[f"parts/{s:04d}-{r:02d}" for r in range(settings.retrainings)] for s in range(settings.subsets)]
    wanted = {
        name: (np.flatnonzero(kept_SN[s]).tolist(), seed_of(config, r))
        for s, row in enumerate(names)
        for r, name in enumerate(row)
    }
    found = retrain_all(context, wanted)
    measured_QSR = measured_by_seed(found, names)
    tensors = {"measured_QSR": torch.from_numpy(measured_QSR.copy()), "kept_SN": torch.from_numpy(kept_SN)}
    output.write_tensors("measured.safetensors", tensors)
    record = {
        "subsets": settings.subsets,
        "seeds": settings.retrainings,
        "documents": kept_SN.shape[1],
        "share": SHARE,
        "loss": float(np.mean([one["loss"] for one in found.values()])),
    }
    output.write_json("halves.json", record | seconds_of(found))
    return StageResult({"subsets": settings.subsets, "trainings": len(wanted)})


def halves(size: int, subsets: int, seed: int, share: float = SHARE) -> np.ndarray:
    """Random subsets of a share of the documents, bool [S, N]; the first are the same however many there are."""
    generator = np.random.default_rng([seed, SUBSETS])
    found_SN = np.zeros((subsets, size), dtype=bool)
    for row_N in found_SN:
        row_N[generator.choice(size, round(share * size), replace=False)] = True
    return found_SN


def identity(config: RunConfig) -> dict[str, Any]:
    """What moves the results beside the inputs."""
    settings = config.validation
    return {"seed": settings.seed, "subsets": settings.subsets, "seeds": settings.retrainings, "share": SHARE}
