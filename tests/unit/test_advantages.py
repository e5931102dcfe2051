"""Advantages and token weights on groups of unequal size."""

import numpy as np
import pytest

from cures_ray.learning.advantages import ADVANTAGES, compute_advantages, overlong_penalty, token_weights

REWARDS = [np.array([1.0, 0, 0, 1, 0]), np.array([1.0, 0]), np.array([1.0]), np.array([0.0, 0, 0])]
ALPHA, BETA = np.array([1.0, 2, 3, 1]), np.array([1.0, 1, 1, 4])


def advantages(name, **kwargs):
    return compute_advantages(name, REWARDS, ALPHA, BETA, **kwargs)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_keeps_the_shape_of_unequal_groups_and_is_finite(name):
    result = advantages(name)
    assert [len(a) for a in result] == [len(r) for r in REWARDS]
    assert all(np.isfinite(a).all() for a in result)


def test_grpo_is_the_reward_standardised_within_its_group():
    a = advantages("grpo")[0]
    assert a == pytest.approx((REWARDS[0] - 0.4) / (np.sqrt(0.24) + 1e-6))
    assert advantages("grpo")[3] == pytest.approx(0)


def test_rloo_subtracts_the_mean_of_the_others():
    for a, r in zip(advantages("rloo")[:2], REWARDS[:2], strict=True):
        others = [np.delete(r, j).mean() for j in range(len(r))]
        assert a == pytest.approx(r - others)


def test_rloo_gives_a_lone_rollout_nothing():
    assert advantages("rloo")[2] == pytest.approx([0.0])


def test_dr_grpo_is_rloo_shrunk_by_n_minus_1_over_n():
    for plain, loo, r in zip(advantages("dr_grpo")[:2], advantages("rloo")[:2], REWARDS[:2], strict=True):
        assert plain == pytest.approx(loo * (len(r) - 1) / len(r))


def test_posterior_baseline_leaves_the_own_reward_out():
    for i, r in enumerate(REWARDS):
        expected = [
            r[j] - (ALPHA[i] + np.delete(r, j).sum()) / (ALPHA[i] + BETA[i] + len(r) - 1) for j in range(len(r))
        ]
        assert advantages("posterior_loo")[i] == pytest.approx(expected)


def test_posterior_baseline_of_one_rollout_is_the_belief_before_the_step():
    assert advantages("posterior_loo")[2] == pytest.approx([1 - 3 / 4])


def test_reinforce_pp_whitens_over_the_batch_and_not_the_group():
    whole = np.concatenate(advantages("reinforce_pp"))
    assert whole.mean() == pytest.approx(0, abs=1e-12)
    assert whole.std() == pytest.approx(1, abs=1e-4)
    assert advantages("reinforce_pp")[3].max() < -0.5  # a failed group keeps a signal


def test_reinforce_pp_baseline_removes_the_group_mean_first():
    result = advantages("reinforce_pp_baseline")
    assert result[3] == pytest.approx(0, abs=1e-12)
    assert np.concatenate(result).std() == pytest.approx(1, abs=1e-4)


def test_without_whitening_the_plain_values_are_left():
    assert np.concatenate(advantages("reinforce_pp", whiten=False)) == pytest.approx(np.concatenate(REWARDS))
    assert advantages("reinforce_pp_baseline", whiten=False)[0] == pytest.approx(REWARDS[0] - 0.4)
    assert advantages("rloo", whiten=False)[0] == pytest.approx(advantages("rloo")[0])


def test_raft_uses_correct_rollouts_only():
    assert advantages("raft_pp")[0].tolist() == [1, 0, 0, 1, 0]


def test_no_groups_give_no_advantages():
    assert all(compute_advantages(n, [], np.zeros(0), np.zeros(0)) == [] for n in ADVANTAGES)


LENGTHS = [np.array([10, 30]), np.array([20, 20, 20, 20])]
WEIGHTS = np.array([0.25, 0.5])


def test_constant_length_weights_give_each_prompt_its_weight_at_full_length():
    w = token_weights("constant", WEIGHTS, LENGTHS, 40)
    assert w[0] == pytest.approx([0.25 / 2 / 40] * 2)
    assert w[1] == pytest.approx([0.5 / 4 / 40] * 4)


def test_sequence_weights_divide_by_the_own_length():
    w = token_weights("sequence", WEIGHTS, LENGTHS, 40)
    assert [(x * n).sum() for x, n in zip(w, LENGTHS, strict=True)] == pytest.approx(WEIGHTS)


def test_token_weights_at_equal_groups_are_one_over_the_tokens_of_the_batch():
    lengths = [np.array([10, 30]), np.array([5, 15])]
    w = token_weights("token", np.array([0.5, 0.5]), lengths, 40)
    assert np.concatenate(w) == pytest.approx([1 / 60] * 4)


def test_token_weights_at_unequal_groups_do_not_count_a_prompt_by_its_rollouts():
    lengths = [np.array([10] * 2), np.array([10] * 8)]
    w = token_weights("token", np.array([0.5, 0.5]), lengths, 40)
    assert w[0].sum() == pytest.approx(w[1].sum())


def test_empty_completions_do_not_divide_by_zero():
    w = token_weights("sequence", np.array([1.0]), [np.array([0, 2])], 40)
    assert np.isfinite(w[0]).all()


def test_overlong_penalty_falls_from_0_to_minus_1_over_the_last_tokens():
    assert overlong_penalty(np.array([1, 80, 90, 100]), 100, 20) == pytest.approx([0, 0, -0.5, -1])
    assert overlong_penalty(np.array([100]), 100, 0) == pytest.approx([0])
