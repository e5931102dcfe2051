"""Speed-ups on made-up curves whose answers are known."""

import numpy as np
import pytest

from benchmarks.harness.statistics import (
    Curve,
    accuracy_difference,
    area,
    area_difference,
    band,
    bootstrap_mean,
    cost_to_reach,
    mean_interval,
    smooth,
    speedup,
    target_of,
)

COSTS = np.arange(0, 101, 10, dtype=float)


def line(slope: float, until: float = 1.0) -> Curve:
    """Accuracy 0.2 + slope * cost, flat above ``until``."""
    return Curve(COSTS, np.minimum(0.2 + slope * COSTS, until))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_smoothing_keeps_straight_lines_and_averages_spikes():
    assert np.allclose(smooth(np.arange(7.0)), np.arange(7.0))
    assert np.allclose(smooth(np.array([0, 0, 3, 0, 0.0])), [0, 1, 1, 1, 0])


def test_smoothing_leaves_no_point_to_a_single_lucky_evaluation():
    lucky = Curve(COSTS, np.where(COSTS == 50, 0.9, 0.3))
    assert cost_to_reach(lucky, 0.6) is None


def test_the_cost_to_a_target_is_interpolated():
    assert cost_to_reach(line(0.005), 0.425) == pytest.approx(45)


def test_a_target_that_is_never_reached_costs_nothing_known():
    assert cost_to_reach(line(0.001), 0.5) is None


def test_the_target_is_a_share_of_the_baselines_gain():
    assert target_of(line(0.005), 0.5) == pytest.approx(0.45)
    assert target_of(line(0.005), 1.0) == pytest.approx(0.7)


def test_twice_the_slope_is_twice_the_speed():
    base = {s: line(0.004) for s in range(5)}
    twice = {s: line(0.008) for s in range(5)}
    for fraction in (0.5, 0.8, 1.0):
        result = speedup(base, twice, fraction, rng())
        assert result.ratio is not None and result.ratio.mid == pytest.approx(2.0)
        assert (result.ratio.low, result.ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))
        assert result.censored == 0


def test_a_method_against_itself_has_speedup_one():
    base = {s: line(0.003 + 0.001 * s) for s in range(4)}
    result = speedup(base, base, 1.0, rng())
    assert result.ratio is not None and result.ratio.mid == pytest.approx(1.0)


def test_the_ratio_is_that_of_geometric_means_over_seeds():
    base = {0: line(0.004), 1: line(0.004)}
    method = {0: line(0.008), 1: line(0.004)}
    result = speedup(base, method, 0.8, rng())
    assert result.per_seed == (pytest.approx(2.0), pytest.approx(1.0))
    assert result.ratio is not None and result.ratio.mid == pytest.approx(np.sqrt(2.0))
    assert result.ratio.low < 1.0 and result.ratio.high > 2.0  # Student with two runs knows little
    assert result.bootstrap is not None
    assert result.bootstrap.low == pytest.approx(1.0) and result.bootstrap.high == pytest.approx(2.0)


def test_a_censored_run_is_shown_and_bounds_the_ratio_from_above():
    base = {0: line(0.004), 1: line(0.004)}
    method = {0: line(0.004), 1: line(0.0001)}
    result = speedup(base, method, 0.5, rng())
    assert result.censored == 1 and result.per_seed == (pytest.approx(1.0), None)
    assert result.ratio is not None and result.ratio.mid == pytest.approx(
        np.sqrt(0.5)
    )  # 50 to the target, ended at 100
    assert result.text().startswith("≤ ") and "1/2 never" in result.text()
    assert speedup(base, {1: line(0.0001)}, 0.5, rng()).text() == "never (< 0.50)"


def test_a_baseline_that_gains_nothing_gives_no_ratio():
    flat = {0: Curve(COSTS, np.full(11, 0.2))}
    result = speedup(flat, {0: line(0.004)}, 1.0, rng())
    assert result.ratio is None and result.unreached == 1 and result.text() == "–"


def test_only_seeds_that_both_have_are_compared():
    result = speedup({0: line(0.004), 1: line(0.004)}, {1: line(0.008), 2: line(0.1)}, 0.5, rng())
    assert result.seeds == 1 and result.per_seed == (pytest.approx(2.0),)


def test_the_difference_is_taken_at_equal_cost():
    short = Curve(COSTS[:6], 0.2 + 0.008 * COSTS[:6])  # ends at 50
    difference = accuracy_difference({0: line(0.004)}, {0: short}, 1.0)
    assert difference is not None and difference.mid == pytest.approx(0.2)


def test_the_area_is_the_mean_accuracy_over_the_budget():
    assert area(line(0.004), 100.0) == pytest.approx(0.4)
    assert area(Curve(COSTS[:6], 0.2 + 0.004 * COSTS[:6]), 100.0) == pytest.approx(0.35, abs=1e-3)
    difference = area_difference({0: line(0.004)}, {0: line(0.006)})
    assert difference is not None and difference.mid == pytest.approx(0.1)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    truth = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        interval = bootstrap_mean(truth.normal(0.3, 1.0, 20), rng())
        hits += interval.low <= 0.3 <= interval.high
    assert 0.87 <= hits / 200 <= 0.99


def test_bands_end_where_the_shortest_run_ends():
    cost, mean, low, high = band([line(0.004), Curve(COSTS[:6], 0.2 + 0.008 * COSTS[:6])])
    assert cost[-1] == 50.0
    assert mean[-1] == pytest.approx(0.5) and low[-1] == pytest.approx(0.4) and high[-1] == pytest.approx(0.6)


def test_the_best_of_a_baseline_is_reached_by_itself_whatever_rounding_does():
    rng = np.random.default_rng(0)
    for _ in range(300):
        curve = Curve(np.arange(12.0), rng.random(12))
        assert cost_to_reach(curve, target_of(curve, 1.0)) is not None


def test_intervals_of_five_seeds_cover_what_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        interval = mean_interval(rng.normal(size=5))
        hits += interval.low <= 0 <= interval.high
    assert 0.92 < hits / 400 < 0.98  # a percentile bootstrap: 0.83
