"""Beta posteriors of the accuracy (eq. 22-24): counts, discounts, priors, score moments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cures_ray.curriculum.belief import BeliefTable
from cures_ray.messages import GradientStatistics


def test_an_unseen_prompt_is_its_prior_and_no_estimate_is_ever_0_or_1():
    table = BeliefTable(3, 1.0, 3.0)
    table.observe([1, 2], [0, 1000], [1000, 0])
    assert table.mean([0]) == pytest.approx([0.25])
    assert (table.mean() > 0).all() and (table.mean() < 1).all()


def test_the_estimate_is_the_posterior_mean_and_not_the_frequency():
    table = BeliefTable(1)
    table.observe([0], [4], [0])
    assert table.mean() == pytest.approx([5 / 6])
    assert [c.tolist() for c in table.counts()] == [[5.0], [1.0]]


def test_a_discount_decays_towards_the_prior_at_each_observation_of_the_prompt_only():
    table = BeliefTable(2, 2.0, 1.0)
    table.observe([0], [4], [2], discount=0.5)
    table.observe([1], [1], [0], discount=0.5)
    table.observe([0], [1], [0], discount=0.5)
    assert table.alpha == pytest.approx([2 + 0.5 * 4 + 1, 3])
    assert table.beta == pytest.approx([1 + 0.5 * 2, 1])
    assert table.visits.tolist() == [2, 1]


def test_late_evidence_counts_less():
    table = BeliefTable(1)
    table.observe([0], [4], [2], evidence=0.9**2)
    assert table.alpha == pytest.approx([1 + 0.81 * 4]) and table.beta == pytest.approx([1 + 0.81 * 2])


def test_an_observation_without_a_verified_rollout_changes_nothing():
    table = BeliefTable(1)
    table.observe([0], [3], [1])
    table.observe([0], [0], [0], discount=0.5)
    assert table.counts()[0] == pytest.approx([4]) and table.visits.tolist() == [1]


observations = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9), st.sampled_from([1.0, 0.9, 0.5, 0.0])),
    max_size=30,
)


@given(observations, st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_a_prompt_that_occurs_twice_in_a_call_is_updated_twice_in_order(items, size):
    """Any split into calls gives what one observation at a time gives."""
    single, split = BeliefTable(5, 0.5, 2.0), BeliefTable(5, 0.5, 2.0)
    alpha, beta = np.full(5, 0.5), np.full(5, 2.0)
    for i, s, f, d in items:
        single.observe([i], [s], [f], discount=d)
        if s + f:
            alpha[i], beta[i] = 0.5 + d * (alpha[i] - 0.5) + s, 2.0 + d * (beta[i] - 2.0) + f
    for k in range(0, len(items), size):
        i, s, f, d = (np.array(x) for x in zip(*items[k : k + size], strict=True))
        split.observe(i, s, f, discount=d)
    for table in (single, split):
        assert table.alpha == pytest.approx(alpha, rel=1e-5) and table.beta == pytest.approx(beta, rel=1e-5)
    assert single.visits.tolist() == split.visits.tolist()


def test_a_reset_forgets_the_evidence_of_its_rows_and_keeps_their_visits():
    table = BeliefTable(3, 1.0, 2.0, track_gradients=True)
    table.observe([0, 1], [5, 5], [1, 1])
    table.observe_gradients([0], [statistics()])
    table.reset([0])
    assert table.mean() == pytest.approx([1 / 3, 6 / 9, 1 / 3])
    assert table.visits.tolist() == [1, 1, 0]
    assert np.isnan(table.moments([0]).m_plus).all()


def test_a_new_prior_keeps_the_evidence():
    table = BeliefTable(3)
    table.observe([0], [6], [2])
    table.set_prior([0, 1], [3.0, 3.0], [1.0, 1.0])
    assert table.alpha == pytest.approx([3 + 6, 3, 1]) and table.beta == pytest.approx([1 + 2, 1, 1])
    table.observe([0], [1], [0], discount=0.5)  # decays towards the new prior
    assert table.alpha == pytest.approx([3 + 3 + 1, 3, 1])
    table.reset()
    assert table.mean() == pytest.approx([0.75, 0.75, 0.5])


def test_a_new_prior_of_all_rows():
    table = BeliefTable(2)
    table.set_prior(None, 4.0, 1.0)
    assert table.mean() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_an_improper_prior_is_refused(alpha, beta):
    with pytest.raises(ValueError, match="positive and finite"):
        BeliefTable(2).set_prior(None, alpha, beta)


@pytest.mark.parametrize(
    ("s", "f", "options"), [(-1, 0, {}), (1, 0, {"discount": 1.5}), (1, 0, {"evidence": -1.0}), (np.nan, 0, {})]
)
def test_impossible_counts_are_refused(s, f, options):
    with pytest.raises(ValueError, match="counts and evidence"):
        BeliefTable(1).observe([0], [s], [f], **options)


def test_thompson_draws_follow_the_posterior():
    table = BeliefTable(2)
    table.observe([1], [7], [2])
    draws = np.array([table.sample(np.random.default_rng(i)) for i in range(2000)])
    assert stats.kstest(draws[:, 0], stats.beta(1, 1).cdf).pvalue > 1e-4
    assert stats.kstest(draws[:, 1], stats.beta(8, 3).cdf).pvalue > 1e-4


# -- score moments ------------------------------------------------------------------------------------------


def statistics(n_plus=2, n_minus=2, scale=1.0) -> GradientStatistics:
    return GradientStatistics(
        lease_id=0, n_plus=n_plus, n_minus=n_minus, sum_sq_plus=4.0 * scale, sum_sq_minus=2.0 * scale,
        sq_sum_plus=5.0 * scale, sq_sum_minus=3.0 * scale, dot=-1.0 * scale,
    )  # fmt: skip


def test_moments_are_averaged_per_prompt_and_pooled_over_all():
    table = BeliefTable(3, track_gradients=True, gradient_rate=0.25)
    table.observe_gradients([0], [statistics()])
    assert table.moments([0]).m_plus == pytest.approx([2.0])
    assert table.moments([0]).diff_sq == pytest.approx([0.5 + 0.5 + 2 * 0.25])
    table.observe_gradients([0, 1], [statistics(scale=3.0), statistics(scale=5.0)])
    assert table.moments([0, 1]).m_plus == pytest.approx([2 + 0.25 * (6 - 2), 10])
    assert table.pooled_moments().m_plus == pytest.approx(2 + 0.25 * (8 - 2))
    assert np.isnan(table.moments([2]).m_plus[0])


def test_a_class_that_was_not_seen_keeps_what_is_known_of_it():
    table = BeliefTable(1, track_gradients=True)
    table.observe_gradients([0], [statistics()])
    before = table.moments([0])
    table.observe_gradients([0], [statistics(n_minus=0)])
    assert table.moments([0]).m_minus == before.m_minus and table.moments([0]).diff_sq == before.diff_sq


def test_statistics_without_a_table_for_them_are_refused():
    with pytest.raises(ValueError, match="last_layer"):
        BeliefTable(1).observe_gradients([0], [statistics()])


# -- state ----------------------------------------------------------------------------------------------------


def test_a_restored_table_goes_on_exactly():
    one = BeliefTable(4, track_gradients=True)
    one.observe([0, 1], [3, 1], [1, 2], discount=0.9)
    one.set_prior([2], 0.3, 0.9)
    one.observe_gradients([1], [statistics()])
    two = BeliefTable(4, track_gradients=True)
    two.load_state_dict({k: x.copy() for k, x in one.state_dict().items()})
    for table in (one, two):
        table.observe([2, 0], [1, 1], [1, 0], discount=0.9)
        table.observe_gradients([1], [statistics(scale=2.0)])
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(array, two.state_dict()[name])


def test_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match="2 prompts in alpha, the table 3"):
        BeliefTable(3).load_state_dict(BeliefTable(2).state_dict())


def test_a_prompt_takes_twelve_bytes():
    small = BeliefTable(100_000)
    assert small.nbytes / 100_000 < 12.1
