"""Stage `language_removal`: drop a query's most influential documents by every method, train again, measure the query.

Legend: Q queries, N documents, R seeds, D random draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conf.schema import RunConfig
from pipelines.almanac.evaluate import ranks
from pipelines.steps import StageContext, StageResult
from pipelines.validation.language.intervals import interval, over_queries
from pipelines.validation.language.retraining import documents, retrain_all, seconds_of, seed_of
from pipelines.validation.language.scores import methods_and_curve

METHODS = ("identity", "ekfac", "ekfac_cg", "exact", "bm25")
DRAWS = 6  # of random documents, each of which serves all queries
REMOVED = 5  # tells the draws of a validation's seed apart

Sets = dict[str, frozenset[int]]


def run(context: StageContext) -> StageResult:
    """Write `removal.json`: `share`, `dropped`, `documents`, `seeds`, `draws`, `base`, `methods`,
    `seconds`, `seconds_a_training`.

    `base`: the measurement of each query, trained on all documents. `methods`: as `changes` gives them, random among
    them. Reads of the config: `validation.seed`, `.removal`, `.retrainings`.
    """
    config = context.config
    settings, size = config.validation, documents(config)
    dropped = max(1, round(settings.removal * size))
    ids = [query["query_id"] for query in context.inputs["language_scores"].read_json("scores.json")["queries"]]
    scores = methods_and_curve(context.inputs)[0]
    chosen = {name: [top(scores_N, dropped) for scores_N in scores[name]] for name in METHODS}
    draws = random_sets(size, dropped, DRAWS, settings.seed)
    everything = [frozenset[int](), *draws, *(one for row in chosen.values() for one in row)]
    names = {one: f"parts/set-{number:04d}" for number, one in enumerate(dict.fromkeys(everything))}
    wanted = {
        f"{name}-{r:02d}": ([number for number in range(size) if number not in one], seed_of(config, r))
        for one, name in names.items()
        for r in range(settings.retrainings)
    }
    found = retrain_all(context, wanted)

    def measured_RQ(one: frozenset[int]) -> np.ndarray:
        return np.asarray([found[f"{names[one]}-{r:02d}"]["measured"] for r in range(settings.retrainings)])

    base_RQ = measured_RQ(frozenset())
    change_Q = {
        name: np.asarray([(measured_RQ(one) - base_RQ).mean(0)[q] for q, one in enumerate(row)])
        for name, row in chosen.items()
    }
    random_Q = np.mean([(measured_RQ(one) - base_RQ).mean(0) for one in draws], axis=0)
    record = {
        "share": settings.removal,
        "dropped": dropped,
        "documents": size,
        "seeds": settings.retrainings,
        "draws": DRAWS,
        "base": dict(zip(ids, base_RQ.mean(0).tolist(), strict=True)),
        "methods": changes(change_Q | {"random": random_Q}, ids),
    }
    context.artifact.write_json("removal.json", record | seconds_of(found))
    return StageResult({"trainings": len(wanted), "dropped": dropped})


def top(scores_N: np.ndarray, count: int) -> frozenset[int]:
    """The documents of the highest scores."""
    return frozenset(np.flatnonzero(ranks(scores_N) <= count).tolist())


def random_sets(size: int, count: int, draws: int, seed: int) -> list[frozenset[int]]:
    """Documents drawn at random."""
    generator = np.random.default_rng([seed, REMOVED])
    return [frozenset(generator.choice(size, count, replace=False).tolist()) for _ in range(draws)]


def changes(change_Q: Mapping[str, np.ndarray], query_ids: Sequence[str]) -> dict[str, Any]:
    """The change of the measurement by every method, and its paired difference to random and to BM25.

    Returns:
        By method `mean` over queries, `interval` (Student's t over queries), `by_query`; `against_random` and
        `against_bm25`: `mean` and `interval` of the difference, negative where the method's documents mattered more.
    """
    found = {}
    for name, values_Q in change_Q.items():
        found[name] = over_queries(values_Q, query_ids) | {
            f"against_{other}": _difference(values_Q - change_Q[other])
            for other in ("random", "bm25")
            if other in change_Q and other != name
        }
    return found


def identity(config: RunConfig) -> dict[str, Any]:
    """What moves the results beside the inputs."""
    settings = config.validation
    fixed = {"methods": list(METHODS), "draws": DRAWS}
    return fixed | {"seed": settings.seed, "share": settings.removal, "seeds": settings.retrainings}


def _difference(values_Q: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values_Q.mean()), "interval": interval(values_Q)}
