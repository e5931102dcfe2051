"""Algorithm 1 (subsets, pilots, resets), priors, and the methods that take several rounds: GVM, DAPO, SPEED, Ada."""

import numpy as np
import pytest
from simulated import Run, by_prompt, rollouts, settlement

from cures_ray.curriculum.allocation import apportion, gvm_weights
from cures_ray.loop.assemble import assemble
from cures_ray.loop.chunks import VerifiedChunk
from cures_ray.messages import ChunkSummary, Discard, GradientStatistics

MIXED = np.linspace(0.0, 1.0, 60)
HALF = np.full(60, 0.5)


def of_round(plan, number):
    return [e for e in plan.entries if e.lease.round == number]


def training_batch(run, plan):
    """What the learner would get of ``plan``."""
    groups = {}
    for e in plan.entries:
        n = e.lease.n
        summary = ChunkSummary(
            generator="g", lease_id=np.array([e.lease.lease_id]), attempt=np.zeros(1, int), n=np.array([n]),
            failed=np.zeros(1, bool), prompt_tokens=np.array([3]), seconds=np.zeros(1),
            completion_tokens=np.full(n, 3), truncated=np.zeros(n, bool), min_version=np.full(n, plan.batch),
            max_version=np.full(n, plan.batch),
        )  # fmt: skip
        groups[e.lease.lease_id] = (VerifiedChunk.of(summary, "payload", np.zeros(n, bool)), 0)
    return assemble(plan, groups, run.config, plan.batch)[0]


# -- Algorithm 1 ----------------------------------------------------------------------------------------------


def paper(accuracy=MIXED, staleness=0, **curriculum) -> Run:
    """T = 3 subsets of 20 prompts, M = 2 steps, N' = 4."""
    return Run(
        accuracy, staleness=staleness,
        **{"belief": "reset", "subsets": 3, "subset_steps": 2, "pilot_rollouts": 4} | curriculum,
    )  # fmt: skip


def test_subsets_are_disjoint_cover_everything_and_come_round_again():
    run = paper()
    seen = []
    for _ in range(4):
        first, second = run.step(), run.step()
        pilots = {e.lease.prompt_index for e in of_round(first, 0)}
        assert len(pilots) == 20 and {*by_prompt(first), *by_prompt(second)} == pilots
        seen.append(pilots)
    assert set().union(*seen[:3]) == set(range(60)) and sum(map(len, seen[:3])) == 60
    assert seen[3] == seen[0]


def test_pilots_are_charged_and_discarded_and_the_step_spends_n_besides():
    run = paper()
    plan = run.step()
    pilots, trained = of_round(plan, 0), of_round(plan, 1)
    assert all(e.lease.n == 4 and not e.keep.any() and e.drop_reason is Discard.PILOT for e in pilots)
    assert sum(e.lease.n for e in trained) == 32 and all(e.keep.all() for e in trained)
    assert run.accounting.trained == 32 and run.accounting.discarded == {Discard.PILOT: 80}
    assert not of_round(run.step(), 1) and run.accounting.planned == 32 + 80 + 32


def test_the_draw_after_the_pilots_knows_them_and_the_leases_baseline_is_the_belief_after_them():
    run = paper(np.r_[np.zeros(30), np.full(30, 0.5)], pilot_rollouts=12, target_ess_fraction=0.3, n_max=32)
    plans = [run.step() for _ in range(6)]
    drawn = [e for plan in plans for e in plan.entries if e.lease.round == 1 or not of_round(plan, 1)]
    assert np.mean([run.accuracy[e.lease.prompt_index] == 0.5 for e in drawn]) > 0.85
    assert all(e.lease.alpha + e.lease.beta >= 2 + 12 for e in drawn)


def test_estimates_are_reset_for_the_next_subset_and_only_there():
    run = paper(HALF)
    run.step(), run.step()
    counts = sum(run.curriculum.pool.belief.counts())
    old = np.flatnonzero(counts > 2)
    assert len(old) == 20
    for _ in range(4):
        run.step()  # two other subsets
    plan = run.step()  # the first one again: pilots from the prior
    assert all((e.lease.alpha, e.lease.beta) == (1.0, 1.0) for e in of_round(plan, 0))
    assert {e.lease.prompt_index for e in of_round(plan, 0)} == set(old)


def test_trained_pilots_share_the_group_of_their_prompt_and_the_baseline_does_not_know_them():
    run = paper(HALF, train_on_pilots=True, algo={"advantage": "posterior_loo"})
    plan = run.step()
    drawn = {e.lease.prompt_index for e in of_round(plan, 1)}
    for e in plan.entries:
        assert e.keep.all() == (e.lease.prompt_index in drawn) and e.keep.any() == e.keep.all()
        assert (e.lease.alpha, e.lease.beta) == (1.0, 1.0)
    batch = training_batch(run, plan)
    per_prompt = dict.fromkeys(drawn, 0.0)
    prompt_of = {e.lease.lease_id: e.lease.prompt_index for e in plan.entries}
    for group in batch.groups:
        per_prompt[prompt_of[group.lease_id]] += float(group.weights.sum()) * 16
    weight = {e.lease.prompt_index: e.lease.weight for e in of_round(plan, 1)}
    assert per_prompt == pytest.approx(weight) and sum(weight.values()) == pytest.approx(1)


def test_pilots_of_prompts_that_are_not_drawn_are_not_trained():
    """They have no weight in the objective: training them would only cost, and shift batch-whitened advantages."""
    run = paper(HALF, train_on_pilots=True)
    plan = run.step()
    idle = [
        e for e in of_round(plan, 0) if e.lease.prompt_index not in {x.lease.prompt_index for x in of_round(plan, 1)}
    ]
    assert idle and run.accounting.discarded == {Discard.PILOT: 4 * len(idle)}


def test_later_batches_wait_for_the_pilots_of_their_subset():
    run = paper(staleness=1)
    c = run.curriculum
    pilots = c.lease("w", 10**6, 0)
    assert {lease.batch for lease in pilots} == {0} and len(pilots) == 20
    for lease in pilots[:-1]:
        run.settle(lease)
        assert c.lease("w", 10**6, 0) == []
    run.settle(pilots[-1])
    later = c.lease("w", 10**6, 0)
    assert {lease.batch for lease in later} == {0, 1} and sum(lease.n for lease in later) == 64
    assert all(lease.alpha + lease.beta == 6 for lease in later)


def test_without_resets_pilots_come_once():
    run = Run(MIXED, belief="discount", pilot_rollouts=2)
    plans = [run.step() for _ in range(5)]
    assert [len({e.lease.round for e in plan.entries}) for plan in plans] == [2, 1, 1, 1, 1]
    assert len(of_round(plans[0], 0)) == 60


# -- priors ------------------------------------------------------------------------------------------------------


def test_priors_by_level_reach_prompts_that_were_never_seen():
    levels = np.arange(400) % 2
    run = Run(np.where(levels, 0.9, 0.1), levels=levels, prior_from="level", prior_strength=4.0, sampling="uniform")
    for _ in range(16):
        run.step()
    belief = run.curriculum.pool.belief
    unseen = np.flatnonzero(belief.visits == 0)
    assert len(unseen) > 200
    alpha, beta = belief.counts(unseen)
    assert alpha + beta == pytest.approx(np.full(len(unseen), 4.0), rel=1e-5)
    assert belief.mean(unseen) == pytest.approx(run.accuracy[unseen], abs=0.12)
    plan = run.step()  # and through Lease.alpha the baseline of one rollout
    fresh = [e.lease for e in plan.entries if e.lease.prompt_index in set(unseen)]
    assert fresh and all(abs(x.alpha / (x.alpha + x.beta) - run.accuracy[x.prompt_index]) < 0.15 for x in fresh)


def test_priors_by_predictor_forecast_and_report_their_calibration():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3)).astype(np.float32)
    accuracy = 1 / (1 + np.exp(-3 * features[:, 0]))
    run = Run(accuracy, features=features, prior_from="predictor", prior_strength=4.0, sampling="uniform")
    for _ in range(25):
        run.step()
    metrics = run.curriculum.status().metrics
    for name in ("predictor_ece", "predictor_brier", "predictor_log_loss"):
        assert np.isfinite(metrics[name])
    belief = run.curriculum.pool.belief
    unseen = np.flatnonzero(belief.visits == 0)
    assert len(unseen) > 150 and np.corrcoef(belief.mean(unseen), accuracy[unseen])[0, 1] > 0.8


# -- GVM -----------------------------------------------------------------------------------------------------------


def test_gvm_pilots_its_prompts_and_gives_nothing_to_those_without_success():
    run = Run(np.r_[np.zeros(30), np.full(30, 0.6)], method="gvm", pilot_rollouts=4, n_max=32)
    for _ in range(10):
        plan = run.step()
        pilots = {e.lease.prompt_index: float(e.rewards.mean()) for e in of_round(plan, 0)}
        draws = {e.lease.prompt_index: round(8 * e.lease.weight) for e in of_round(plan, 0)}
        n = {e.lease.prompt_index: e.lease.n for e in of_round(plan, 1)}
        assert all(e.lease.n == 4 and not e.keep.any() for e in of_round(plan, 0))
        if any(pilots.values()):
            assert all(pilots[i] > 0 for i in n) and sum(n.values()) == 32
            shares = np.array([draws[i] for i in pilots]) * gvm_weights(np.array(list(pilots.values())), 1.0)
            high = np.where(shares > 0, 32 * np.array([draws[i] for i in pilots]), 0)
            assert [n.get(i, 0) for i in pilots] == apportion(shares, 32, 0, high).tolist()
    assert run.accounting.discarded.keys() == {Discard.PILOT}


def test_gvm_without_any_success_spreads_evenly():
    run = Run(np.zeros(60), method="gvm", pilot_rollouts=2)
    plan = run.step()
    assert sum(e.lease.n for e in of_round(plan, 1)) == 32 and plan.metrics["gvm_without_success"] == 1


def test_gvm_weighs_gradient_norms_and_takes_the_pooled_one_where_it_knows_none():
    """A norm of 1 for unknown prompts beside measured norms of 100 would starve them."""
    run = Run(np.ones(60), method="gvm", pilot_rollouts=2, sigma="last_layer", n_max=32)
    plan = run.generate()
    known = {e.lease.prompt_index: e.lease.lease_id for e in of_round(plan, 1)}
    run.step([GradientStatistics(
        lease_id=i, n_plus=2, n_minus=0, sum_sq_plus=2e4, sum_sq_minus=0.0, sq_sum_plus=1.0, sq_sum_minus=0.0, dot=0.0
    ) for i in known.values()])  # fmt: skip
    for _ in range(5):
        plan = run.step()
        per_draw = [e.lease.n / round(8 * e.lease.weight) for e in of_round(plan, 1)]
        assert max(per_draw) - min(per_draw) <= 1


# -- DAPO -------------------------------------------------------------------------------------------------------


def test_dapo_draws_until_m_groups_are_informative_and_charges_everything():
    run = Run(np.r_[np.zeros(100), np.full(100, 0.5)], method="dapo", dapo_max_rounds=8)
    plan = run.step()
    trained = [e for e in plan.entries if e.keep.any()]
    assert sum(e.lease.weight for e in trained) == pytest.approx(1) and plan.metrics["rounds"] > 1
    assert all(0 < e.rewards.mean() < 1 for e in trained)
    filtered = sum(e.lease.n for e in plan.entries if len(set(e.rewards.tolist())) == 1)
    surplus = rollouts(plan) - filtered - 32
    expected = {Discard.FILTERED: filtered} | ({Discard.SURPLUS: surplus} if surplus else {})
    assert run.accounting.trained == 32 and run.accounting.discarded == expected
    assert plan.metrics["dapo_missing_groups"] == 0
    assert len(by_prompt(plan)) == len(plan.entries)  # no prompt is drawn into the batch twice


def test_dapo_that_exhausts_its_rounds_trains_on_what_there_is():
    run = Run(np.r_[np.zeros(95), np.full(5, 0.5)], method="dapo", dapo_max_rounds=3)
    for _ in range(5):
        plan = run.step()
        assert plan.metrics["rounds"] == 3
        good = sum(round(8 * e.lease.weight) for e in plan.entries if e.keep.any())
        assert plan.metrics["dapo_missing_groups"] == 8 - good
    assert run.accounting.in_flight == 0
    dead = Run(np.zeros(100), method="dapo", dapo_max_rounds=2)
    assert not any(e.keep.any() for e in dead.step().entries) and dead.step().metrics["dapo_missing_groups"] == 8


# -- SPEED and Reinforce-Ada -----------------------------------------------------------------------------------


def test_speed_continues_only_prompts_whose_screen_had_both_outcomes():
    run = Run(np.r_[np.zeros(30), np.full(30, 0.5)], method="speed")
    plan = run.step()
    for e in of_round(plan, 0):
        draws = round(8 * e.lease.weight)
        more = [x for x in of_round(plan, 1) if x.lease.prompt_index == e.lease.prompt_index]
        both = 0 < e.rewards.mean() < 1
        assert e.lease.n == 4 * draws and e.keep.all() == both == bool(more)
        assert not more or (more[0].lease.n == 20 * draws and more[0].keep.all())
        assert not more or (more[0].lease.alpha, more[0].lease.weight) == (e.lease.alpha, e.lease.weight)
    assert set(run.accounting.discarded) == {Discard.SCREENED}


def test_reinforce_ada_stops_once_both_outcomes_are_there_and_keeps_a_balanced_subset():
    run = Run(np.r_[np.full(30, 0.02), np.full(30, 0.5)], method="reinforce_ada", belief="none")
    for _ in range(6):
        plan = run.step()
        for prompt in by_prompt(plan):
            entries = [e for e in plan.entries if e.lease.prompt_index == prompt]
            draws = round(8 * entries[0].lease.weight)
            rewards = np.concatenate([e.rewards for e in entries])
            kept = np.concatenate([e.rewards[e.keep] for e in entries])
            assert all(e.lease.n == 8 * draws for e in entries) and len(entries) <= 4
            before = np.concatenate([np.zeros(0), *[e.rewards for e in entries[:-1]]])
            enough = min(before.sum(), len(before) - before.sum()) >= 2 * draws
            assert not (len(entries) > 1 and enough)
            if 0 < rewards.mean() < 1:
                right = min(rewards.sum(), max(2 * draws, 4 * draws - (len(rewards) - rewards.sum())))
                assert len(kept) == 4 * draws and kept.sum() == right
            else:
                assert len(kept) == 0
    assert set(run.accounting.discarded) == {Discard.FILTERED}


def test_adas_baseline_is_the_mean_over_all_that_were_drawn():
    run = Run([0.25], method="reinforce_ada", algo={"advantage": "dr_grpo"})
    plan = run.generate()
    mean = np.concatenate([e.rewards for e in plan.entries]).mean()
    kept = np.concatenate([g.rewards for g in training_batch(run, plan).groups])
    advantages = np.concatenate([g.advantages for g in training_batch(run, plan).groups])
    assert advantages == pytest.approx(kept - mean, abs=1e-6) and kept.mean() != pytest.approx(mean)


# -- MoPPS, knapsack, uniform ------------------------------------------------------------------------------------


def test_mopps_comes_to_prompts_near_its_target():
    run = Run(MIXED, method="mopps", mopps_target=0.5)
    plans = [run.step() for _ in range(60)]
    late = run.accuracy[[i for plan in plans[40:] for i in by_prompt(plan)]]
    assert np.abs(late - 0.5).mean() < 0.15 < np.abs(run.accuracy - 0.5).mean()


def test_mopps_with_fewer_prompts_than_m_takes_all_of_them():
    plan = Run([0.2, 0.5, 0.8], method="mopps").step()
    assert by_prompt(plan).keys() == {0, 1, 2} and rollouts(plan) == 32
    assert [e.lease.weight for e in plan.entries] == pytest.approx([1 / 3] * 3)


def test_an_epoch_of_uniform_draws_takes_each_prompt_once():
    run = Run(HALF[:40], method="uniform", draw="epoch")
    seen = [i for _ in range(5) for i in by_prompt(run.step())]
    assert sorted(seen) == list(range(40))


def test_a_screen_that_failed_to_verify_is_neither_right_nor_wrong():
    run = Run(HALF, method="speed")
    leases = run.curriculum.lease("w", 10**6, 0)
    for lease in leases:
        run.curriculum.settle(settlement(lease, [1.0, *[0.0] * (lease.n - 1)], fault=[True, *[False] * (lease.n - 1)]))
    plan = run.curriculum.plan(0)
    assert not any(e.keep.any() for e in plan.entries) and not of_round(plan, 1)
