"""From batch plans to training batches: who is trained, who is not and why, and the shared baselines."""

import numpy as np
import pytest

from cures_ray.config import AlgoConfig, AsyncConfig, Config, CuresCurriculum, RolloutConfig
from cures_ray.loop.assemble import assemble
from cures_ray.loop.chunks import VerifiedChunk
from cures_ray.messages import BatchEntry, BatchPlan, ChunkSummary, Discard, Lease, RunError


def config(**algo):
    return Config(
        curriculum=CuresCurriculum(prompts_per_step=32, allocation="sigma", n_min=2),
        algo=AlgoConfig(**{"advantage": "rloo", **algo}),
        async_rl=AsyncConfig(max_staleness=1),
        rollout=RolloutConfig(max_new_tokens=10),
    )


def entry(lease_id, rewards, *, prompt="a", keep=None, weight=0.5, alpha=1.0, beta=1.0, reason=Discard.FILTERED):
    n = len(rewards)
    lease = Lease(
        lease_id=lease_id, attempt=0, prompt_index=0, prompt_id=prompt, n=n, batch=3, round=0, weight=weight,
        alpha=alpha, beta=beta, seed=0,
    )  # fmt: skip
    mask = np.ones(n, bool) if keep is None else np.array(keep, bool)
    return BatchEntry(lease=lease, rewards=np.array(rewards, np.float32), keep=mask, drop_reason=reason)


def group(lease_id, n, *, fault=(), versions=None, length=5, failed=False):
    """The second lease of a chunk whose first has three rollouts."""
    summary = ChunkSummary(
        generator="g", lease_id=np.array([99, lease_id]), attempt=np.zeros(2, int), n=np.array([3, n]),
        failed=np.array([False, failed]), prompt_tokens=np.array([9, 4]), seconds=np.ones(2),
        completion_tokens=np.array([7] * 3 + [length] * n), truncated=np.zeros(3 + n, bool),
        min_version=np.array([0] * 3 + ([3] * n if versions is None else versions)), max_version=np.full(3 + n, 3),
    )  # fmt: skip
    mask = np.zeros(3 + n, bool)
    mask[[3 + i for i in fault]] = True
    return VerifiedChunk.of(summary, "payload", mask), 1


def run(entries, groups, **algo):
    plan = BatchPlan(batch=3, prompts=2, entries=tuple(entries), metrics={})
    batch, report = assemble(plan, groups, config(**algo), version=3)
    for one in entries:  # conservation, for every case in this file
        ended = report.trained[one.lease.lease_id] + sum(report.discarded.get(one.lease.lease_id, {}).values())
        assert ended == len(one.rewards)
    assert batch.rollouts == sum(report.trained.values())
    return batch, report


def test_a_plain_group_is_trained_whole_zero_variance_included():
    batch, report = run([entry(1, [1, 0, 1]), entry(2, [0, 0], prompt="b")], {1: group(1, 3), 2: group(2, 2)})
    assert report.trained == {1: 3, 2: 2} and report.discarded == {}
    assert batch.step == 3 and [g.lease_id for g in batch.groups] == [1, 2]
    assert batch.groups[0].advantages == pytest.approx([0.5, -1, 0.5])
    assert batch.groups[0].weights == pytest.approx([0.5 / 3 / 10] * 3)
    assert batch.groups[1].advantages == pytest.approx(0)


def test_a_fault_is_not_a_wrong_answer():
    batch, report = run([entry(1, [1, 0, 0])], {1: group(1, 3, fault=[1])})
    assert report.discarded == {1: {Discard.VERIFIER_FAULT: 1}}
    assert batch.groups[0].rollout_index.tolist() == [3, 5]
    assert batch.groups[0].advantages == pytest.approx([1, -1])  # n_i is 2
    assert batch.groups[0].weights == pytest.approx([0.5 / 2 / 10] * 2)


def test_a_failed_generation_and_a_lost_payload_are_accounted():
    batch, report = run([entry(1, [0, 0]), entry(2, [0], prompt="b")], {1: group(1, 2, fault=[0, 1], failed=True)})
    assert report.discarded == {1: {Discard.GENERATION_FAULT: 2}, 2: {Discard.LOST: 1}}
    assert batch.rollouts == 0 and batch.groups == ()


def test_rollouts_behind_the_staleness_bound_are_dropped_and_leave_the_baseline():
    batch, report = run([entry(1, [1, 0, 0])], {1: group(1, 3, versions=[2, 3, 1])})
    assert report.discarded == {1: {Discard.STALE: 1}}
    assert batch.groups[0].advantages == pytest.approx([1, -1])


def test_leases_of_one_prompt_share_baseline_count_and_weight():
    entries = [entry(1, [1, 0]), entry(2, [0, 0], prompt="b"), entry(3, [0, 0])]
    batch, _ = run(entries, {1: group(1, 2), 2: group(2, 2), 3: group(3, 2)})
    by_lease = {g.lease_id: g for g in batch.groups}
    assert by_lease[1].advantages == pytest.approx([1, -1 / 3])
    assert by_lease[3].advantages == pytest.approx([-1 / 3, -1 / 3])
    assert by_lease[1].weights == pytest.approx([0.5 / 4 / 10] * 2)


def test_untrained_pilots_stay_out_of_the_baseline():
    entries = [entry(1, [1, 1], keep=[0, 0], reason=Discard.PILOT), entry(2, [1, 0])]
    batch, report = run(entries, {1: group(1, 2), 2: group(2, 2)})
    assert report.discarded == {1: {Discard.PILOT: 2}}
    assert batch.groups[0].advantages == pytest.approx([1, -1])


def test_rollouts_filtered_within_a_group_stay_in_its_baseline():
    batch, report = run([entry(1, [1, 0, 0, 0], keep=[1, 1, 0, 0])], {1: group(1, 4)}, advantage="dr_grpo")
    assert report.discarded == {1: {Discard.FILTERED: 2}}
    assert batch.groups[0].advantages == pytest.approx([0.75, -0.25])
    assert batch.groups[0].weights == pytest.approx([0.5 / 2 / 10] * 2)


def test_a_wholly_filtered_group_changes_nobody_elses_weight_or_advantage():
    alone, _ = run([entry(1, [1, 0])], {1: group(1, 2)}, advantage="reinforce_pp")
    entries = [entry(1, [1, 0]), entry(2, [0, 0], prompt="b", keep=[0, 0])]
    both, _ = run(entries, {1: group(1, 2), 2: group(2, 2)}, advantage="reinforce_pp")
    assert both.groups[0].advantages == pytest.approx(alone.groups[0].advantages)
    assert both.groups[0].weights == pytest.approx(alone.groups[0].weights)


def test_the_posterior_baseline_takes_the_belief_of_the_lease():
    batch, _ = run([entry(1, [1], alpha=3, beta=1)], {1: group(1, 1)}, advantage="posterior_loo")
    assert batch.groups[0].advantages == pytest.approx([0.25])


def test_the_overlong_penalty_shapes_the_advantage_but_not_the_class():
    groups = {1: group(1, 2)}
    groups[1][0].summary.completion_tokens[3:] = [10, 5]
    batch, _ = run([entry(1, [1, 1])], groups, overlong_penalty_tokens=5)
    assert batch.groups[0].rewards.tolist() == [1, 1]
    assert batch.groups[0].advantages == pytest.approx([-1, 1])


def test_with_kl_in_the_reward_whitening_is_left_to_the_learner():
    batch, _ = run([entry(1, [1, 0])], {1: group(1, 2)}, advantage="reinforce_pp", kl_in_reward=True, kl_coef=0.1)
    assert batch.groups[0].advantages == pytest.approx([1, 0])


def test_a_summary_that_does_not_fit_its_plan_is_refused():
    with pytest.raises(RunError, match="lease 1"):
        run([entry(1, [1, 0])], {1: group(1, 3)})


def test_a_train_cost_thins_instead_of_min_advantage():
    prompts = [chr(97 + i) for i in range(26)]
    entries = [entry(i, [i % 3 == 0], prompt=p, alpha=1.0 + i, beta=9.0) for i, p in enumerate(prompts)]
    groups = {i: group(i, 1) for i in range(26)}
    plan = BatchPlan(batch=3, prompts=26, entries=tuple(entries), metrics={})
    setting = config(advantage="posterior_std", min_advantage=0.0)

    def nonzero(cost: float | None) -> int:
        batch, _ = assemble(plan, groups, setting, 3, cost)
        return sum(int((g.advantages != 0).sum()) for g in batch.groups)

    assert nonzero(None) == 26 > nonzero(1000.0)


def test_what_untrained_pilots_told_is_in_the_baseline():
    """The pilots' lease carries the belief from before them; the group that is trained starts from after them."""
    pilots = entry(1, [0, 0, 0, 0], keep=[0, 0, 0, 0], weight=0.0, alpha=1.0, beta=1.0, reason=Discard.PILOT)
    rest = entry(2, [1], alpha=1.0, beta=5.0)
    batch, report = run([pilots, rest], {1: group(1, 4), 2: group(2, 1)}, advantage="posterior_loo")
    assert report.discarded == {1: {Discard.PILOT: 4}}
    assert batch.groups[0].advantages == pytest.approx([1 - 1 / 6])


def test_trained_pilots_share_the_belief_from_before_them():
    pilots, rest = entry(1, [0, 0], reason=Discard.PILOT), entry(2, [1], alpha=1.0, beta=3.0)
    batch, _ = run([pilots, rest], {1: group(1, 2), 2: group(2, 1)}, advantage="posterior_loo")
    assert batch.groups[1].advantages == pytest.approx([1 - 1 / 4])  # (1 + 0) / (2 + 3 - 1)


@pytest.mark.parametrize(
    ("kl_coef", "sigma", "thins"), [(0.1, "bernoulli", False), (0.0, "last_layer", False), (0.0, "bernoulli", True)]
)
def test_thinning_does_nothing_where_the_learner_computes_every_rollout(kl_coef, sigma, thins):
    """A KL term or last-layer statistics need all of them: thinning would save nothing and add variance."""
    prompts = [chr(97 + i) for i in range(26)]
    entries = [entry(i, [i % 3 == 0], prompt=p, alpha=1.0 + i, beta=9.0) for i, p in enumerate(prompts)]
    plan = BatchPlan(batch=3, prompts=26, entries=tuple(entries), metrics={})
    groups = {i: group(i, 1) for i in range(26)}

    def advantages(min_advantage: float, train_cost: float | None) -> np.ndarray:
        setting = config(advantage="posterior_std", min_advantage=min_advantage, kl_coef=kl_coef)
        setting.curriculum.sigma = sigma
        return np.concatenate([g.advantages for g in assemble(plan, groups, setting, 3, train_cost)[0].groups])

    whole = advantages(0.0, None)
    assert (advantages(5.0, None) != whole).any() == (advantages(0.0, 1000.0) != whole).any() == thins
