"""Integer allocation: exact sums, bounds, monotonicity; greedy allocations against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cures_ray.curriculum.allocation import (
    apportion,
    cost_aware,
    gvm_weights,
    impute,
    knapsack,
    rloo_gain,
    rloo_variance,
    rloo_zeta,
    sigma_bernoulli,
    sigma_for,
    sigma_gradient,
)
from cures_ray.curriculum.belief import ScoreMoments

weights = st.lists(
    st.one_of(st.floats(0, 1), st.floats(1e-12, 1e12), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=24
)


@st.composite
def problems(draw):
    """(weights, total, n_min, n_max) that can be satisfied."""
    w = np.array(draw(weights))
    low = draw(st.integers(0, 4))
    high = low + draw(st.integers(0, 40))
    return w, draw(st.integers(low * len(w), high * len(w))), low, high


@given(problems())
@settings(max_examples=300, deadline=None)
def test_apportion_spends_exactly_n_within_the_bounds_and_never_gives_more_to_a_smaller_weight(problem):
    w, total, low, high = problem
    n = apportion(w, total, low, high)
    assert n.dtype == np.int64 and n.sum() == total
    assert n.min() >= low and n.max() <= high
    order = np.argsort(w, kind="stable")
    falls = np.diff(n[order]) < 0
    assert not (falls & (np.diff(w[order]) > 0)).any()


@given(weights.filter(lambda w: max(w) > 0), st.integers(0, 2000))
@settings(max_examples=200, deadline=None)
def test_without_bounds_apportion_is_the_largest_remainder_method(w, total):
    w = np.array(w)
    share = w / w.max() / (w / w.max()).sum() * total
    assert np.abs(apportion(w, total, 0) - share).max() < 1 + 1e-6


@given(problems(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_bounds_per_prompt_are_held(problem, seed):
    w, _, low, high = problem
    rng = np.random.default_rng(seed)
    lows, highs = rng.integers(0, low + 1, len(w)), rng.integers(low, high + 1, len(w))
    total = int(rng.integers(lows.sum(), highs.sum() + 1))
    n = apportion(w, total, lows, highs)
    assert n.sum() == total and (n >= lows).all() and (n <= highs).all()


def test_rounding_never_starves_a_prompt():
    """np.round of the shares would give the small ones 0 and miss the total."""
    w = np.array([1.0, *[1e-3] * 20])
    assert np.round(w / w.sum() * 64).sum() != 64
    n = apportion(w, 64, 2, 32)
    assert n.tolist()[0] == 24 and n[1:].tolist() == [2] * 20


def test_weights_of_zero_share_equally_and_ties_go_to_the_earlier_prompt():
    assert apportion(np.zeros(3), 10, 0, 32).tolist() == [4, 3, 3]
    assert apportion(np.array([0.0, 1.0]), 10, 2, 32).tolist() == [2, 8]


def test_a_zero_weight_takes_what_nobody_else_can():
    assert apportion(np.array([0.0, 1.0]), 10, 0, 6).tolist() == [4, 6]


@pytest.mark.parametrize(("total", "low", "high"), [(3, 2, 8), (17, 0, 8), (4, 3, 2)])
def test_bounds_that_cannot_hold_the_total_are_refused(total, low, high):
    with pytest.raises(ValueError, match=r"unsatisfiable allocation: 2 prompts"):
        apportion(np.ones(2), total, low, high)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_weights_that_are_no_shares_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        apportion(np.array([1.0, bad]), 4, 0, 4)


# -- sigma ------------------------------------------------------------------------------------------------


def moments(*columns) -> ScoreMoments:
    plus, minus, diff, dot = (np.array(c, float) for c in columns)
    return ScoreMoments(m_plus=plus, m_minus=minus, diff_sq=diff, dot=dot)


P = np.array([0.02, 0.3, 0.5, 0.9])


def test_with_unit_scores_sigma_is_the_papers_for_group_baselines_and_flat_under_grpo():
    for advantage in ("rloo", "dr_grpo", "posterior_loo", "reinforce_pp_baseline"):
        assert sigma_for(advantage, P) == pytest.approx(sigma_bernoulli(P))
    assert sigma_for("grpo", P) == pytest.approx(1.0)
    assert sigma_for("raft_pp", P) == pytest.approx(np.sqrt(P))


def test_one_baseline_for_the_whole_batch_makes_certain_prompts_cost_too():
    """REINFORCE++: eq. 21's bell would give p = 0 and p = 1 nothing."""
    sigma = sigma_for("reinforce_pp", np.array([0.0, 0.5, 1.0]))
    assert sigma == pytest.approx([0.5, 0.5, 0.5])


def test_an_unknown_advantage_has_no_sigma():
    with pytest.raises(ValueError, match="nonsense"):
        sigma_for("nonsense", P)


def test_a_missing_class_is_imputed_from_the_batch_then_the_pool_then_the_other_class():
    nan = np.nan
    one = impute(moments([4, nan], [nan, 2], [nan, -1], [nan, 0]))
    assert one.m_plus.tolist() == [4, 4] and one.m_minus.tolist() == [2, 2]
    assert one.diff_sq.tolist() == [0, 0]  # unknown, and estimated below 0
    pooled = moments(5, nan, nan, nan)
    assert impute(moments([nan], [3], [0], [0]), pooled).m_plus.tolist() == [5]
    assert impute(moments([nan], [3], [0], [0])).m_plus.tolist() == [3]
    assert impute(moments([nan], [nan], [nan], [nan])).m_minus.tolist() == [1]


def test_sigma_with_measured_moments_is_finite_whatever_was_measured():
    p = np.array([1e-9, 0.5, 1 - 1e-9])
    measured = moments([np.nan, 9, 1], [4, np.nan, 1], [1e9, -3, np.nan], [np.nan] * 3)
    for advantage in ("grpo", "rloo", "reinforce_pp", "raft_pp"):
        sigma = sigma_for(advantage, p, measured)
        assert np.isfinite(sigma).all() and (sigma >= 0).all()


# -- greedy allocations against brute force -----------------------------------------------------------------


def brute(k: int, total: int, low: int, high: int, value) -> float:
    """The best sum of value(i, n_i) over all integer allocations."""
    options = (n for n in product(range(low, high + 1), repeat=k) if sum(n) == total)
    return max(sum(value(i, x) for i, x in enumerate(n)) for n in options)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_rloo_gain_minimises_the_exact_variance(seed, measured):
    rng = np.random.default_rng(seed)
    p, w, total = rng.uniform(0.02, 0.98, 3), rng.uniform(0.5, 3, 3), int(rng.integers(6, 19))
    m = moments(*rng.uniform(1, 5, (2, 3)), rng.uniform(0, 0.5, 3), rng.uniform(-0.3, 0.3, 3)) if measured else None
    n = rloo_gain(p, m, w, total, 2, 8)
    assert n.sum() == total and n.min() >= 2 and n.max() <= 8
    known = m or moments(np.ones(3), np.ones(3), np.zeros(3), np.zeros(3))
    sigma_sq = sigma_gradient(p, p, known) ** 2
    zeta = np.maximum(rloo_zeta(p, known), sigma_sq / 2)

    def gain(i: int, x: int) -> float:
        return -(w[i] ** 2) * float(rloo_variance(np.array(x), sigma_sq[i], zeta[i]))

    assert sum(gain(i, x) for i, x in enumerate(n)) == pytest.approx(brute(3, total, 2, 8, gain))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_knapsack_maximises_its_value(seed):
    rng = np.random.default_rng(seed)
    p, w, total = rng.uniform(0, 1, 3), rng.integers(1, 4, 3).astype(float), int(rng.integers(3, 22))
    n = knapsack(p, w, total, 1, 8)
    assert n.sum() == total and n.min() >= 1 and n.max() <= 8

    def value(i: int, x: int) -> float:
        return w[i] * (1 - p[i] ** x - (1 - p[i]) ** x) * p[i] * (1 - p[i]) ** 2

    assert sum(value(i, x) for i, x in enumerate(n)) == pytest.approx(brute(3, total, 1, 8, value), abs=1e-12)


def test_knapsack_gives_hard_prompts_more_and_spreads_what_has_no_value():
    n = knapsack(np.array([0.05, 0.5, 0.95]), np.ones(3), 60, 2, 56)
    assert n.sum() == 60 and n[0] > n[1] > n[2] >= 2
    assert knapsack(np.array([0.0, 1.0, 0.0]), np.ones(3), 12, 2, 8).tolist() == [4, 4, 4]


def test_greedy_allocations_refuse_groups_that_their_formula_does_not_know():
    with pytest.raises(ValueError, match="n_min >= 2"):
        rloo_gain(P, None, np.ones(4), 16, 1, 8)
    with pytest.raises(ValueError, match="n_min >= 1"):
        knapsack(P, np.ones(4), 16, 0, 8)


# -- cost and GVM --------------------------------------------------------------------------------------------


def test_a_rollout_that_costs_four_times_as_much_gets_half_as_many():
    sigma = cost_aware(np.full(4, 0.5), np.array([100.0, 400.0, np.nan, 0.0]))
    assert sigma[0] / sigma[1] == pytest.approx(2)
    assert sigma[2] == sigma[3] == pytest.approx(0.5 / np.sqrt(250))  # unknown: the mean cost


def test_cost_aware_shares_minimise_the_variance_at_a_given_cost():
    sigma, cost, budget = np.array([0.5, 0.3, 0.4]), np.array([1.0, 9.0, 2.0]), 100.0

    def variance(share: np.ndarray) -> float:
        n = share / (share @ cost) * budget
        return float((sigma**2 / n).sum())

    best = variance(cost_aware(sigma, cost))
    others = np.random.default_rng(0).dirichlet(np.ones(3), 500)
    assert best <= min(map(variance, others)) + 1e-12
    assert best < variance(sigma) - 1e-3


def test_gvm_weights_are_zero_without_success_and_favour_rare_success():
    w = gvm_weights(np.array([0.0, 0.25, 0.75, 0.5]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert w[0] == w[3] == 0 and w[1] > w[2] > 0
    assert w[1] == pytest.approx(1 / np.sqrt(0.25 + 1e-3 / 0.25))
