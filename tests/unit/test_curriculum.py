"""The ledger's state machine: evidence counts once, in any order; rollouts are conserved; a run continues exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Run, by_prompt, rollouts, settlement

from cures_ray.curriculum.batches import Batch, TrackedLease, batch_metrics
from cures_ray.curriculum.machine import Curriculum
from cures_ray.curriculum.methods import METHODS
from cures_ray.curriculum.sampling import PotentialSampler, potential
from cures_ray.messages import CommitReport, Discard, Lease

HALF = np.full(20, 0.5)


def ordered_belief(run: Run, accepted: dict[tuple[int, int, int], tuple[int, np.ndarray, np.ndarray]]):
    """(alpha, beta) from the list of distinct accepted settlements, by the formula: ``accepted`` maps (batch, lease,
    attempt) to (prompt, rewards, evidence)."""
    c = run.config.curriculum
    alpha, beta = np.ones(len(run.ids)), np.ones(len(run.ids))
    decay = c.discount if c.belief == "discount" else 1.0
    for _, (i, r, e) in sorted(accepted.items(), key=lambda item: item[0]):
        if len(r):
            alpha[i] = 1 + decay * (alpha[i] - 1) + (e * r).sum()
            beta[i] = 1 + decay * (beta[i] - 1) + (e * (1 - r)).sum()
    return alpha, beta


actions = st.lists(
    st.tuples(st.sampled_from(["settle", "settle", "repeat", "late", "give_back", "faults"]), st.integers(0, 10**6)),
    max_size=60,
)


@given(actions, st.sampled_from(["discount", "none"]))
@settings(max_examples=60, deadline=None)
def test_the_belief_is_that_of_the_distinct_accepted_settlements_after_any_interleaving(steps, belief):
    run = Run(np.linspace(0, 1, 12), staleness=1, belief=belief, **({"discount": 0.8} if belief == "discount" else {}))
    c = run.curriculum
    out: dict[tuple[int, int], Lease] = {}  # handed out and not settled
    old: list[Lease] = []  # settled, or given back before
    accepted: dict[tuple[int, int, int], tuple[int, np.ndarray, np.ndarray]] = {}
    for action, which in steps:
        for lease in c.lease("w", 40, 0):
            out[lease.lease_id, lease.attempt] = lease
        lease = list(out.values())[which % len(out)] if out else None
        if action == "give_back" and lease is not None:
            c.give_back([(lease.lease_id, lease.attempt)], Discard.LOST)
            old.append(out.pop((lease.lease_id, lease.attempt)))
        elif action in ("settle", "faults") and lease is not None:
            fault = np.arange(lease.n) % 2 == 0 if which % 2 else np.ones(lease.n, bool)
            fault = fault if action == "faults" else np.zeros(lease.n, bool)
            assert run.settle(lease, fault=fault)
            old.append(out.pop((lease.lease_id, lease.attempt)))
            kept = run.rewards(lease)[~fault]
            key = (lease.batch, lease.lease_id, lease.attempt)
            accepted[key] = (lease.prompt_index, kept, np.ones(len(kept)))
        elif action in ("repeat", "late") and old:
            stale = old[which % len(old)]
            before = c.accounting.planned, c.accounting.in_flight, dict(c.accounting.discarded)
            assert not run.settle(stale)
            c.give_back([(stale.lease_id, stale.attempt + 7)], Discard.LOST)
            assert before == (c.accounting.planned, c.accounting.in_flight, c.accounting.discarded)
        c.accounting.check()
    alpha, beta = ordered_belief(run, accepted)
    counts = c.pool.belief.counts()
    assert counts[0] == pytest.approx(alpha, rel=1e-5) and counts[1] == pytest.approx(beta, rel=1e-5)
    lost = sum(x.n for x in old if (x.batch, x.lease_id, x.attempt) not in accepted)
    assert c.accounting.discarded.get(Discard.LOST, 0) == lost


@given(st.randoms(use_true_random=False), st.sampled_from(["cures", "mopps", "knapsack"]))
@settings(max_examples=25, deadline=None)
def test_the_next_draw_depends_on_the_set_of_settlements_and_not_on_their_order(random, method):
    """Two batches with common prompts in flight, a discount: evidence is counted in lease order."""
    draws = []
    for shuffled in (False, True):
        run = Run(
            np.linspace(0, 1, 12),
            staleness=1,
            method=method,
            discount=0.7,
            **({"tau": 0.1} if method == "cures" else {}),
        )
        c = run.curriculum
        leases = c.lease("w", 64, 0)
        assert {x.batch for x in leases} == {0, 1}
        assert {x.prompt_index for x in leases if x.batch == 0} & {x.prompt_index for x in leases if x.batch == 1}
        if shuffled:
            random.shuffle(leases)
        for i, lease in enumerate(leases):
            run.settle(lease)
            if i % 5 == 0:
                c.status()  # looking changes nothing
        c.commit(CommitReport(batch=0, trained={}, discarded={}))
        draws.append(
            [(x.lease_id, x.prompt_index, x.n, x.alpha, x.beta, x.weight, x.seed) for x in c.lease("w", 99, 1)]
        )
    assert draws[0] and draws[0] == draws[1]


def test_a_draw_knows_all_evidence_settled_before_it_committed_or_not():
    run = Run(np.linspace(0, 1, 20), staleness=2, tau=0.05, belief="none")
    c = run.curriculum
    for batch in range(3):
        leases = c.lease("w", 32, 0)
        assert {x.batch for x in leases} == {batch} and sum(x.n for x in leases) == 32
        sampler = PotentialSampler(potential(c.pool.belief.mean()))
        assert c.batches[batch].metrics["ess"] == pytest.approx(sampler.ess(0.05))
        for lease in leases:
            run.settle(lease)


def test_evidence_of_an_old_policy_is_discounted_by_its_lag():
    run = Run([0.5], staleness=2, discount=0.5)
    lease = run.curriculum.lease("w", 1, 0)[0]
    run.curriculum.lease("w", 0, 2)  # version 2 is out
    versions = np.arange(lease.n) % 3
    s = settlement(lease, np.ones(lease.n))
    s = type(s)(**{name: getattr(s, name) for name in s.__slots__} | {"min_version": versions})
    run.curriculum.settle(s)
    assert run.curriculum.pool.belief.counts()[0] == pytest.approx([1 + (0.5 ** (2 - versions)).sum()], rel=1e-6)


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_settlement_of_the_wrong_length_is_refused_and_changes_nothing():
    run = Run(HALF)
    lease = run.curriculum.lease("w", 1, 0)[0]
    with pytest.raises(ValueError, match=f"lease {lease.lease_id} has {lease.n} rollouts"):
        run.curriculum.settle(settlement(lease, np.zeros(lease.n + 1)))
    assert run.settle(lease)


def test_settlements_of_unknown_leases_are_not_accepted():
    run = Run(HALF)
    lease = run.curriculum.lease("w", 1, 0)[0]
    stranger = Lease(**{n: getattr(lease, n) for n in Lease.__slots__} | {"lease_id": 999})
    assert not run.settle(stranger)
    assert run.settle(lease) and not run.settle(lease)


def test_a_reward_that_is_no_number_is_a_fault():
    run = Run([0.5])
    lease = run.curriculum.lease("w", 1, 0)[0]
    run.curriculum.settle(settlement(lease, [np.nan, *[1.0] * (lease.n - 1)]))
    assert run.curriculum.pool.belief.counts()[1] == pytest.approx([1.0])
    assert run.curriculum.plan(0).entries[0].keep.tolist() == [False] + [True] * (lease.n - 1)


def test_a_commit_that_ends_more_rollouts_than_were_leased_is_refused_and_changes_nothing():
    run = Run(HALF)
    plan = run.generate()
    first = plan.entries[0].lease
    with pytest.raises(ValueError, match=f"lease {first.lease_id}"):
        run.curriculum.commit(CommitReport(batch=0, trained={first.lease_id: first.n + 1}, discarded={}))
    too_many = {first.lease_id: {Discard.STALE: 1}}
    with pytest.raises(ValueError, match=r"of \d+ rollouts"):
        run.curriculum.commit(CommitReport(batch=0, trained={first.lease_id: first.n}, discarded=too_many))
    assert run.accounting.trained == 0 and run.accounting.in_flight == 32
    run.step()
    assert run.accounting.trained == 32


def test_a_commit_of_an_unfinished_batch_is_refused():
    run = Run(HALF)
    run.curriculum.lease("w", 1, 0)
    for batch in (0, 1):
        with pytest.raises(ValueError, match="not finished"):
            run.curriculum.commit(CommitReport(batch=batch, trained={}, discarded={}))


def test_a_repeated_commit_changes_nothing():
    run = Run(HALF, sigma="last_layer")
    plan = run.step()
    before = run.curriculum.accounting
    trained = {e.lease.lease_id: e.lease.n for e in plan.entries}
    again = run.curriculum.commit(CommitReport(batch=0, trained=trained, discarded={}))
    assert again == before and run.curriculum.committed == 1
    assert by_prompt(run.step()) and run.accounting.trained == 64


def test_every_rollout_of_a_commit_ends_for_one_reason():
    run = Run([1.0] * 20)
    leases = run.curriculum.lease("w", 99, 0)
    for k, lease in enumerate(leases):
        fault = np.zeros(lease.n, bool)
        fault[0] = k == 0
        run.settle(lease, fault=fault)
    trained = {x.lease_id: x.n - 1 for x in leases[:3]}  # the others' payloads are gone
    run.curriculum.commit(CommitReport(batch=0, trained=trained, discarded={leases[1].lease_id: {Discard.STALE: 1}}))
    discarded = run.accounting.discarded
    assert discarded[Discard.VERIFIER_FAULT] == 1 and discarded[Discard.STALE] == 1
    assert discarded[Discard.LOST] == 32 - sum(trained.values()) - 2 and run.accounting.in_flight == 0


# -- admission and returns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_more_batches_are_open_than_staleness_admits(staleness):
    run = Run(HALF, staleness=staleness)
    for version in range(3):
        leases = []
        while new := run.curriculum.lease("w", 10, version):
            leases += new
        assert max(x.batch for x in leases) == version + staleness
        for lease in leases:
            run.settle(lease)
        run.curriculum.commit(CommitReport(batch=version, trained={}, discarded={}))


def test_the_rollout_budget_and_the_last_step_end_the_leases():
    short = Run(HALF, steps=2, staleness=9)
    assert sum(x.n for x in short.curriculum.lease("w", 10**6, 0)) == 64
    budget = Run(HALF, staleness=9)
    budget.config.trainer.rollout_budget = 65
    assert sum(x.n for x in budget.curriculum.lease("w", 10**6, 0)) == 96


def test_leases_come_in_order_and_at_most_as_many_rollouts_as_asked_but_at_least_one_lease():
    run = Run(HALF)
    first = run.curriculum.lease("w", 1, 0)
    assert len(first) == 1 and first[0].n > 1
    rest = run.curriculum.lease("w", 9, 0)
    assert sum(x.n for x in rest) <= 9 and [x.lease_id for x in first + rest] == list(range(1 + len(rest)))
    assert run.curriculum.lease("w", 0, 0) == []


def test_a_returned_lease_is_issued_again_and_charged_again_with_its_belief_and_seed():
    run = Run(HALF)
    lease = run.curriculum.lease("w", 1, 0)[0]
    run.settle(lease)
    run.curriculum.give_back([(lease.lease_id, 0), (lease.lease_id, 0), (77, 0)], Discard.LOST)
    assert run.accounting.planned == 32 + lease.n and run.accounting.discarded == {Discard.LOST: lease.n}
    again = run.curriculum.lease("v", 1, 0)[0]
    assert (again.lease_id, again.attempt) == (lease.lease_id, 1)
    for name in ("prompt_index", "n", "alpha", "beta", "weight", "seed", "batch", "round"):
        assert getattr(again, name) == getattr(lease, name)
    assert not run.settle(lease) and run.settle(again)


def test_a_payload_lost_after_the_batch_was_ready_reopens_it():
    run = Run(HALF)
    plan = run.generate()
    lost = plan.entries[0].lease
    run.curriculum.give_back([(lost.lease_id, lost.attempt)], Discard.LOST)
    assert run.curriculum.plan(0) is None
    assert rollouts(run.step()) == 32 and run.accounting.planned == 32 + lost.n


# -- persistence ------------------------------------------------------------------------------------------------


def advance(run: Run, c: Curriculum, seed: int, calls: int) -> list:
    """A reproducible stretch of a run with everything in flight; what an observer sees of it."""
    rng, seen = np.random.default_rng(seed), []
    for _ in range(calls):
        new = c.lease("w", int(rng.integers(1, 60)), c.committed)
        seen += new
        keys = c.leased_keys()
        for k in rng.permutation(len(keys))[: (2 * len(keys) + 2) // 3]:
            lease = c.leased(*keys[k])
            if rng.random() < 0.1:
                c.give_back([keys[k]], Discard.LOST)
            else:
                c.settle(settlement(lease, run.rewards(lease), version=max(c.version - 1, 0)))
        plan = c.plan(c.committed)
        if plan is not None:
            seen.append({k: v for k, v in plan.metrics.items() if k != "seconds"})
            seen += [(e.lease, e.keep.tolist(), e.rewards.tolist()) for e in plan.entries]
            c.commit(
                CommitReport(
                    batch=plan.batch, trained={e.lease.lease_id: 1 for e in plan.entries if e.keep.any()}, discarded={}
                )
            )
            seen.append({k: v for k, v in c.status().metrics.items() if k != "seconds"})
        seen.append(str(c.accounting))
    return seen


VARIANTS = {name: {"method": name} for name in METHODS} | {
    "paper": {"belief": "reset", "subsets": 3, "subset_steps": 2, "pilot_rollouts": 2},
    "thompson": {"belief_draw": "thompson"},
    "level": {"prior_from": "level"},
    "predictor": {"prior_from": "predictor"},
    "cost": {"allocation": "cost_aware"},
    "epoch": {"method": "uniform", "draw": "epoch"},
    "last layer": {"sigma": "last_layer", "allocation": "rloo_gain"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_run_continues_exactly(variant, tmp_path):
    """Saved with open, leased and settled leases of several batches; the original goes on beside the restored one."""
    options = {"pilot_rollouts": 2} if variant == "gvm" else {}
    run = Run(np.linspace(0, 1, 30), levels=np.arange(30) % 3, staleness=2, **options, **VARIANTS[variant])
    one = run.curriculum
    advance(run, one, 0, 30)
    one.lease("w", 5, one.committed)
    states = {held.state for batch in one.batches.values() for held in batch.leases}
    assert one.committed and len(states) > 1
    one.save(tmp_path)
    two = Curriculum.load(tmp_path, run.config, run.ids, *run.columns)
    assert two.accounting == one.accounting and two.leased_keys() == one.leased_keys()
    assert advance(run, one, 1, 25) == advance(run, two, 1, 25)
    assert one.committed > 3


def test_a_snapshot_of_other_prompts_is_refused(tmp_path):
    run = Run(HALF)
    run.curriculum.save(tmp_path)
    with pytest.raises(ValueError, match="20 other prompts"):
        Curriculum.load(tmp_path, run.config, run.ids[::-1].copy())


def test_after_a_resume_what_was_handed_out_is_issued_again(tmp_path):
    run = Run(HALF)
    leases = run.curriculum.lease("w", 20, 0)
    run.settle(leases[0])
    run.curriculum.save(tmp_path)
    c = Curriculum.load(tmp_path, run.config, run.ids)
    c.reissue_uncommitted()
    assert c.accounting.discarded == {Discard.INTERRUPTED: sum(x.n for x in leases)} and c.leased_keys() == []
    again = c.lease("w", 10**6, 0)
    assert [(x.lease_id, x.attempt) for x in again[: len(leases)]] == [(x.lease_id, 1) for x in leases]
    assert sum(x.n for x in again) == 32


def test_a_curriculum_needs_prompts_and_columns_of_their_length():
    with pytest.raises(ValueError, match="at least one prompt"):
        Run([])
    with pytest.raises(ValueError, match="levels has 3 rows for 20 prompts"):
        Run(HALF, levels=np.zeros(3))


def test_useful_is_the_share_of_outcomes_that_the_belief_held_less_likely():
    def tracked(alpha: float, rewards: list[float], valid: list[bool]) -> TrackedLease:
        n = len(rewards)
        lease = Lease(
            lease_id=0, attempt=0, prompt_index=0, prompt_id="", n=n, batch=0, round=0, weight=1.0, alpha=alpha,
            beta=1.0, seed=0,
        )  # fmt: skip
        one = TrackedLease.fresh(lease, "train", 1)
        one.rewards, one.valid = np.array(rewards, np.float32), np.array(valid)
        return one

    likely_solved = tracked(9.0, [1.0, 0.0, 0.0], [True, True, False])  # one of two judged was unexpected
    toss = tracked(1.0, [1.0], [True])  # half
    assert batch_metrics(Batch(number=0, leases=[likely_solved, toss]))["useful"] == pytest.approx(1.5 / 3)
    assert batch_metrics(Batch(number=0, leases=[tracked(0.1, [0.0] * 4, [True] * 4)]))["useful"] == 0.0
