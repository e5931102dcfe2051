"""The ledger-scale benchmark at small sizes: it runs, both sides agree, and the bars can be missed."""

import json

import numpy as np
import pytest

from benchmarks.micro.ledger_cycle import Plain, Pooled, believe, config, cycle
from benchmarks.micro.ledger_scale import bars, main, power
from cures_ray.curriculum.pool import PromptPool, rng_for


def test_a_quick_run_writes_every_figure_but_the_actors(tmp_path):
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "ledger_scale.json").read_text())
    assert {row["section"] for row in result["rows"]} == {
        "cycle",
        "parts",
        "snapshot",
        "ledger",
        "load",
        "bars",
        "beside",
    }
    for name in (
        "cycle_speedup_steered_20000",
        "snapshot_load_time_over_read_20000",
        "journal_bytes_per_rollout_20000",
    ):
        low, median, high = result["figures"][name]
        assert 0 < low <= median <= high


@pytest.mark.parametrize("mode", ["fixed", "steered"])
def test_pool_and_plain_numpy_draw_allocate_and_count_alike(mode):
    pool = PromptPool(config(mode), 3000)
    truth = believe(pool.belief)
    sides = Pooled(pool), Plain(pool.belief, mode)
    for side in sides:
        drawn, cpu, _ = cycle(side, truth, 1)
        assert drawn["n"].sum() == 8192 and drawn["rho"].sum() <= 1 and cpu > 0
    pool, plain = PromptPool(config(mode), 3000), sides[1]
    plain.alpha[:], plain.beta[:] = 1, 1
    rows, ones = np.arange(3000), np.ones(3000)
    Pooled(pool).observe(rows, ones, 2 * ones)
    plain.observe(rows, ones, 2 * ones)
    assert np.array_equal(pool.belief.alpha, plain.alpha) and np.array_equal(pool.belief.beta, plain.beta)
    assert Pooled(pool).draw(rng_for(0))["ess"] == pytest.approx(plain.draw(rng_for(0))["ess"], rel=1e-3)


def test_a_missed_bar_is_said_to_be_missed():
    names = ("cycle_speedup_fixed", "cycle_speedup_steered", "cycle_cost_growth_fixed", "cycle_cost_growth_steered")
    names += ("bytes_per_prompt", "snapshot_load_time_over_read")
    figures = {f"{name}_1e4": [50.0, 50.0, 50.0] for name in names}
    met = {row["figure"]: row["met"] for row in bars(figures, 10**4)}
    assert met.pop("bytes_per_prompt_1e4") and not any(met.values())


def test_a_pool_whose_priors_all_changed_draws_as_one_built_anew(monkeypatch):
    monkeypatch.setattr("cures_ray.curriculum.pool.BUILD_ANEW", 0)
    pool, fresh = (PromptPool(config("steered"), 3000) for _ in range(2))
    pool.draw(8, rng_for(0))
    before = pool._samplers["mean"]
    rng = np.random.default_rng(0)
    priors = rng.uniform(0.2, 3, (2, 3000))
    for one in (pool, fresh):
        one.belief.set_prior(None, *priors)
        one._touch(np.arange(3000))
    drawn, expected = pool.draw(64, rng_for(1)), fresh.draw(64, rng_for(1))
    assert pool._samplers["mean"] is not before
    assert np.array_equal(drawn.index, expected.index) and drawn.tau == expected.tau


def test_sizes_have_short_names():
    assert (power(10**4), power(10**7), power(2500)) == ("1e4", "1e7", "2500")
