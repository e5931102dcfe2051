"""The arithmetic of the comparison with other trainers."""

import pytest

from benchmarks.peers.demo import figures, seconds_to


def run(who: str, rate: float, seed: int = 0) -> dict:
    curve = [{"seconds": 10.0 * i, "accuracy": 0.2 + rate * i} for i in range(5)]
    return {"who": who, "seed": seed, "curve": curve, "rollouts_per_s": 100.0 * rate, "peak_gib": 1.0}


def test_the_time_to_an_accuracy_is_interpolated():
    curve = run("x", 0.1)["curve"]
    assert seconds_to(curve, 0.35) == pytest.approx(15.0)
    assert seconds_to(curve, 0.7) is None


def test_a_method_twice_as_fast_needs_half_of_the_time():
    found = figures([run("trl", 0.1), run("default", 0.2), run("grpo", 0.05)])
    assert found["default/seconds_to_trl_accuracy_ratio"][1] == pytest.approx(0.5)
    assert found["trl/seconds_to_trl_accuracy_ratio"][1] == pytest.approx(1.0)
    assert found["grpo/seconds_to_trl_accuracy_ratio"] == "not reached"
