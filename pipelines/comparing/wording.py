"""How a comparison is put into words: values, and what its measures are."""

from __future__ import annotations

from pipelines.comparing.agreement import Comparison, Pair
from pipelines.comparing.matching import Matching

NAMED = 10  # queries that were left out


def shown(value: object) -> str:
    """A value for people to read."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def printable(line: str) -> str:
    """Text without what could steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in line)


def legend(comparison: Comparison) -> str:
    """What the measures are, and what was left out."""
    parts = ["top10, top100: share of the first 10 and 100 sequences that both runs have among theirs."]
    if comparison.how is Matching.document:
        parts.append(
            "The runs cut their corpus differently: sequences at the beginning of the same document are compared."
        )
    if comparison.share < 1:
        parts.append(
            f"spearman: of a sample of about {comparison.share:.2%} of the sequences (seed {comparison.seed})."
        )
    if any(pair.common < 0.9 * _most_scanned(comparison, pair) for pair in comparison.pairs):
        parts.append("Some runs scanned different sequences: correlations are over those that both scanned.")
    left_out = comparison.shared.left_out
    if left_out:
        listed = [f"{name} ({why})" for name, why in list(left_out.items())[:NAMED]]
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        parts.append(f"Queries left out: {', '.join(listed)}{more}.")
    return printable(" ".join(parts))


def _most_scanned(comparison: Comparison, pair: Pair) -> int:
    if comparison.how is Matching.document:
        return 0  # nobody counted the documents
    return max(comparison.runs[place].scanned for place in (pair.first, pair.second))
