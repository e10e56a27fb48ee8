"""Which weight ε of an added point is small enough for its response to be linear in ε, and the proof that it is.

S sample points, Q measurements; response_SQ: (f_q(θ(ε)) − f_q(θˢ)) / ε, which does not depend on ε where it is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FACTOR = 4  # between the rungs of the ladder
RUNGS = 9  # from 1/N down to 4⁻⁸/N
TOLERANCE = 0.05  # difference up to which a response is called linear


@dataclass(frozen=True)
class Tried:
    """Responses of the sample at one ε, and which of their objectives were minimised."""

    response_SQ: Tensor
    converged_S: Tensor


@dataclass(frozen=True)
class Comparison:
    """Responses at ε and at a quarter of it.

    Attributes:
        epsilon: ε.
        smaller: what it was compared with.
        difference: root mean square over sample points of ‖r(ε) − r(ε/4)‖ / ‖r(ε/4)‖, norms over measurements; at
            least 1 for a point whose objective was not minimised.
        worst: the largest of these.
        slope: of r(ε) over r(ε/4), by least squares through the origin, all points and measurements together.
        correlation: Pearson's, of the same.
    """

    epsilon: float
    smaller: float
    difference: float
    worst: float
    slope: float
    correlation: float


@dataclass(frozen=True)
class Chosen:
    """An ε, and the comparisons that led to it, from the largest down."""

    epsilon: float
    given: bool
    comparisons: tuple[Comparison, ...]

    @property
    def linear(self) -> bool:
        """Whether responses at this ε are linear to the tolerance."""
        return next(each for each in self.comparisons if each.epsilon == self.epsilon).difference <= TOLERANCE

    def as_json(self) -> dict[str, Any]:
        """For `responses.json`."""
        rows = [asdict(each) for each in self.comparisons]
        chosen_by = "given" if self.given else "linearity"
        return {"epsilons": rows, "chosen_by": chosen_by, "tolerance": TOLERANCE, "linear": self.linear}


def choose(respond: Callable[[float], Tried], size: int, epsilon: float | None = None) -> Chosen:
    """The largest ε of 1/N, 1/4N, 1/16N ... at which responses are linear, or the one that comes nearest to it.

    Args:
        respond: the responses of the sample points at an ε.
        size: N.
        epsilon: a given ε, which is only compared with a quarter of it.
    """
    first = 1 / size if epsilon is None else epsilon
    ladder = [first / FACTOR**rung for rung in range(RUNGS if epsilon is None else 2)]
    comparisons: list[Comparison] = []
    before = respond(ladder[0])
    for larger, smaller in pairwise(ladder):
        after = respond(smaller)
        comparisons.append(compare(before, after, larger, smaller))
        if comparisons[-1].difference <= TOLERANCE:
            break
        before = after
    best = min(comparisons, key=lambda each: each.difference)
    return Chosen(best.epsilon, epsilon is not None, tuple(comparisons))


def compare(larger: Tried, smaller: Tried, epsilon: float, quarter: float) -> Comparison:
    """How far responses at two ε agree; points without any response at both say nothing."""
    norm_S = smaller.response_SQ.norm(dim=1)
    off_S = (larger.response_SQ - smaller.response_SQ).norm(dim=1)
    share_S = torch.where(norm_S > 0, off_S / norm_S.clamp_min(1e-300), (off_S > 0).double())
    share_S = torch.where(larger.converged_S & smaller.converged_S, share_S, share_S.clamp_min(1.0))
    x, y = smaller.response_SQ.flatten(), larger.response_SQ.flatten()
    slope = float(x @ y / (x @ x)) if bool(x.any()) else 1.0
    pair = torch.stack([x, y])
    constant = bool((pair.std(dim=1, correction=0) == 0).any())
    correlation = 1.0 if constant else float(torch.corrcoef(pair)[0, 1])
    return Comparison(epsilon, quarter, float(share_S.square().mean().sqrt()), float(share_S.max()), slope, correlation)


def sample(norms_P: Tensor, count: int) -> Sequence[int]:
    """Points to try ε on: half of them those of the largest gradients, which are the least linear, half spread evenly.

    Args:
        norms_P: of the points' gradients.
        count: how many.
    """
    order = norms_P.argsort(descending=True).tolist()
    largest, rest = order[: count // 2], order[count // 2 :]
    spread = torch.linspace(0, len(rest) - 1, min(count - len(largest), len(rest))).round().long().tolist()
    return sorted({*largest, *(rest[index] for index in spread)})
