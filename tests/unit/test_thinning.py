"""How many advantages are worth training on: the level by cost, and the cost as it is measured."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from cures_ray.config import AlgoConfig
from cures_ray.learning.thinning import WARMUP_STEPS, Bottleneck, thinned, thinning_level


def advantages(count: int = 4000) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 0.5, count)
    return [((rng.random(count) < p) - p) / np.maximum(np.sqrt(p * (1 - p)), 0.25)]


def noise_and_share(level: float) -> tuple[float, float]:
    """By simulation: second moment of the thinned advantages, share that is trained."""
    drawn = np.concatenate([thinned(advantages(), level, np.random.default_rng(s))[0] for s in range(20)])
    return float((drawn**2).mean()), float((drawn != 0).mean())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cost", [0.3, 3.0, 30.0])
def test_no_other_level_buys_less_noise_for_the_money(cost, overlap):
    def product(level: float) -> float:
        noise, share = noise_and_share(level)
        return noise * (max(1.0, cost * share) if overlap else 1.0 + cost * share)

    chosen = thinning_level(advantages(), cost, overlap=overlap)
    others = [product(level) for level in np.linspace(0.05, 3.5, 24)]
    assert product(chosen) < min(others) * 1.02


def test_the_dearer_training_is_the_fewer_rollouts_are_trained():
    levels = [thinning_level(advantages(), cost, overlap=False) for cost in (0.1, 0.3, 1, 3, 10, 100)]
    assert levels == sorted(levels) and levels[0] < 0.4 and levels[-1] > 2
    # with overlap a learner that keeps up anyway has nothing to save
    assert thinning_level(advantages(), 0.5, overlap=True) < 0.1


def test_nothing_to_thin():
    assert thinning_level([], 1.0, overlap=False) == 0.0
    assert thinning_level([np.zeros(3)], 1.0, overlap=False) == 0.0


def test_a_given_cost_is_kept_and_none_is_none():
    step = {"generate_seconds": 1.0, "generated": 10, "train_seconds": 5.0, "computed": 10}
    for setting in (None, 2.5):
        bottleneck = Bottleneck(setting)
        for _ in range(5):
            bottleneck.observe(**step)
        assert bottleneck.train_cost == setting


def test_the_measured_cost_is_seconds_per_rollout_after_the_warm_up():
    bottleneck = Bottleneck("measured")
    for _ in range(WARMUP_STEPS):
        bottleneck.observe(generate_seconds=100.0, generated=10, train_seconds=1.0, computed=10)
        assert bottleneck.train_cost is None
    bottleneck.observe(generate_seconds=2.0, generated=10, train_seconds=3.0, computed=5)
    assert bottleneck.train_cost == pytest.approx((3.0 / 5) / (2.0 / 10))
    bottleneck.observe(generate_seconds=2.0, generated=10, train_seconds=0.0, computed=0)  # nothing was computed
    assert bottleneck.train_cost == pytest.approx(3.0)
    for _ in range(40):
        bottleneck.observe(generate_seconds=4.0, generated=10, train_seconds=1.0, computed=10)
    assert bottleneck.train_cost == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("bad", [0, -1.0, "sometimes"])
def test_a_cost_that_is_none_is_refused(bad):
    with pytest.raises(ValidationError):
        AlgoConfig(train_cost=bad)
