"""Rivals after their papers: SPO's tracker and draw, GRESO's skipping, shrinkage baselines, the arms that use them."""

import json

import numpy as np
import pytest
from simulated import Run, by_prompt

from benchmarks.harness.arms import ARMS, arm_config
from benchmarks.harness.deviations import DEVIATIONS, deviations_of
from cures_ray.curriculum.machine import Curriculum
from cures_ray.curriculum.streaks import LEAST, Streaks
from cures_ray.learning.advantages import compute_advantages
from cures_ray.ledger.records import decode_commit, encode_commit
from cures_ray.messages import CommitReport, Discard

SPO = {"method": "spo", "prompts_per_step": 32, "pilot_rollouts": 0, "discount": 0.9}


def spo_run(accuracy, **options) -> Run:
    return Run(accuracy, algo={"advantage": "posterior_whitened"}, **SPO | options)


def counts(run: Run) -> tuple[np.ndarray, np.ndarray]:
    return run.curriculum.pool.belief.counts()


# -- SPO --------------------------------------------------------------------------------------------------------------


def test_the_tracker_forgets_its_start_as_it_forgets_rewards():
    """By hand: alpha <- rho alpha + r from Beta(1/2, 1/2), rho = 2^(-D / 0.06) within [0.875, 0.96]."""
    run = spo_run(np.ones(32))
    pool = run.curriculum.pool
    alpha, beta = 0.5, 0.5
    for drift, rho in ((0.0, 0.96), (0.006, 2**-0.1), (0.06, 0.875), (np.nan, 0.9)):
        for lease in run.curriculum.lease("worker", 10**6, run.curriculum.committed):
            pool.note_drift({lease.prompt_index: drift})
            assert run.settle(lease)
        run.step()
        alpha, beta = rho * alpha + 1, rho * beta
        assert counts(run)[0] == pytest.approx(np.full(32, alpha), rel=1e-4)
        assert counts(run)[1] == pytest.approx(np.full(32, beta), rel=1e-3)


def test_the_drift_of_a_commit_is_about_the_rewards_of_its_batch_and_no_later_ones():
    run = spo_run(np.ones(32))
    run.step()
    plan = run.generate()
    drift = {entry.lease.lease_id: 0.03 for entry in plan.entries[:16]}
    report = CommitReport(
        batch=plan.batch, trained={e.lease.lease_id: e.lease.n for e in plan.entries}, discarded={}, drift=drift
    )
    run.curriculum.commit(decode_commit(json.loads(json.dumps(encode_commit(report)))))
    alpha = run.curriculum.pool.belief.counts()[0]
    moved = [e.lease.prompt_index for e in plan.entries[:16]]
    rest = [e.lease.prompt_index for e in plan.entries[16:]]
    first = 1.5  # Beta(1/2, 1/2) and one success
    assert alpha[moved] == pytest.approx(np.full(16, max(2**-0.5, 0.875) * first + 1), rel=1e-5)
    assert alpha[rest] == pytest.approx(np.full(16, 0.9 * first + 1), rel=1e-5)
    assert np.isnan(run.curriculum.pool.drift).all()


def test_a_commit_of_an_older_journal_has_no_drift():
    assert decode_commit(["commit", 3, [[1, 2]], [], []]).drift == {}


def test_the_baseline_is_the_tracker_from_before_the_reward():
    run = spo_run(np.full(64, 0.5))
    for _ in range(3):
        expected = run.curriculum.pool.belief.mean()
        plan = run.step()
        for entry in plan.entries:
            lease = entry.lease
            assert lease.n == 1
            assert lease.alpha / (lease.alpha + lease.beta) == pytest.approx(expected[lease.prompt_index])


def test_prompts_are_drawn_without_replacement_and_settled_ones_seldom():
    accuracy = np.r_[np.full(100, 0.5), np.ones(100)]
    run = spo_run(accuracy)
    plans = [run.step() for _ in range(60)]
    assert all(len(by_prompt(plan)) == 32 for plan in plans)
    late = np.concatenate([list(by_prompt(plan)) for plan in plans[30:]])
    assert np.mean(late < 100) > 0.58 and (late >= 100).any()  # exploration keeps the settled ones alive


def test_offline_samples_start_the_trackers_at_eight_and_are_charged():
    run = spo_run(np.r_[np.zeros(20), np.ones(20)], pilot_rollouts=8)
    plan = run.generate()
    pilots = [e for e in plan.entries if not e.keep.any()]
    assert sum(e.lease.n for e in pilots) == 8 * 40
    trained = [e.lease for e in plan.entries if e.keep.any()]
    assert len(trained) == 32
    for lease in trained:
        alpha = 8 * (8.5 if lease.prompt_index >= 20 else 0.5) / 9
        assert (lease.alpha, lease.alpha + lease.beta) == pytest.approx((alpha, 8), rel=1e-4)
    run.step()
    assert run.accounting.planned == 8 * 40 + 32 and run.accounting.discarded == {Discard.PILOT: 8 * 40}


def test_a_saved_tracker_goes_on_exactly(tmp_path):
    one, two = (spo_run(np.linspace(0, 1, 64)) for _ in range(2))
    for _ in range(4):
        one.step()
    one.curriculum.pool.note_drift(dict(enumerate(np.linspace(0, 0.1, 64))))
    one.curriculum.save(tmp_path)
    two.curriculum = Curriculum.load(tmp_path, two.config, two.ids)
    for _ in range(3):
        assert [e.lease for e in one.step().entries] == [e.lease for e in two.step().entries]
    assert counts(one)[0].tolist() == counts(two)[0].tolist()


# -- GRESO ------------------------------------------------------------------------------------------------------------


def test_streaks_grow_end_and_change_sides():
    streaks = Streaks(3, (0.5, 0.5), 0.01)
    index = np.arange(3)
    for successes in ([4, 0, 2], [4, 0, 4], [4, 4, 0]):
        streaks.observe(index, np.array(successes, float), np.full(3, 4.0))
    assert streaks.visits.tolist() == [3, 1, -1]
    streaks.observe(np.array([0, 0]), np.array([4.0, 3.0]), np.full(2, 4.0))  # two leases of one prompt
    assert streaks.visits[0] == 0 and streaks.roll(np.array([0])) == 1.0


def test_too_many_settled_groups_lower_the_readiness_to_try_them():
    streaks = Streaks(10, (1 / 12, 1 / 6), 0.05)
    for _ in range(50):
        streaks.observe(np.arange(10), np.full(10, 4.0), np.full(10, 4.0))
    assert streaks.probability[0] == LEAST
    assert streaks.probability[1] > 0.9  # no wrong groups at all: try all of those


def test_greso_comes_to_skip_what_is_settled_before_any_rollout():
    accuracy = np.r_[np.full(60, 0.5), np.zeros(120), np.ones(120)]
    greso, dapo = (
        Run(accuracy, method=method, draw="epoch", algo={"advantage": "grpo"}, steps=200)
        for method in ("greso", "dapo")
    )
    for run in (greso, dapo):
        for _ in range(60):
            run.step()
    assert greso.accounting.planned < 0.7 * dapo.accounting.planned
    assert greso.accounting.trained > 0.9 * dapo.accounting.trained
    late = [lease.prompt_index for lease in greso.leased[-400:]]
    assert np.mean(np.array(late) < 60) > 2 * 60 / 300


# -- advantages ----------------------------------------------------------------------


def test_shrinkage_does_not_know_the_rollouts_own_reward():
    rng = np.random.default_rng(0)
    rewards = [rng.integers(0, 2, n).astype(float) for n in (1, 2, 4, 3, 2)]
    one = compute_advantages("shrinkage", rewards, np.ones(5), np.ones(5))
    for i, group in enumerate(rewards):
        for j in range(len(group)):
            flipped = [r.copy() for r in rewards]
            flipped[i][j] = 1 - flipped[i][j]
            two = compute_advantages("shrinkage", flipped, np.ones(5), np.ones(5))
            assert rewards[i][j] - one[i][j] == pytest.approx(flipped[i][j] - two[i][j])


def test_shrinkage_goes_to_the_batch_mean_where_prompts_agree_and_to_their_own_where_they_differ():
    rng = np.random.default_rng(1)

    def error(accuracy, name):
        total = 0.0
        for _ in range(20):
            rewards = [(rng.random(2) < p).astype(float) for p in accuracy]
            baseline = [
                r - a for r, a in zip(rewards, compute_advantages(name, rewards, *np.ones((2, 200))), strict=True)
            ]
            total += float(np.mean([np.square(b - p).mean() for b, p in zip(baseline, accuracy, strict=True)]))
        return total / 20

    alike, apart, mixed = np.full(200, 0.5), rng.permutation([0.0, 1.0] * 100), rng.random(200)
    assert error(alike, "shrinkage") < 0.1 * error(alike, "rloo")
    assert error(apart, "shrinkage") < 1e-6
    assert error(mixed, "shrinkage") < 0.75 * error(mixed, "rloo")


def test_whitening_over_tokens_centres_what_the_tokens_get():
    rewards = [np.ones(1), np.zeros(1), np.ones(1)]
    lengths = [np.array([9]), np.array([1]), np.array([2])]
    belief = np.ones(3)
    plain = np.concatenate(compute_advantages("posterior_whitened", rewards, belief, belief))
    assert plain.mean() == pytest.approx(0) and plain.std() == pytest.approx(1, abs=1e-5)
    own = np.concatenate(compute_advantages("posterior_token_whitened", rewards, belief, belief, lengths=lengths))
    tokens = np.concatenate(lengths)
    assert own @ tokens == pytest.approx(0) and np.square(own) @ tokens / tokens.sum() == pytest.approx(1, abs=1e-5)


# -- arms ----------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_configuration_that_spends_its_batch(arm):
    config = arm_config(arm, task="chain", variant="T", seed=0, budget=20480, base="b", run_dir="r", extra={})
    assert config.trainer.rollout_budget == 20480 and config.curriculum.prompts_per_step in (32, 64, 128, 256)


def test_deviations_are_of_arms_and_are_printed_once():
    assert DEVIATIONS.keys() <= ARMS.keys()
    lines = deviations_of(["spo", "default", "spo@learner.lr=1e-3", "dapo"])
    assert [line.split(":")[0] for line in lines] == ["`spo`", "`dapo`"]
