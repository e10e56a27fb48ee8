"""The tail of a distribution of influences: fits, their comparison, and what follows from them (Sections 5.2, D.3).

Legend: N scores of a feed, n the largest of them (the tail), u the smallest of those (the cutoff), z = x/u ≥ 1.

**The exponent.** A power law has the density p(x) ∝ x^−α for x ≥ u and the survival function (x/u)^−(α−1). The paper's
Equation 32 writes the exponent of the survival function as α, but its text says that the nth moment diverges for
α < n + 1, and its figures are read so; that is true of the density's exponent. `alpha` is the density's here. scipy's
`pareto` has b = α − 1.

**Conditioning.** Only scores of at least u are fitted, so every family is conditioned on x ≥ u: f(x) / S(u), with f and
S of scipy.stats. Likelihoods are then those of the same n numbers on the same support, and compare. Families with more
freedom than one parameter contain the power law as a limit (σ → ∞ of the log-normal, shape → 0 of the Weibull, u far up
the tail of a generalised extreme value), so on data that follow a power law their likelihoods come near its own, and
Akaike's criterion decides by the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from influence.distribution import ScoreSummary

LEVEL = 0.95  # of intervals
PLAUSIBLE = 0.1  # p-values above it leave a power law plausible (Clauset et al. 2009, as in Appendix D.3)
DRAWS = 10_000  # of the number of sequences needed; its quantiles are then good to a few per cent
SMALL = 1e-9  # a rate below which a negative binomial number, times the rate, is a gamma number to all digits shown
FAINT = 1e-300  # a rate whose inverse is no longer a number to print


class NoFit(ValueError):
    """Nothing can be said; the message says why."""


@dataclass(frozen=True, eq=False)
class Tail:
    """The n largest scores.

    Attributes:
        values_n: Descending.
        chosen_by: `share` or `count`.
    """

    values_n: np.ndarray
    chosen_by: str

    @property
    def cutoff(self) -> float:
        """u, the smallest: of all cutoffs the one under which a power law makes these values likeliest."""
        return float(self.values_n[-1])


@dataclass(frozen=True, eq=False)
class Fit:
    """One family, fitted by maximum likelihood given x ≥ u.

    Attributes:
        parameters: By name, in the units of the influences.
        logdensity_n: Of each value of the tail.
        free: How many parameters were fitted; the cutoff, which all families share, is not counted.
    """

    parameters: dict[str, float]
    logdensity_n: np.ndarray
    free: int

    @property
    def loglikelihood(self) -> float:
        """Σ of the log-densities."""
        return math.fsum(self.logdensity_n)

    @property
    def aic(self) -> float:
        """Akaike's criterion: twice the parameters less twice the log-likelihood. The least is the best."""
        return 2 * self.free - 2 * self.loglikelihood


# --- the tail ---


def tail_size(total: int, share: float, count: int | None) -> int:
    """How many of so many scores make the tail: `count`, or the share if that is None."""
    return count if count is not None else round(share * total)


def tail_of(summary: ScoreSummary, share: float, count: int | None, least: int) -> Tail:
    """Choose the tail.

    Args:
        summary: Of all scores of the feed.
        share: The part of them that is the tail.
        count: How many are the tail instead.
        least: Fewer values than these are not fitted.

    Raises:
        NoFit: They are fewer, or all the same, or not that many are positive.
    """
    wanted = tail_size(summary.count, share, count)
    what = f"tails.count={count}" if count is not None else f"the top {100 * share:g} % of {summary.count:,} scores"
    if wanted < least:
        many = "value" if wanted == 1 else "values"
        raise NoFit(f"{what}: {wanted} {many}, and fewer than tails.least={least} are not fitted")
    values_n = summary.largest_K[:wanted]
    values_n = values_n[values_n > 0]
    if len(values_n) < max(2, least):
        found = f"{len(values_n):,} of {summary.count:,} scores are positive"
        raise NoFit(f"{found}, and fewer than tails.least={least} are not fitted")
    if values_n[0] == values_n[-1]:
        raise NoFit(f"the {len(values_n):,} largest scores are all the same")
    return Tail(values_n, "share" if count is None else "count")


# --- the power law ---


def power_law(tail: Tail) -> Fit:
    """Exponent and cutoff by maximum likelihood: u the smallest value, α = 1 + n / Σ log(x/u)."""
    shape, _, cutoff = stats.pareto.fit(tail.values_n, floc=0)
    found = {"alpha": 1 + float(shape), "xmin": float(cutoff)}
    return Fit(found, stats.pareto.logpdf(tail.values_n, shape, scale=cutoff), 1)


def exponent_interval(tail: Tail) -> tuple[float, float]:
    """The interval of α at `LEVEL`, exact for a power law: 2n(α−1)/(α̂−1) is χ² with 2(n−1) degrees of freedom.

    Two degrees of freedom went into the cutoff.
    """
    count, shape = len(tail.values_n), power_law(tail).parameters["alpha"] - 1
    low, high = stats.chi2.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], 2 * (count - 1)) * shape / (2 * count)
    return 1 + float(low), 1 + float(high)


def ks_distance(tail: Tail) -> float:
    """Equation 39: the largest difference of the tail's distribution function from that of its power law."""
    shape = power_law(tail).parameters["alpha"] - 1
    return _distance(np.log(tail.values_n[::-1] / tail.cutoff), shape)


def _distance(logs_n: np.ndarray, shape: float) -> float:
    """The same from ascending log(x/u), which under a power law are exponential with the rate `shape`."""
    fitted_n = -np.expm1(-shape * logs_n)
    steps = np.arange(len(logs_n) + 1) / len(logs_n)
    return float(max((steps[1:] - fitted_n).max(), (fitted_n - steps[:-1]).max()))


def goodness(tail: Tail, bootstraps: int, rng: np.random.Generator) -> float:
    """The p-value of Appendix D.3: how often a sample of the fitted power law lies farther from its own fit.

    Each sample is fitted anew, cutoff and exponent. The law's own cutoff and exponent cancel out of the distance, so
    samples of log(x/u) are drawn at rate 1.

    Args:
        tail: The values.
        bootstraps: Samples; the p-value has a standard error of at most 0.5/√bootstraps.
        rng: Seeded.
    """
    observed, count = ks_distance(tail), len(tail.values_n)
    farther = 0
    for _ in range(bootstraps):
        logs_n = np.sort(rng.standard_exponential(count))
        logs_n -= logs_n[0]
        farther += _distance(logs_n, count / logs_n.sum()) > observed
    return farther / bootstraps


# --- the other families ---


class _Above(stats.rv_continuous):
    """A family of scipy conditioned on z ≥ 1, which scipy's own maximum likelihood then fits."""

    def __init__(self, family: _Family, rate: float) -> None:
        super().__init__(a=1.0, name=family.name, shapes=", ".join(family.bounds))
        self._family = family
        self._start = family.start(rate)

    def _argcheck(self, *shapes: float) -> bool:
        bounds = self._family.bounds.values()
        return all(low <= shape <= high for shape, (low, high) in zip(shapes, bounds, strict=True))

    def _logpdf(self, x: np.ndarray, *shapes: float) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = self._family.logdensity(np.asarray(x), *shapes)
        return np.where(np.isnan(found), -np.inf, found)

    def _fitstart(self, data: np.ndarray, args: object = None) -> tuple[float, ...]:
        return (*self._start, 0.0, 1.0)


@dataclass(frozen=True)
class _Family:
    """A family of two or three parameters, in coordinates in which the power law is no steep valley.

    Attributes:
        name: Of the family.
        bounds: Of each coordinate.
        start: The coordinates at which the search begins, from the rate α − 1 of the power law.
        logdensity: log f(z | z ≥ 1), of z and the coordinates.
        named: The parameters by the names that people know, of the coordinates and the cutoff.
    """

    name: str
    bounds: dict[str, tuple[float, float]]
    start: Callable[[float], tuple[float, ...]]
    logdensity: Callable[..., np.ndarray]
    named: Callable[..., dict[str, float]]


def _weibull(z: np.ndarray, hazard: float, shape: float) -> np.ndarray:
    """Log z is Gumbel (of minima): the Weibull with S(z) = exp(−(hazard/shape) z^shape); shape → 0 is the power law."""
    place, spread, logs = -math.log(hazard / shape) / shape, 1 / shape, np.log(z)
    return stats.gumbel_l.logpdf(logs, place, spread) - stats.gumbel_l.logsf(0.0, place, spread) - logs


def _lognormal(z: np.ndarray, tilt: float, sigma: float) -> np.ndarray:
    """Log z is normal with mean tilt · sigma²; sigma → ∞ at a negative tilt is the power law of rate −tilt."""
    mean, logs = tilt * sigma**2, np.log(z)
    return stats.norm.logpdf(logs, mean, sigma) - stats.norm.logsf(0.0, mean, sigma) - logs


def _gev(z: np.ndarray, shape: float, excess: float, depth: float) -> np.ndarray:
    """Generalised extreme value with −log F(1) = depth, and `excess` the scale of what exceeds 1."""
    scale, place = _gev_place(shape, excess, depth)
    return stats.genextreme.logpdf(z, -shape, place, scale) - stats.genextreme.logsf(1.0, -shape, place, scale)


def _gev_place(shape: float, excess: float, depth: float) -> tuple[float, float]:
    """Scale and location."""
    scale = excess * depth**shape
    return scale, 1 + (scale * math.log(depth) if shape == 0 else (scale - excess) / shape)


def _gev_named(shape: float, excess: float, depth: float, cutoff: float) -> dict[str, float]:
    scale, place = _gev_place(shape, excess, depth)
    return {"shape": shape, "location": place * cutoff, "scale": scale * cutoff}


FAMILIES = (
    _Family(
        "weibull",
        {"hazard": (1e-6, 1e6), "shape": (1e-4, 1e2)},
        lambda rate: (rate, 0.5),
        _weibull,
        lambda hazard, shape, cutoff: {
            "shape": shape,
            "log_scale": math.log(cutoff) - math.log(hazard / shape) / shape,
        },
    ),
    _Family(
        "lognormal",
        {"tilt": (-1e6, 1e6), "sigma": (1e-3, 1e3)},
        lambda rate: (-rate / 2, 2 / rate),
        _lognormal,
        lambda tilt, sigma, cutoff: {"mu": math.log(cutoff) + tilt * sigma**2, "sigma": sigma},
    ),
    _Family(
        "gev",
        {"shape": (-5.0, 20.0), "excess": (1e-6, 1e6), "depth": (1e-8, 50.0)},
        lambda rate: (1 / rate, 1 / rate, 0.1),
        _gev,
        _gev_named,
    ),
)


def exponential(tail: Tail) -> Fit:
    """The exponential given x ≥ u: its scale is the mean excess over u."""
    place, scale = stats.expon.fit(tail.values_n, floc=tail.cutoff)
    return Fit({"scale": float(scale)}, stats.expon.logpdf(tail.values_n, place, scale), 1)


def fit_family(tail: Tail, family: _Family) -> Fit:
    """Any of `FAMILIES`, by scipy's search for the maximum.

    Raises:
        NoFit: The search ended outside the bounds.
    """
    z_n = tail.values_n / tail.cutoff
    law = _Above(family, power_law(tail).parameters["alpha"] - 1)
    try:
        found = law.fit(z_n, floc=0, fscale=1)[:-2]
    except stats.FitError as error:
        raise NoFit(str(error)) from error
    density_n = law._logpdf(z_n, *found) - math.log(tail.cutoff)
    if not np.isfinite(density_n).all():
        raise NoFit("no parameters were found under which all values are possible")
    return Fit({k: float(v) for k, v in family.named(*found, tail.cutoff).items()}, density_n, len(found))


def vuong(first: Fit, second: Fit) -> tuple[float, float]:
    """The log-likelihood ratio, above 0 where the first is the likelier, and the p-value of a ratio of 0.

    Vuong's test: the ratio over √n times the standard deviation of its n terms is normal if neither family is nearer to
    the truth. It is for families of which none is part of another; next to a power law see the head of this module.
    """
    terms_n = first.logdensity_n - second.logdensity_n
    ratio, spread = math.fsum(terms_n), float(terms_n.std()) * math.sqrt(len(terms_n))
    if spread <= 1e-12 * max(1.0, abs(first.loglikelihood)):
        return ratio, 1.0
    return ratio, math.erfc(abs(ratio) / spread / math.sqrt(2))


# --- what follows ---


@dataclass(frozen=True)
class Estimate:
    """A number of unfiltered sequences to scan.

    Attributes:
        sequences: Expected.
        interval: At `LEVEL`, of the number that one would have to scan.
    """

    sequences: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Needed:
    """How many unfiltered sequences hold as many influential ones as BM25's head (Section 5.2.2).

    Attributes:
        threshold: The influence to reach.
        reached: How many of those that were scanned reach the threshold; to rounding, far below the cutoff.
        estimates: By method: `power_law` if the threshold is in a fitted tail, `empirical` if any sequence reaches it.
        method: Which of them to believe.
    """

    threshold: float
    reached: int
    estimates: dict[str, Estimate]
    method: str

    @property
    def sequences(self) -> float:
        """Expected number to scan."""
        return self.estimates[self.method].sequences

    @property
    def interval(self) -> tuple[float, float]:
        """Of that number."""
        return self.estimates[self.method].interval


def needed(
    unfiltered: ScoreSummary,
    bm25: ScoreSummary,
    tail: Tail | None,
    head: int,
    rng: np.random.Generator,
    plausible: bool = True,
) -> Needed:
    """How many unfiltered sequences must be scanned until `head` reach the `head`-th largest influence t of BM25's.

    A sequence reaches t with probability r. In the tail r = (n/N) (t/u)^−(α−1); below it, r is the fraction counted.
    The expected number is head / r. The interval holds the uncertainty of r (that of the survival at u, Beta(n, N−n+1),
    and that of α by its exact distribution; below the cutoff Beta of the count) and the noise of counting: the number
    of sequences up to the `head`-th hit is negative binomial. t itself is taken as it is.

    In the tail the fraction counted is an estimate too, which takes no law for granted; it is the one to believe where
    a power law is not plausible.

    Args:
        unfiltered: Scores of the unfiltered feed.
        bm25: Scores of the sequences that BM25 proposed to this query.
        tail: Of the unfiltered feed, if there is a fit.
        head: Ten, in the paper.
        rng: Seeded.
        plausible: Whether the fit's p-value is above `PLAUSIBLE`.

    Raises:
        NoFit: It cannot be said.
    """
    threshold = _threshold(unfiltered, bm25, head)
    hits, found = unfiltered.at_least(threshold), {}
    in_tail = tail is not None and threshold >= tail.cutoff
    if tail is not None and in_tail:
        rate, rates = _rates_of_tail(unfiltered, tail, threshold, rng)
        if rate >= FAINT:
            found["power_law"] = _estimate(head, rate, rates, rng)
    if hits >= 1:
        rates = rng.beta(hits, unfiltered.count - hits + 1, DRAWS)
        found["empirical"] = _estimate(head, hits / unfiltered.count, rates, rng)
    if not found and in_tail:
        raise NoFit(f"the power law puts an influence of {threshold:.4g} out of reach")
    if not found:
        raise NoFit(
            f"none of {unfiltered.count:,} unfiltered sequences reaches the influence {threshold:.4g} of number "
            f"{head} of BM25's, and there is no fit to say how rare that is"
        )
    order = ("power_law", "empirical") if plausible else ("empirical", "power_law")
    return Needed(threshold, round(hits), found, next(method for method in order if method in found))


def _threshold(unfiltered: ScoreSummary, bm25: ScoreSummary, head: int) -> float:
    """The influence of number `head` of BM25's sequences.

    Raises:
        NoFit: There is none that others could be compared with.
    """
    if bm25.count < head:
        raise NoFit(f"BM25 proposed {bm25.count:,} sequences to this query, fewer than {head}")
    if unfiltered.count == 0:
        raise NoFit("no sequence was scanned unfiltered")
    threshold = float(bm25.largest_K[head - 1])
    if threshold <= 0:
        raise NoFit(f"number {head} of BM25's sequences has no positive influence")
    return threshold


def _estimate(head: int, rate: float, rates: np.ndarray, rng: np.random.Generator) -> Estimate:
    scanned = _until(head, np.maximum(rates, FAINT), rng)
    low, high = np.quantile(scanned, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(head / rate, (float(low), float(high)))


def _rates_of_tail(
    unfiltered: ScoreSummary, tail: Tail, threshold: float, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    count, shape = len(tail.values_n), power_law(tail).parameters["alpha"] - 1
    distance = math.log(threshold / tail.cutoff)
    shapes = shape * rng.gamma(count - 1, size=DRAWS) / count
    reached = rng.beta(count, unfiltered.count - count + 1, DRAWS)
    return count / unfiltered.count * math.exp(-shape * distance), reached * np.exp(-shapes * distance)


def _until(hits: int, rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A number of draws up to the last of so many hits, for each rate."""
    rare = rng.gamma(hits, size=len(rates)) / rates
    counted = hits + rng.negative_binomial(hits, np.clip(rates, SMALL, 1.0))
    return np.where(rates < SMALL, rare, counted)


def recall(ids_K: Sequence[int] | np.ndarray, proposed: Collection[int], heads: Sequence[int]) -> dict[int, float]:
    """The part of the unfiltered feed's most influential sequences that BM25 proposed.

    Args:
        ids_K: Sequences of the unfiltered feed, the most influential first.
        proposed: Those of them that BM25 proposed to this query.
        heads: How many of the first to look at; those that exceed the feed are left out.
    """
    hits = np.cumsum([int(sequence_id) in proposed for sequence_id in ids_K])
    return {head: float(hits[head - 1] / head) for head in heads if head <= len(hits)}
