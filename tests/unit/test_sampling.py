"""Draws from rho* = softmax(sqrt(p(1-p)) / tau): exact at any tau, after any updates, and when everything collapses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cures_ray.curriculum.sampling import (
    TAU_MAX,
    TAU_MIN,
    EpochSampler,
    PotentialSampler,
    UniformSampler,
    importance_weights,
    potential,
    weight_ess,
)

accuracies = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-9, 0.5 + 1e-9])), min_size=1, max_size=40
)
taus = st.floats(math.log(TAU_MIN), math.log(TAU_MAX)).map(lambda x: min(max(math.exp(x), TAU_MIN), TAU_MAX))


def plain(v: np.ndarray, tau: float) -> tuple[np.ndarray, float, float]:
    """(rho, log_z, ESS) by the definition, in a stable softmax over all prompts."""
    x = (v - 0.5) / tau
    z = np.exp(x - x.max())
    rho = z / z.sum()
    return rho, float(np.log(z.sum()) + x.max()), float(1 / (rho**2).sum())


def rho_of(sampler: PotentialSampler, v: np.ndarray, tau: float) -> np.ndarray:
    """The sampler's probability of every prompt, from its normaliser."""
    return np.exp((v - 0.5) / tau - sampler.log_z(tau))


@given(accuracies, taus)
@settings(max_examples=150, deadline=None)
def test_probabilities_normaliser_and_ess_are_those_of_the_definition(p, tau):
    v = potential(np.array(p))
    sampler = PotentialSampler(v)
    rho, log_z, ess = plain(v, tau)
    assert sampler.log_z(tau) == pytest.approx(log_z, rel=1e-6, abs=1e-6)
    assert sampler.ess(tau) == pytest.approx(ess, rel=1e-5)
    assert rho_of(sampler, v, tau).sum() == pytest.approx(1, abs=1e-5)
    draw = sampler.draw(30, np.random.default_rng(0), tau)
    assert draw.multiplicity.sum() == 30 and np.isfinite(draw.rho).all()
    assert draw.rho == pytest.approx(rho[draw.index], rel=1e-5)
    assert draw.ess == sampler.ess(tau) and draw.tau == tau


@given(accuracies.filter(lambda p: len(p) > 1), taus)
@settings(max_examples=100, deadline=None)
def test_rho_never_falls_when_the_potential_rises(p, tau):
    v = potential(np.array(p))
    draw = PotentialSampler(v).draw(200, np.random.default_rng(1), tau)
    order = np.argsort(v[draw.index])
    assert (np.diff(draw.rho[order]) >= -1e-7 * draw.rho[order][1:]).all()


@pytest.mark.parametrize("tau", [TAU_MIN, 0.01, 0.1, 1.0, TAU_MAX])
def test_draws_follow_rho(tau):
    """Chi-square of 200 000 draws. Uniform sampling, or a temperature that is never applied, fails at tau <= 0.1."""
    rng = np.random.default_rng(7)
    v = potential(rng.beta(0.7, 0.7, 60))
    v[:3] = v.max() - np.array([0.0, 2e-5, 9e-5])  # some that compete at TAU_MIN
    draw = PotentialSampler(v).draw(200_000, rng, tau)
    count = np.zeros(60)
    count[draw.index] = draw.multiplicity
    expected = plain(v, tau)[0] * 200_000
    small = expected < 10  # pooled into one cell
    cells = [np.r_[x[~small], x[small].sum()] for x in (count, expected)]
    if cells[1][-1] < 10:  # too small for a cell of its own
        assert cells[0][-1] < 40
        cells = [c[:-1] / c[:-1].sum() * cells[0][:-1].sum() for c in cells]
    assert stats.chisquare(*cells).pvalue > 1e-4
    if tau == 0.1:
        assert stats.chisquare(count).pvalue < 1e-6  # not uniform


def test_draws_are_independent_and_with_replacement():
    """The number of distinct prompts in m draws has its binomial-occupancy mean; without replacement it is m."""
    v = potential(np.linspace(0.01, 0.99, 50))
    sampler, rng, m = PotentialSampler(v), np.random.default_rng(3), 40
    distinct = [len(sampler.draw(m, rng, 0.2).index) for _ in range(400)]
    expected = (1 - (1 - plain(v, 0.2)[0]) ** m).sum()
    assert np.mean(distinct) == pytest.approx(expected, abs=4 * np.std(distinct) / 20)


rows_and_values = st.lists(
    st.tuples(st.integers(0, 11), st.floats(0, 1)), min_size=1, max_size=8
)  # a row may be named twice


@given(st.lists(rows_and_values, max_size=12), taus)
@settings(max_examples=100, deadline=None)
def test_after_any_updates_the_sampler_equals_one_built_anew(updates, tau):
    p = np.full(12, 0.5)
    sampler = PotentialSampler(potential(p))
    for update in updates:
        rows, values = (list(x) for x in zip(*update, strict=True))
        sampler.update(rows, potential(np.array(values)))
        for row, value in update:
            p[row] = value
    fresh = PotentialSampler(potential(p))
    assert sampler.log_z(tau) == pytest.approx(fresh.log_z(tau), rel=1e-9, abs=1e-9)
    assert sampler.ess(tau) == pytest.approx(fresh.ess(tau), rel=1e-6)
    drawn = sampler.draw(500, np.random.default_rng(0), TAU_MAX)  # every member is in its list, and once
    assert len(drawn.index) == 12
    assert drawn.rho == pytest.approx(1 / 12, rel=1e-3)


def test_after_many_updates_draws_still_follow_rho():
    rng = np.random.default_rng(11)
    p = rng.uniform(size=40)
    sampler = PotentialSampler(potential(p))
    for _ in range(300):
        rows = rng.integers(0, 40, 10)
        new = rng.choice([0.0, 0.02, 0.5, 1.0], 10) if rng.random() < 0.3 else rng.uniform(size=10)
        sampler.update(rows, potential(new))
        for row, value in zip(rows, new, strict=True):
            p[row] = value
    draw = sampler.draw(100_000, rng, 0.3)
    count = np.zeros(40)
    count[draw.index] = draw.multiplicity
    assert stats.chisquare(count, plain(potential(p), 0.3)[0] * 100_000).pvalue > 1e-4


def test_a_restored_sampler_draws_the_same():
    rng = np.random.default_rng(5)
    original = PotentialSampler(potential(rng.uniform(size=300)))
    for _ in range(20):
        original.update(rng.integers(0, 300, 40), potential(rng.beta(0.5, 0.5, 40)))
    copy = PotentialSampler(np.zeros(300))
    copy.load_state_dict({k: x.copy() for k, x in original.state_dict().items()})
    for step in range(10):
        rows, values = rng.integers(0, 300, 60), potential(rng.uniform(size=60))
        for sampler in (original, copy):
            sampler.update(rows, values)
        one, two = (s.draw(64, np.random.default_rng(step), 0.05) for s in (original, copy))
        assert one.index.tolist() == two.index.tolist() and one.rho.tolist() == two.rho.tolist()
        assert one.ess == two.ess


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match="2 prompts, this sampler 3"):
        PotentialSampler(np.zeros(3)).load_state_dict(PotentialSampler(np.zeros(2)).state_dict())


@pytest.mark.parametrize("bad", [-0.1, 0.6, np.nan])
def test_potentials_outside_the_bounds_are_refused(bad):
    with pytest.raises(ValueError, match="sqrt"):
        PotentialSampler(np.array([0.1, bad]))
    with pytest.raises(ValueError, match="sqrt"):
        PotentialSampler(np.array([0.1])).update([0], np.array([bad]))


def test_temperatures_outside_the_bounds_are_refused():
    for tau in (TAU_MIN / 2, TAU_MAX * 2, np.nan):
        with pytest.raises(ValueError, match="tau"):
            PotentialSampler(np.array([0.1])).draw(1, np.random.default_rng(0), tau)


# -- the temperature ------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5, 0.9, 0.99]))
@settings(max_examples=40, deadline=None)
def test_the_solved_temperature_hits_the_target_ess(seed, target):
    rng = np.random.default_rng(seed)
    v = potential(rng.beta(*rng.uniform(0.2, 3, 2), 400))
    tau = PotentialSampler(v).solve_tau(target)
    ess = plain(v, tau)[2]
    assert ess == pytest.approx(target * 400, rel=1e-3) or (tau == TAU_MIN and ess > target * 400)  # too many ties


def test_an_ess_target_that_ties_make_unreachable_takes_the_nearest_temperature():
    ties = PotentialSampler(np.r_[np.full(80, 0.5), np.zeros(20)])
    assert ties.solve_tau(0.5) == TAU_MIN and ties.ess(TAU_MIN) == pytest.approx(80)
    assert ties.solve_tau(1.0) == pytest.approx(TAU_MAX)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-12, 1 - 1e-12, 1e-3])
@pytest.mark.parametrize("tau", [TAU_MIN, 0.1, None, TAU_MAX])
def test_when_all_prompts_collapse_draws_are_uniform_and_finite(p, tau):
    sampler = PotentialSampler(potential(np.full(50, p)))
    tau = sampler.solve_tau(0.5) if tau is None else tau
    draw = sampler.draw(20_000, np.random.default_rng(0), tau)
    assert draw.rho == pytest.approx(np.full(50, 1 / 50)) and draw.ess == pytest.approx(50)
    assert stats.chisquare(draw.multiplicity).pvalue > 1e-4


def test_one_prompt_left_to_learn_from_takes_every_draw_at_the_lowest_temperature():
    v = np.zeros(1000)
    v[17] = 0.5
    draw = PotentialSampler(v).draw(64, np.random.default_rng(0), TAU_MIN)
    assert draw.index.tolist() == [17] and draw.multiplicity.tolist() == [64] and draw.ess == pytest.approx(1)


def test_more_draws_than_prompts_are_merged():
    draw = PotentialSampler(np.array([0.1, 0.4, 0.5])).draw(100, np.random.default_rng(0), 1.0)
    assert sorted(draw.index.tolist()) == [0, 1, 2] and draw.multiplicity.sum() == 100


# -- weights, uniform, epochs -----------------------------------------------------------------------------------


def test_importance_weights_are_one_at_kappa_0_and_undo_rho_at_kappa_1():
    rho = np.array([0.5, 0.3, 0.2])
    assert importance_weights(rho, 3, 0.0).tolist() == [1, 1, 1]
    assert rho @ importance_weights(rho, 3, 1.0) == pytest.approx(1)
    assert importance_weights(rho, 3, 0.5) == pytest.approx((3 * rho) ** -0.5)


def test_the_ess_of_weights_counts_draws():
    assert weight_ess(np.ones(2), np.array([5, 3])) == pytest.approx(8)
    assert weight_ess(np.array([1.0, 3.0]), np.array([1, 1])) == pytest.approx(16 / 10)


def test_uniform_draws_are_uniform():
    draw = UniformSampler(20).draw(20_000, np.random.default_rng(0))
    assert stats.chisquare(draw.multiplicity).pvalue > 1e-4
    assert draw.rho == pytest.approx(np.full(20, 1 / 20)) and draw.ess == 20


def test_an_epoch_gives_every_prompt_once_in_another_order_each_time():
    sampler = EpochSampler(10, seed=1)
    order = np.concatenate([sampler.draw(5).index for _ in range(4)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()


def test_a_draw_that_crosses_epochs_merges_a_prompt_that_comes_twice():
    draw = EpochSampler(3, seed=0).draw(8)
    assert draw.multiplicity.sum() == 8 and sorted(draw.index) == [0, 1, 2]
    assert draw.multiplicity.min() >= 2


def test_a_restored_epoch_goes_on_where_it_was():
    one = EpochSampler(10, seed=1)
    one.draw(13)
    two = EpochSampler(10, seed=1)
    two.load_state_dict(one.state_dict())
    assert one.draw(9).index.tolist() == two.draw(9).index.tolist()
