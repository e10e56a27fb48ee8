"""Names of methods and data sets as people read them, and a colour for each method in all plots."""

from __future__ import annotations

import re
from collections.abc import Iterable

from conf.schema import Subject
from pipelines.plots.style import CATEGORIES

METHODS = {
    "identity": "gradient dot product",
    "kfac": "K-FAC",
    "ekfac": "EK-FAC",
    "lissa": "LiSSA",
    "ekfac_cg": "EK-FAC + CG",
    "exact": "exact Gauss-Newton",
    "bm25": "BM25",
    "bm25_ekfac": "BM25 → EK-FAC",
    "bm25_ekfac_cg": "BM25 → EK-FAC + CG",
    "random": "random order",
    "response": "linear response",
    "pbo": "objective of Equation 7",
}
COLOURS = {
    "identity": CATEGORIES[6],
    "kfac": CATEGORIES[5],
    "ekfac": CATEGORIES[0],
    "lissa": CATEGORIES[4],
    "ekfac_cg": CATEGORIES[2],
    "exact": CATEGORIES[3],
    "bm25": CATEGORIES[7],
    "bm25_ekfac": CATEGORIES[1],
    "random": "#a7adb5",
}
SUBJECTS = {
    Subject.concrete.name: "Concrete",
    Subject.energy.name: "Energy",
    Subject.mnist.name: "MNIST",
    Subject.fashion_mnist.name: "FashionMNIST",
    Subject.cifar10.name: "CIFAR-10",
    Subject.almanac.name: "almanac",
    Subject.language.name: "language model",
    Subject.facts.name: "facts",
}
BLOCKS = re.compile(r"(\w+)_blocks_(\d+)")


def method(name: str) -> str:
    """What a method is called: `ekfac_blocks_2` is EK-FAC with factors of 2 blocks."""
    found = BLOCKS.fullmatch(name)
    if found:
        return f"{METHODS.get(found[1], found[1])}, {found[2]} blocks"
    return METHODS.get(name, name)


def ordered(names: Iterable[str]) -> list[str]:
    """Methods in the one order of all tables and plots; variants come last, fewest blocks first."""
    order = list(METHODS)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), blocks(name)))


def blocks(name: str) -> int:
    """Diagonal blocks of a method's factors."""
    found = BLOCKS.fullmatch(name)
    return int(found[2]) if found else 1


def colour(name: str) -> str:
    """The colour of a method; variants have that of what they vary."""
    found = BLOCKS.fullmatch(name)
    return COLOURS.get(found[1] if found else name, CATEGORIES[6])


def pair(name: str) -> str:
    """What a paired difference is called: `ekfac - lissa`."""
    first, _, second = name.partition(" - ")
    return f"{method(first)} − {method(second)}"


def title(document_name: str, subject: str) -> str:
    """A run in a legend: its data set, and its name where that says more; of a language model its name alone."""
    known = SUBJECTS.get(subject, subject)
    plain = {f"validate_{subject}", "validate"}
    if subject == Subject.language.name and document_name not in plain:
        return document_name.removeprefix("validate_")
    return known if document_name in plain else f"{known} ({document_name})"
