"""The belief as a baseline, centred and scaled; priors that follow the predictor."""

import numpy as np
import pytest

from benchmarks.harness.arms import nested
from cures_ray.config import Config
from cures_ray.curriculum.pool import PromptPool
from cures_ray.learning.advantages import SMALLEST_STD, compute_advantages
from cures_ray.learning.thinning import thinned

ALPHA, BETA = np.array([1.0, 6.0, 0.2]), np.array([3.0, 2.0, 19.8])
REWARDS = [np.array([1.0]), np.array([0.0, 1.0]), np.array([1.0])]


def flat(name: str, rewards: list[np.ndarray] = REWARDS) -> np.ndarray:
    return np.concatenate(compute_advantages(name, rewards, ALPHA, BETA))


def test_centred_advantages_are_the_posterior_ones_minus_the_mean_of_the_others():
    plain = flat("posterior_loo")
    expected = [plain[j] - np.delete(plain, j).mean() for j in range(4)]
    assert flat("posterior_centred") == pytest.approx(expected)
    assert flat("posterior_centred").sum() == pytest.approx(0.0)


def test_a_belief_that_lags_behind_everywhere_leaves_nothing_to_reinforce():
    """All prompts are solved now, all beliefs say 1/4: plain advantages are all positive, centred ones vanish."""
    solved = [np.ones(1)] * 3
    alpha, beta = np.ones(3), np.full(3, 3.0)
    assert np.concatenate(compute_advantages("posterior_loo", solved, alpha, beta)) == pytest.approx([0.75] * 3)
    assert np.concatenate(compute_advantages("posterior_centred", solved, alpha, beta)) == pytest.approx([0.0] * 3)


def test_a_surprise_counts_more_but_at_most_by_the_smallest_deviation():
    rewards = [np.ones(1)] * 3
    means = ALPHA / (ALPHA + BETA)
    scaled = (1 - means) / np.maximum(np.sqrt(means * (1 - means)), SMALLEST_STD)
    assert means[2] == pytest.approx(0.01)  # its own deviation is 0.0995
    assert scaled[2] == pytest.approx(0.99 / SMALLEST_STD)
    assert flat("posterior_std", rewards) == pytest.approx((scaled - scaled.mean()) * 3 / 2)


@pytest.mark.parametrize("name", ["posterior_centred", "posterior_std"])
def test_one_rollout_or_none_is_no_error(name):
    one = compute_advantages(name, [np.ones(1)], np.ones(1), np.ones(1))
    assert len(one) == 1 and np.isfinite(one[0]).all()
    assert compute_advantages(name, [], np.zeros(0), np.zeros(0)) == []


def pool(**curriculum) -> PromptPool:
    values = {"prior_from": "level", "prompts_per_step": 2, "rollouts_per_step": 8, "prior_strength": 4.0}
    config = Config.model_validate(nested({f"curriculum.{k}": v for k, v in (values | curriculum).items()}))
    return PromptPool(config, 4, levels=np.array([1, 1, 2, 2]))


@pytest.mark.parametrize("scope", ["unseen", "all"])
def test_the_prior_of_seen_prompts_follows_only_with_scope_all(scope):
    p = pool(prior_scope=scope, discount=1.0)
    p.observe((0, 0, 0), 0, np.ones(3), np.zeros(3))
    p.learn(np.array([0]), np.array([30.0]), np.array([30.0]))
    seen, unseen = p.belief.counts(np.array([0, 1]))[0]
    prior = 4.0 * float(np.clip(p.mixture.level.mean(np.array([0]))[0], 0.01, 0.99))
    assert unseen == pytest.approx(prior, rel=1e-5)  # level 1 was always right: the unseen one of it is thought easy
    assert seen == pytest.approx((prior if scope == "all" else 1.0) + 3.0, rel=1e-5)  # its evidence is kept


def test_thinning_keeps_the_expectation_and_drops_what_is_no_surprise():
    rng = np.random.default_rng(0)
    before = [np.array([0.05, -0.1, 0.7]), np.array([-0.9])]
    draws = [thinned(before, 0.2, rng) for _ in range(4000)]
    mean = np.mean([np.concatenate(d) for d in draws], 0)
    assert mean == pytest.approx([0.05, -0.1, 0.7, -0.9], abs=0.01)
    kept = np.mean([np.concatenate(d) != 0 for d in draws], 0)
    assert kept == pytest.approx([0.25, 0.5, 1.0, 1.0], abs=0.03)
    assert {abs(v) for d in draws for v in d[0][:2]} == {0.0, 0.2}
