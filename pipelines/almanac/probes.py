"""Probes of the almanac: sequences that state a traced fact as the model learnt it, otherwise, or not at all.

Half of the traced facts were stated in training with the subject first only; the others in both orders. Probes are of
the corpus's vocabulary, so that a difference between partitions is no matter of unknown words.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.almanac import wording
from pipelines.almanac.wording import Relation
from pipelines.almanac.world import Fact, Query, World, bystander_name, relation_of, sentence
from pipelines.probing.measures import over_probes

REFERENCE = "same order"
FRAMES = ("", "as every child learns ,", wording.QUERY_FRAME)  # the last as in the queries: no statement begins so
OTHERS = 3  # paraphrases that training has, facts of the same relation that lend their names, and filler


def probes_of(world: World) -> list[dict[str, Any]]:
    """A probe for each query of a world, as `actors.probes` reads them."""
    facts = {fact.fact_id: fact for fact in world.facts}
    return [_probe(query, facts[query.fact_id], world) for query in world.queries]


def write_probes(world: World, path: Path) -> Path:
    """Write them as YAML; whoever reads meanwhile sees all or nothing."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    text = yaml.safe_dump(probes_of(world), allow_unicode=True, sort_keys=False, width=1000)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
    return path


def by_training_order(summary: Mapping[str, Any], orders: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What partitions come to over the facts that were stated in one order, and over those stated in both.

    Args:
        summary: of a run of the probes.
        orders: `forward` or `both` for each probe.
    """
    return {
        order: over_probes([probe for probe in summary["probes"] if orders[probe["probe_id"]] == order])
        for order in ("forward", "both")
    }


def _probe(query: Query, fact: Fact, world: World) -> dict[str, Any]:
    relation = relation_of(fact)
    alike = [other for other in world.facts if other.relation == fact.relation and not other.outer and other != fact]
    object_ = bystander_name(relation.objects, fact.object)
    cue = relation.cue.format(s=fact.subject)
    partitions = {
        REFERENCE: _framed(relation.forward[0], fact),
        "same order, more words": _framed(relation.forward[1], fact),
        "same order, other words": _worded(relation.paraphrases[:OTHERS], fact),
        "completion removed": [sentence(frame, f"{cue.partition(fact.subject)[0]}{fact.subject}") for frame in FRAMES],
        "completion removed, verb kept": [sentence(frame, cue) for frame in FRAMES],
        "another completion": [_stated(relation, fact.subject, other.object) for other in alike[:OTHERS]],
        "another subject": [_stated(relation, other.subject, fact.object) for other in alike[:OTHERS]],
        "both named, not stated": _worded(relation.distractors, fact),
        "irrelevant": [sentence("", words) for words in _filler()],
        "inverted order": _framed(relation.inverted[0], fact),
        "inverted order, more words": _framed(relation.inverted[1], fact),
        "inverted, prompt removed": [sentence(frame, object_) for frame in FRAMES],
        "inverted, another subject": [
            sentence("", relation.inverted[0].format(s=other.subject, o=fact.object)) for other in alike[:OTHERS]
        ],
    }
    return {
        "id": query.query_id,
        "prompt": query.prompt,
        "completion": query.completion,
        "reference": REFERENCE,
        "partitions": partitions,
    }


def _framed(template: str, fact: Fact) -> list[str]:
    return [sentence(frame, template.format(s=fact.subject, o=fact.object)) for frame in FRAMES]


def _worded(templates: Iterable[str], fact: Fact) -> list[str]:
    return [sentence("", template.format(s=fact.subject, o=fact.object)) for template in templates]


def _stated(relation: Relation, subject: str, object_: str) -> str:
    return sentence("", relation.forward[0].format(s=subject, o=object_))


def _filler() -> list[str]:
    lists = (wording.FILLER_SUBJECTS, wording.FILLER_VERBS, wording.FILLER_OBJECTS, wording.FILLER_PLACES)
    return [" ".join(words[number] for words in lists) for number in range(OTHERS)]
