"""Fits to tails: data of a known law, scipy's closed forms, brute force, how often an interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from influence.distribution import ScoreSummary
from influence.tails import (
    FAMILIES,
    Estimate,
    Fit,
    NoFit,
    Tail,
    _Above,
    exponent_interval,
    exponential,
    fit_family,
    goodness,
    ks_distance,
    needed,
    power_law,
    recall,
    tail_of,
    vuong,
)

BY_NAME = {family.name: family for family in FAMILIES}


def descending(values: np.ndarray) -> Tail:
    return Tail(np.sort(values)[::-1], "count")


def pareto(size: int, alpha: float, seed: int, cutoff: float = 0.3) -> Tail:
    return descending(stats.pareto(alpha - 1, scale=cutoff).rvs(size, random_state=seed))


def tail_above(law: stats.rv_continuous, cutoff: float, size: int, seed: int) -> Tail:
    """A sample of a law of scipy given x ≥ cutoff, by the inverse of its survival function."""
    uniform = np.random.default_rng(seed).random(size)
    return descending(law.isf(law.sf(cutoff) * uniform))


def every_fit(tail: Tail) -> dict[str, Fit]:
    found = {"power_law": power_law(tail), "exponential": exponential(tail)}
    return found | {family.name: fit_family(tail, family) for family in FAMILIES}


# --- the power law ---


def test_the_exponent_is_that_of_the_density_and_its_estimate_that_of_the_formula():
    tail = pareto(400, 2.5, 0)
    fit = power_law(tail)
    x, u = tail.values_n, tail.values_n.min()
    assert fit.parameters["xmin"] == u == tail.cutoff
    assert fit.parameters["alpha"] == pytest.approx(1 + 400 / np.log(x / u).sum(), rel=1e-12)
    alpha = fit.parameters["alpha"]
    density = (alpha - 1) / u * (x / u) ** -alpha  # p(x) ∝ x^−α
    assert fit.logdensity_n == pytest.approx(np.log(density), rel=1e-12)
    assert fit.aic == pytest.approx(2 - 2 * np.log(density).sum())


def test_moments_diverge_where_the_paper_says():
    """The nth moment of a power law is infinite for α ≤ n + 1, so α is the exponent of the density."""
    for alpha, mean, variance in ((1.9, False, False), (2.9, True, False), (3.1, True, True)):
        law = stats.pareto(alpha - 1)
        assert (math.isfinite(law.mean()), math.isfinite(law.var())) == (mean, variance)


@pytest.mark.parametrize(("alpha", "size"), [(2.1, 60), (2.5, 500), (4.3, 500)])
def test_the_interval_holds_the_exponent_as_often_as_it_says(alpha: float, size: int):
    held = 0
    for seed in range(400):
        low, high = exponent_interval(pareto(size, alpha, seed))
        held += low <= alpha <= high
    assert stats.binomtest(held, 400, 0.95).pvalue > 0.001


def test_the_distance_is_that_of_scipys_test():
    for tail in (pareto(80, 3.0, 1), tail_above(stats.expon(), 0.5, 200, 2)):
        law = stats.pareto(power_law(tail).parameters["alpha"] - 1, scale=tail.cutoff)
        assert ks_distance(tail) == pytest.approx(stats.ks_1samp(tail.values_n, law.cdf).statistic, abs=1e-12)


def test_p_values_of_power_laws_are_uniform_and_those_of_others_small():
    found = [goodness(pareto(100, 2.2, seed), 100, np.random.default_rng(seed)) for seed in range(150)]
    assert stats.kstest(found, "uniform").pvalue > 0.001
    other = [
        goodness(tail_above(stats.expon(), 0.5, 300, seed), 100, np.random.default_rng(seed)) for seed in range(10)
    ]
    assert max(other) <= 0.1


def test_the_p_value_is_that_of_samples_of_the_law_itself():
    """Brute force: samples at the fitted exponent and cutoff, fitted by scipy, their distances by scipy."""
    tail = tail_above(stats.lognorm(1.5), 2.0, 150, 4)
    shape = power_law(tail).parameters["alpha"] - 1
    rng, farther, observed = np.random.default_rng(0), 0, ks_distance(tail)
    for _ in range(400):
        sample = stats.pareto(shape, scale=tail.cutoff).rvs(150, random_state=rng)
        again, _, cutoff = stats.pareto.fit(sample, floc=0)
        farther += stats.ks_1samp(sample, stats.pareto(again, scale=cutoff).cdf).statistic > observed
    p_value = goodness(tail, 2000, np.random.default_rng(1))
    assert p_value == pytest.approx(farther / 400, abs=4 * 0.5 / math.sqrt(400))
    assert p_value == goodness(tail, 2000, np.random.default_rng(1))  # seeded


# --- families ---


def frozen(name: str, fit: Fit) -> stats.rv_continuous:
    """The family of scipy that reported parameters name."""
    p = fit.parameters
    return {
        "exponential": lambda: stats.expon(scale=p["scale"]),
        "weibull": lambda: stats.weibull_min(p["shape"], scale=math.exp(p["log_scale"])),
        "lognormal": lambda: stats.lognorm(p["sigma"], scale=math.exp(p["mu"])),
        "gev": lambda: stats.genextreme(-p["shape"], p["location"], p["scale"]),
    }[name]()


@pytest.mark.parametrize("name", ["exponential", "weibull", "lognormal", "gev"])
def test_densities_are_those_of_the_reported_parameters_given_the_cutoff(name: str):
    tail = tail_above(stats.lognorm(1.0, scale=0.2), 0.5, 300, 5)
    fit = every_fit(tail)[name]
    law = frozen(name, fit)
    assert fit.logdensity_n == pytest.approx(law.logpdf(tail.values_n) - law.logsf(tail.cutoff), rel=1e-6, abs=1e-6)


def test_the_density_of_every_family_integrates_to_one_above_the_cutoff():
    points = {"weibull": (1.5, 0.4), "lognormal": (-1.0, 1.3), "gev": (0.4, 0.7, 0.3)}
    for name, at in points.items():
        law = _Above(BY_NAME[name], 2.0)
        area, _ = integrate.quad(lambda z, law=law, at=at: math.exp(law._logpdf(np.array([z]), *at)[0]), 1, np.inf)
        assert area == pytest.approx(1, abs=1e-6)


def test_the_exponential_is_the_closed_form():
    tail = tail_above(stats.expon(scale=3), 2.0, 100, 6)
    assert exponential(tail).parameters["scale"] == pytest.approx(tail.values_n.mean() - tail.cutoff, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "law", "cutoff"),
    [
        ("weibull", stats.weibull_min(0.6, scale=2.0), 1.0),
        ("lognormal", stats.lognorm(1.0, scale=2.0), 1.5),
        ("gev", stats.genextreme(-0.4, 1.0, 0.5), 1.0),
    ],
)
def test_the_search_finds_the_maximum_and_the_truth_lies_near_it(name: str, law: stats.rv_continuous, cutoff: float):
    tail = tail_above(law, cutoff, 4000, 7)
    fit = fit_family(tail, BY_NAME[name])
    at_truth = (law.logpdf(tail.values_n) - law.logsf(tail.cutoff)).sum()
    gain = fit.loglikelihood - at_truth
    assert 0 <= gain < stats.chi2.ppf(0.999, fit.free) / 2  # Wilks: twice the gain is χ²
    around = _Above(BY_NAME[name], power_law(tail).parameters["alpha"] - 1)
    best = optimize.minimize(
        lambda at: around._penalized_nnlf((*at, 0.0, 1.0), tail.values_n / tail.cutoff),
        around._start,
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-8, "maxiter": 4000, "maxfev": 4000},
    )
    exact = -best.fun - len(tail.values_n) * math.log(tail.cutoff)
    assert fit.loglikelihood == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("alpha", [1.6, 2.2, 3.0, 4.3])
@pytest.mark.parametrize("size", [50, 500])
def test_nothing_is_much_likelier_than_the_power_law_that_made_the_data(alpha: float, size: int):
    wins = 0
    for seed in range(6):
        fits = every_fit(pareto(size, alpha, seed))
        wins += min(fits, key=lambda name: fits[name].aic) == "power_law"
        for name, fit in fits.items():
            gain = fit.loglikelihood - fits["power_law"].loglikelihood
            assert gain < stats.chi2.ppf(0.9999, 2) / 2, name
            if name in ("weibull", "lognormal", "gev"):  # which contain it as a limit
                assert gain > -0.5, name
    assert wins >= 4


@pytest.mark.parametrize(
    ("law", "cutoff", "expected"),
    [
        (stats.weibull_min(0.5, scale=1.0), 2.0, "weibull"),
        (stats.lognorm(0.8, scale=1.0), 1.0, "lognormal"),
        (stats.genextreme(0.3, 1.0, 0.5), 1.0, "gev"),
    ],
    ids=["weibull", "lognormal", "gev"],
)
def test_the_family_that_made_the_data_wins(law: stats.rv_continuous, cutoff: float, expected: str):
    tail = tail_above(law, cutoff, 3000, 8)
    fits = every_fit(tail)
    assert min(fits, key=lambda name: fits[name].aic) == expected
    ratio, p_value = vuong(fits["power_law"], fits[expected])
    assert ratio < 0
    assert p_value < 0.01


def test_the_exponential_wins_over_the_families_that_it_is_part_of_as_often_as_one_parameter_costs():
    wins = 0
    for seed in range(20):
        fits = every_fit(tail_above(stats.expon(scale=2.0), 1.0, 500, seed))
        best = min(fits, key=lambda name, fits=fits: fits[name].aic)
        wins += best == "exponential"
        assert vuong(fits["power_law"], fits["exponential"])[0] < 0
    assert wins >= 11  # P(χ²₁ < 2) = 0.84 for either of two


def test_fits_do_not_depend_on_the_unit_of_the_scores():
    tail = tail_above(stats.lognorm(1.0), 1.0, 200, 9)
    scaled = Tail(tail.values_n * 1e-7, "count")
    for name, fit in every_fit(tail).items():
        assert every_fit(scaled)[name].loglikelihood == pytest.approx(fit.loglikelihood + 200 * math.log(1e7), abs=0.01)


def test_vuongs_ratio():
    rng = np.random.default_rng(0)
    first, second = (Fit({}, rng.normal(size=100), 1) for _ in range(2))
    difference = first.logdensity_n - second.logdensity_n
    z = difference.sum() / (difference.std() * 10)
    assert vuong(first, second) == pytest.approx((difference.sum(), 2 * stats.norm.sf(abs(z))))
    assert vuong(second, first) == pytest.approx((-difference.sum(), 2 * stats.norm.sf(abs(z))))
    assert vuong(first, first) == (0.0, 1.0)


# --- the choice of the tail ---


def summary_of(values: np.ndarray, capacity: int = 2000) -> ScoreSummary:
    return ScoreSummary(capacity).add(values, np.arange(len(values)))


def test_the_tail_is_a_share_or_a_count():
    values = stats.t(3).rvs(10_000, random_state=0)
    for share, count, size, chosen in ((0.01, None, 100, "share"), (0.5, 60, 60, "count")):
        tail = tail_of(summary_of(values), share, count, 50)
        assert tail.values_n.tolist() == np.sort(values)[::-1][:size].tolist()
        assert (tail.cutoff, tail.chosen_by) == (np.sort(values)[-size], chosen)


@pytest.mark.parametrize(
    ("values", "count", "reason"),
    [
        (np.arange(1, 10_001), None, "the top 0.01 % of 10,000 scores: 1 value, and fewer than tails.least=50"),
        (np.arange(1, 10_001), 20, "tails.count=20: 20 values, and fewer than tails.least=50"),
        (np.arange(-9_970, 30), 60, "29 of 10,000 scores are positive"),
        (np.ones(100), 60, "the 60 largest scores are all the same"),
        (np.empty(0), 60, "0 of 0 scores are positive"),
    ],
)
def test_it_is_said_why_nothing_is_fitted(values: np.ndarray, count: int | None, reason: str):
    with pytest.raises(NoFit, match=reason):
        tail_of(summary_of(values.astype(float)), 0.0001, count, 50)


# --- what follows ---


def test_the_number_needed_is_that_of_the_law():
    values = stats.pareto(1.5).rvs(100_000, random_state=1)
    summary = summary_of(values)
    tail = tail_of(summary, 0.01, None, 50)
    bm25 = summary_of(np.array([100.0] * 10 + [1.0] * 20))
    found = needed(summary, bm25, tail, 10, np.random.default_rng(0))
    assert found.method == "power_law"
    assert found.threshold == 100.0
    alpha = power_law(tail).parameters["alpha"]
    expected = 10 / (0.01 * (100.0 / tail.cutoff) ** (1 - alpha))
    assert found.sequences == pytest.approx(expected, rel=1e-9)
    truth = 10 / stats.pareto(1.5).sf(100.0)
    assert found.interval[0] < truth < found.interval[1]
    assert found == needed(summary, bm25, tail, 10, np.random.default_rng(0))


@pytest.mark.parametrize("threshold", [1.3, 30.0], ids=["empirical", "power_law"])
def test_the_interval_holds_the_number_that_one_has_to_scan(threshold: float):
    """Scans of a known law, each with its own estimate, and how many sequences another scan takes to the tenth hit."""
    law, held, trials = stats.pareto(2.0), 0, 300
    rng = np.random.default_rng(3)
    bm25 = summary_of(np.full(10, threshold))
    for _ in range(trials):
        summary = summary_of(law.rvs(2000, random_state=rng), 100)
        tail = tail_of(summary, 0.05, None, 50)
        found = needed(summary, bm25, tail, 10, rng)
        low, high = found.interval
        held += low <= 10 + rng.negative_binomial(10, law.sf(threshold)) <= high
    assert stats.binomtest(held, trials, 0.95).pvalue > 0.001


def test_below_the_cutoff_and_without_a_fit_scores_are_counted():
    values = stats.t(3).rvs(5000, random_state=2)
    summary = summary_of(values, 100)
    threshold = float(np.sort(values)[-50])
    for tail in (None, tail_of(summary, 0.0, 50, 50)):
        bm25 = summary_of(np.array([*([9.0] * 9), threshold * 0.999]))
        found = needed(summary, bm25, tail, 10, np.random.default_rng(0))
        assert found.method == "empirical"
        assert found.sequences == pytest.approx(10 * 5000 / 50, rel=0.03)
        low, high = found.interval
        assert low < found.sequences < high


def test_where_a_power_law_is_implausible_what_was_counted_is_believed_and_both_are_told():
    values = stats.expon.rvs(size=20_000, random_state=4)
    summary, tail = summary_of(values, 400), tail_of(summary_of(values, 400), 0.01, None, 50)
    threshold = float(np.sort(values)[-20])
    bm25 = summary_of(np.full(10, threshold))
    believed = needed(summary, bm25, tail, 10, np.random.default_rng(0))
    doubted = needed(summary, bm25, tail, 10, np.random.default_rng(0), plausible=False)
    assert (believed.method, doubted.method) == ("power_law", "empirical")
    assert believed.estimates == doubted.estimates
    assert doubted.sequences == pytest.approx(10 * 20_000 / 20)
    low, high = doubted.interval
    assert low < 10 / stats.expon.sf(threshold) < high
    beyond = needed(summary, summary_of(np.full(10, 30.0)), tail, 10, np.random.default_rng(0), plausible=False)
    assert (beyond.method, beyond.reached, list(beyond.estimates)) == ("power_law", 0, ["power_law"])
    assert isinstance(beyond.estimates["power_law"], Estimate)


def test_very_rare_influences_are_said_to_be_far_away():
    summary = summary_of(stats.pareto(3.0).rvs(10_000, random_state=3))
    tail = tail_of(summary, 0.01, None, 50)
    for threshold in (1e4, 1e6):
        found = needed(summary, summary_of(np.full(10, threshold)), tail, 10, np.random.default_rng(0))
        assert found.interval[0] < found.sequences < found.interval[1]
        assert found.sequences > 1e11
    steep = summary_of(stats.pareto(12.0).rvs(10_000, random_state=3))
    with pytest.raises(NoFit, match="out of reach"):
        needed(steep, summary_of(np.full(10, 1e37)), tail_of(steep, 0.01, None, 50), 10, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("unfiltered", "bm25", "reason"),
    [
        (np.ones(5), np.ones(9), "BM25 proposed 9 sequences to this query, fewer than 10"),
        (np.empty(0), np.ones(10), "no sequence was scanned unfiltered"),
        (np.ones(5), np.array([*np.ones(9), -1.0]), "number 10 of BM25's sequences has no positive influence"),
        (np.ones(5), np.full(10, 2.0), "none of 5 unfiltered sequences reaches the influence 2 of number 10"),
    ],
)
def test_it_is_said_why_no_number_is_given(unfiltered: np.ndarray, bm25: np.ndarray, reason: str):
    with pytest.raises(NoFit, match=reason):
        needed(summary_of(unfiltered), summary_of(bm25), None, 10, np.random.default_rng(0))


def test_recall_is_that_of_sets():
    rng = np.random.default_rng(5)
    ids, proposed = rng.permutation(300), set(rng.choice(300, 90, replace=False).tolist())
    found = recall(ids, proposed, (10, 100, 1000))
    assert found == {head: len(set(ids[:head].tolist()) & proposed) / head for head in (10, 100)}
    assert recall([], proposed, (10,)) == {}
