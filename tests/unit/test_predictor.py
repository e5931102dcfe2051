"""Priors that generalise: pooled by level, and a calibrated predictor."""

import numpy as np
import pytest

from cures_ray.curriculum.predictor import DifficultyPredictor, LevelPrior, level_codes
from cures_ray.data.features import prompt_features


def test_levels_may_be_anything():
    codes, size = level_codes(np.array(["hard", "easy", "hard"], object), 3)
    assert size == 2 and codes[0] == codes[2] != codes[1]
    assert level_codes(None, 4)[1] == 1
    assert level_codes(np.array([1, "b", None], object), 3)[1] == 3


def test_a_level_prior_is_the_pooled_accuracy_shrunk_to_that_of_all():
    prior = LevelPrior(np.array([0, 0, 1, 2]), 4, shrink=4.0)
    assert not prior.ready
    prior.update(np.array([0, 1, 2]), np.array([8.0, 8.0, 1.0]), np.array([10.0, 10.0, 20.0]))
    assert prior.ready
    overall = 18 / 42
    mean = prior.mean(np.arange(4))
    assert mean == pytest.approx([(16 + 4 * overall) / 24] * 2 + [(1 + 4 * overall) / 24, overall])


def test_repeated_prompts_of_a_batch_all_count():
    prior = LevelPrior(None, 2)
    prior.update(np.array([0, 0]), np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    assert prior.mean(np.array([1]))[0] == pytest.approx((2 + 4 * 3 / 6) / 8)


def learned(features, accuracy, seed=0, steps=80, levels=None) -> DifficultyPredictor:
    rng = np.random.default_rng(seed)
    predictor = DifficultyPredictor(features, levels, len(accuracy))
    for _ in range(steps):
        index = rng.integers(0, len(accuracy), 64)
        predictor.update(index, rng.binomial(8, accuracy[index]).astype(float), np.full(64, 8.0))
    return predictor


def test_the_predictor_learns_accuracy_from_features_and_is_calibrated():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(2000, 6)).astype(np.float32)
    accuracy = 1 / (1 + np.exp(-(0.3 + features @ np.array([1.0, -0.5, 0, 0, 0.8, 0]))))
    predictor = learned(features[:1000], accuracy[:1000])
    unseen = DifficultyPredictor(features)
    unseen.load_state_dict(predictor.state_dict())
    forecast = unseen.mean(np.arange(1000, 2000))
    assert np.corrcoef(forecast, accuracy[1000:])[0, 1] > 0.9
    assert np.abs(forecast - accuracy[1000:]).mean() < 0.1
    metrics = predictor.calibration()
    assert all(np.isfinite(x) for x in metrics.values())
    assert metrics["predictor_ece"] < 0.05 and metrics["predictor_brier"] < 0.25


def test_without_features_levels_serve():
    levels = np.arange(90) % 3
    accuracy = np.array([0.1, 0.5, 0.9])[levels]
    forecast = learned(None, accuracy, levels=levels).mean(np.arange(3))
    assert forecast == pytest.approx([0.1, 0.5, 0.9], abs=0.1)


def test_calibration_is_measured_before_the_update():
    """The first forecast is 1/2 whatever comes: Brier 1/4, log-loss log 2."""
    predictor = DifficultyPredictor(None, None, 4)
    metrics = predictor.update(np.arange(4), np.full(4, 8.0), np.full(4, 8.0))
    assert metrics["predictor_brier"] == pytest.approx(0.25)
    assert metrics["predictor_log_loss"] == pytest.approx(np.log(2))
    assert metrics["predictor_ece"] == pytest.approx(0.5)


def test_prompts_without_a_verified_rollout_teach_nothing():
    predictor = DifficultyPredictor(None, None, 2)
    metrics = predictor.update(np.array([0, 1]), np.zeros(2), np.zeros(2))
    assert not predictor.ready and all(np.isfinite(x) for x in metrics.values())
    assert predictor.mean(np.array([0])) == pytest.approx([0.5])


def test_forecasts_stay_finite_however_extreme_the_features():
    predictor = learned(np.array([[1e4], [-1e4]], np.float32), np.array([1.0, 0.0]))
    assert np.isfinite(predictor.mean(np.arange(2))).all() and np.isfinite(list(predictor.calibration().values())).all()


def test_a_restored_predictor_goes_on_exactly():
    one = learned(None, np.array([0.2, 0.8]), levels=np.array([0, 1]), steps=5)
    two = DifficultyPredictor(None, np.array([0, 1]), 2)
    two.load_state_dict(one.state_dict())
    batch = (np.array([0, 1]), np.array([1.0, 3.0]), np.full(2, 4.0))
    assert one.update(*batch) == two.update(*batch)
    assert one.mean(np.arange(2)).tolist() == two.mean(np.arange(2)).tolist()


def test_features_of_prompts_are_finite_the_same_everywhere_and_tell_prompts_apart():
    texts = ["What is 12 + 30?", "Prove that there are infinitely many primes.", ""]
    features = prompt_features(texts, np.array([1, 5, 1]), 32)
    assert features.shape == (3, 32) and features.dtype == np.float32 and np.isfinite(features).all()
    assert np.array_equal(features, prompt_features(texts, np.array([1, 5, 1]), 32))
    assert features[0, 0] < features[1, 0] and features[0, 2] > features[1, 2] == 0
    with pytest.raises(ValueError, match="at least 8"):
        prompt_features(texts, dimensions=4)
