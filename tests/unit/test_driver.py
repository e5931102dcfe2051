import asyncio
import time

import numpy as np
import pytest
from fakes import World, small_config

from cures_ray.curriculum.machine import Curriculum
from cures_ray.loop.evaluate import Evaluator
from cures_ray.messages import Discard, PayloadsLost, RunError


def oldest_lag(world: World) -> float:
    return max(m["staleness/max"] for _, m in world.observer.steps if "staleness/max" in m)


async def test_an_asynchronous_run_trains_every_step_and_conserves_rollouts():
    world = World(small_config())
    accounting = await world.driver.run()
    assert [b.step for b in world.learner.batches] == list(range(6))
    assert accounting.planned == accounting.trained == 6 * 32 and accounting.in_flight == 0
    assert all(b.rollouts == 32 for b in world.learner.batches)


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_no_trained_rollout_is_older_than_max_staleness(staleness):
    world = World(small_config(async_rl={"max_staleness": staleness}), generators=2, learn_seconds=0.01)
    await world.driver.run()
    assert oldest_lag(world) <= staleness
    assert oldest_lag(world) == staleness, "a slow learner should let generators use the whole window"


async def test_synchronous_training_never_generates_beside_the_learner():
    world = World(small_config(async_rl={"max_staleness": 0}), learn_seconds=0.01)
    await world.driver.run()
    assert world.learner.active_while_training == [0] * 6


async def test_asynchronous_training_generates_while_the_learner_works():
    world = World(small_config(), seconds=0.02, learn_seconds=0.01)
    await world.driver.run()
    assert max(world.learner.active_while_training) > 0


@pytest.mark.parametrize(("cost", "most"), [(1e6, 0.9), ("measured", 1.0), (None, 1.0)])
async def test_a_train_cost_decides_how_much_the_learner_computes(cost, most):
    world = World(small_config(algo={"advantage": "posterior_std", "train_cost": cost}), seconds=0.01)
    accounting = await world.driver.run()
    assert accounting.trained == 6 * 32  # thinned rollouts are trained ones: their gradient is zero in this draw
    shares = [m["learner/computed_share"] for _, m in world.observer.steps if "learner/computed_share" in m]
    assert len(shares) == 6 and 0 < np.mean(shares) <= most


async def test_synchronous_runs_are_repeatable():
    runs = []
    for _ in range(2):
        world = World(small_config(async_rl={"max_staleness": 0}))
        await world.driver.run()
        runs.append([[(g.lease_id, g.rewards.tolist()) for g in b.groups] for b in world.learner.batches])
    assert runs[0] == runs[1]


async def test_a_lost_generator_is_replaced_and_its_leases_are_generated_again():
    world = World(small_config(), generators=2)
    world.fleet.members["g0"].die_after = 5
    accounting = await world.driver.run()
    assert world.fleet.replaced == ["g0 was killed"]
    assert accounting.discarded[Discard.LOST] > 0
    assert accounting.trained == 6 * 32 and accounting.in_flight == 0
    assert accounting.planned == accounting.trained + accounting.discarded[Discard.LOST]


async def test_a_replacement_proves_the_current_weights_before_it_gets_leases():
    world = World(small_config())
    world.fleet.members["g0"].die_after = 20
    await world.driver.run()
    assert len(world.fleet.replaced) == 1
    leased = world.fleet.members["g0"].leased  # of the replacement, which starts with version -1
    assert leased and all(version >= 0 for *_, version in leased)
    assert all(m["staleness/max"] <= 1 for _, m in world.observer.steps if "staleness/max" in m)


async def test_a_generator_that_fails_its_canary_is_replaced_once():
    world = World(small_config())
    world.fleet.members["g0"].canary_error = 1.7
    accounting = await world.driver.run()
    assert len(world.fleet.replaced) == 1 and "1.7" in world.fleet.replaced[0]
    assert accounting.trained == 6 * 32


async def test_a_replacement_that_fails_its_canary_too_ends_the_run():
    world = World(small_config())
    world.fleet.members["g0"].canary_error = world.fleet.replacement_canary_error = 1.7
    with pytest.raises(RunError, match="version 0"):
        await world.driver.run()


async def test_a_canary_that_fails_alike_twice_ends_the_run_without_a_replacement():
    world = World(small_config())
    world.fleet.members["g0"].canary_error, world.fleet.members["g0"].canary_repeats = 0.3, True
    with pytest.raises(RunError, match=r"canary failed: after loading weights version 0, generator g0 .* mean 0.3"):
        await world.driver.run()
    assert world.fleet.replaced == []


async def test_the_watchdog_names_the_stuck_lease():
    world = World(small_config(trainer={"no_progress_timeout_s": 0.3}))
    world.fleet.members["g0"].hang = True
    began = time.monotonic()
    with pytest.raises(RunError, match=r"lease \d+\.\d+ \(\d+ rollouts\) on g0"):
        await world.driver.run()
    assert time.monotonic() - began < 5


async def test_verifier_faults_touch_neither_training_nor_beliefs():
    world = World(small_config())
    world.verifier.fault_every = 4
    accounting = await world.driver.run()
    assert accounting.discarded[Discard.VERIFIER_FAULT] == 6 * 32 // 4
    assert accounting.trained == 6 * 32 * 3 // 4


async def test_a_missed_generation_deadline_is_a_fault_and_not_a_wrong_answer():
    world = World(small_config())
    world.fleet.members["g0"].time_out = True
    accounting = await world.driver.run()
    assert accounting.discarded[Discard.GENERATION_FAULT] > 0
    assert accounting.planned == accounting.trained + accounting.discarded[Discard.GENERATION_FAULT]
    trained = [r for b in world.learner.batches for g in b.groups for r in g.rewards]
    assert len(trained) == accounting.trained


async def test_a_batch_in_which_everything_failed_skips_the_optimizer_and_goes_on():
    world = World(small_config(trainer={"steps": 3}))
    world.verifier.fault_every = 1
    accounting = await world.driver.run()
    assert accounting.trained == 0 and [b.rollouts for b in world.learner.batches] == [0, 0, 0]
    assert world.driver.version == 3


async def test_the_run_ends_when_the_rollout_budget_is_spent():
    world = World(small_config(trainer={"steps": 100, "rollout_budget": 96}))
    accounting = await world.driver.run()
    assert accounting.planned == 96 and len(world.learner.batches) == 3


@pytest.mark.parametrize(("interval", "versions"), [(2, [0, 2, 3]), (3, [0, 3])])
async def test_the_end_of_a_budget_is_evaluated_once(interval, versions):
    world = World(small_config(trainer={"steps": 100, "rollout_budget": 96}, eval={"interval": interval}))
    evaluator = Evaluator(world.prompts, world.verifier)
    world.driver._evaluate = evaluator
    await world.driver.run()
    assert [version for version, _ in evaluator.history] == versions


@pytest.mark.parametrize("staleness", [0, 1])
async def test_only_synchronous_training_generates_nothing_beside_an_evaluation(staleness):
    """Requests that share a step of the engine change each other's rounding."""
    beside: list[bool] = []

    async def evaluate(version, generators, progress):
        for _ in range(5):
            await asyncio.sleep(0.005)
            beside.append(any(g.active for g in world.fleet.generators()))
        return {}

    config = small_config(async_rl={"max_staleness": staleness}, eval={"interval": 2})
    world = World(config, seconds=0.01, evaluate=evaluate)
    await world.driver.run()
    assert len(beside) == 4 * 5 and any(beside) == (staleness == 1)


async def test_weights_do_not_change_under_an_evaluation():
    config = small_config(eval={"interval": 2})
    world = World(config, seconds=0.005)
    seen = []

    class Watching(Evaluator):
        async def __call__(self, version, generators, progress):
            before = [g.version for g in generators()]
            metrics = await super().__call__(version, generators, progress)
            seen.append((version, before, [g.version for g in generators()]))
            return metrics

    world.driver._evaluate = Watching(world.prompts, world.verifier)
    await world.driver.run()
    assert [version for version, _, _ in seen] == [0, 2, 4, 6]
    assert all(before == after == [version] for version, before, after in seen)


async def test_stop_finishes_the_step_and_saves_a_checkpoint():
    saved = []

    async def save(version):
        saved.append(version)

    world = World(small_config(trainer={"steps": 1000}), save_checkpoint=save)
    run = asyncio.create_task(world.driver.run())
    while len(world.learner.batches) < 3:
        await asyncio.sleep(0.001)
    world.driver.stop()
    accounting = await run
    assert saved == [len(world.learner.batches)] and world.driver.interrupted_at == saved[0]
    assert accounting.in_flight > 0 or accounting.planned == accounting.trained


async def test_a_generator_that_joins_gets_weights_and_leases():
    from fakes import FakeGenerator

    world = World(small_config(trainer={"steps": 20}, rollout={"max_concurrent_rollouts": 16}), seconds=0.003)
    run = asyncio.create_task(world.driver.run())
    while len(world.learner.batches) < 3:
        await asyncio.sleep(0.001)
    world.fleet.members["late"] = FakeGenerator("late", world.prompts)
    await run
    assert world.fleet.members["late"].version >= 18
    assert world.fleet.members["late"].most_active > 0


def rows_in_lease(group) -> np.ndarray:
    """Which rollouts of its lease are trained, wherever the lease lies in its chunk."""
    return group.rollout_index - group.payload.summary.n[: group.place].sum()


async def test_a_synchronous_run_resumed_from_a_checkpoint_trains_the_same_batches(tmp_path):
    settings = {"async_rl": {"max_staleness": 0}, "checkpoint": {"interval": 3}}

    async def keep(world, version):
        (tmp_path / str(version)).mkdir()
        await world.ledger.save(tmp_path / str(version))

    whole = World(small_config(**settings), generators=2, save_checkpoint=lambda v: keep(whole, v))
    expected = await whole.driver.run()
    resumed = World(small_config(**settings), generators=2, version=3)
    resumed.ledger.curriculum = Curriculum.load(
        tmp_path / "3", resumed.config, resumed.prompts.ids, resumed.prompts.levels
    )
    resumed.ledger.curriculum.reissue_uncommitted()
    assert await resumed.driver.run() == expected, "nothing was interrupted: the checkpoint lies between two batches"
    for ours, theirs in zip(resumed.learner.batches, whole.learner.batches[3:], strict=True):
        assert ours.step == theirs.step
        for a, b in zip(ours.groups, theirs.groups, strict=True):
            assert (a.lease_id, a.prompt_tokens) == (b.lease_id, b.prompt_tokens)
            for name in ("rewards", "advantages", "weights"):
                assert np.array_equal(getattr(a, name), getattr(b, name))
            assert np.array_equal(rows_in_lease(a), rows_in_lease(b))


async def test_rollouts_whose_verifier_died_are_verified_again_and_not_generated_again(monkeypatch):
    monkeypatch.setattr("cures_ray.loop.generation.RETRY_S", 0.001)
    world = World(small_config())
    world.verifier.die = 3
    accounting = await world.driver.run()
    assert world.verifier.die == 0, "the fault happened"
    assert accounting.planned == accounting.trained == 6 * 32
    leased = [key[:2] for key in world.fleet.members["g0"].leased]
    assert len(leased) == len(set(leased)), "nothing was generated twice"
    assert any("trying again" in note for note in world.observer.notes)


async def test_rollouts_that_no_verifier_can_judge_are_faults_after_a_few_attempts(monkeypatch):
    monkeypatch.setattr("cures_ray.loop.generation.RETRY_S", 0.001)
    world = World(small_config(trainer={"steps": 2}))
    world.verifier.die = 10**6
    accounting = await world.driver.run()
    assert accounting.trained == 0 and accounting.discarded[Discard.VERIFIER_FAULT] == accounting.planned
    assert world.driver.fault_reasons == {"no verifier could judge it": accounting.planned}
    assert world.observer.steps[-1][1]["verifier/faults/no verifier could judge it"] > 0


async def test_generating_alone_is_no_progress(monkeypatch):
    monkeypatch.setattr("cures_ray.loop.generation.RETRY_S", 100.0)  # the verifier never comes back
    world = World(small_config(trainer={"no_progress_timeout_s": 0.3}))
    world.verifier.die = 10**6
    with pytest.raises(RunError, match="no progress"):
        await world.driver.run()
    assert len(world.fleet.members["g0"].leased) > 0, "leases were generated meanwhile"


async def test_a_slow_weight_sync_of_one_generator_holds_up_neither_learner_nor_the_others():
    world = World(small_config(trainer={"steps": 12}), generators=2)
    world.fleet.members["g1"].sync_seconds = 0.5
    began = time.monotonic()
    await world.driver.run()
    assert len(world.learner.batches) == 12
    assert time.monotonic() - began < 12 * 0.5 / 2, "the run waited for the slow generator at every step"
    assert world.fleet.members["g0"].version >= 10


async def test_a_replacement_that_takes_long_never_stops_the_run():
    world = World(small_config(trainer={"steps": 12}), generators=2)
    world.fleet.members["g0"].die_after, world.fleet.replace_seconds = 3, 3600.0
    accounting = await asyncio.wait_for(world.driver.run(), 10)
    assert world.fleet.replaced == ["g0 was killed"]
    assert len(world.learner.batches) == 12 and accounting.discarded[Discard.LOST] > 0


@pytest.mark.parametrize("staleness", [0, 2])
async def test_no_lease_goes_to_a_generator_that_has_not_proven_the_published_weights(staleness):
    world = World(small_config(trainer={"steps": 8}, async_rl={"max_staleness": staleness}), generators=3)
    for i, generator in enumerate(world.fleet.generators()):
        generator.sync_seconds = 0.002 * i
    accounting = await world.driver.run()
    assert accounting.trained == 8 * 32
    batch_of = {}
    for number, batch in enumerate(world.learner.batches):
        batch_of |= {group.lease_id: number for group in batch.groups}
    for generator in world.fleet.generators():
        assert all(batch_of.get(lease, 0) <= version + staleness for lease, _, version in generator.leased)


async def test_a_transfer_that_needs_the_learner_holds_it_until_all_generators_have_the_weights():
    world = World(small_config(trainer={"steps": 4}), generators=2)
    world.learner.together = True
    world.fleet.members["g1"].sync_seconds = 0.05
    held = []
    train = world.learner.train

    async def watching(batch):
        held.append([g.version for g in world.fleet.generators()])
        return await train(batch)

    world.learner.train = watching
    await world.driver.run()
    assert held == [[step, step] for step in range(4)]


async def test_a_generator_that_keeps_a_lease_for_ever_is_replaced(monkeypatch):
    monkeypatch.setattr("cures_ray.loop.generation.GRACE_S", 0.1)
    world = World(small_config(rollout={"timeout_s": 0.1, "max_new_tokens": 16}), generators=2)
    forgetful = world.fleet.members["g0"]
    forgetful.forget = 2
    accounting = await world.driver.run()
    assert forgetful.forget == 0 and "did not come back" in world.fleet.replaced[0]
    assert accounting.trained == 6 * 32 and accounting.discarded[Discard.LOST] > 0


async def test_a_step_lasts_until_its_weights_are_out_and_its_checkpoint_is_written():
    async def save(version):
        await asyncio.sleep(0.05)

    world = World(small_config(checkpoint={"interval": 1}, trainer={"steps": 4}), save_checkpoint=save)
    began = time.monotonic()
    await world.driver.run()
    seconds = [m["time/step_s"] for _, m in world.observer.steps if "time/step_s" in m]
    assert len(seconds) == 4 and min(seconds[:3]) >= 0.05
    assert sum(seconds) <= time.monotonic() - began


async def test_payloads_that_the_learner_cannot_fetch_are_generated_again_and_the_step_repeated():
    world = World(small_config(), generators=2)
    train, lost = world.learner.train, []

    async def losing(batch):
        if batch.step == 2 and not lost:
            lost.extend(g.lease_id for g in batch.groups[:3])
            raise PayloadsLost("payloads are lost", tuple(lost))
        return await train(batch)

    world.learner.train = losing
    accounting = await world.driver.run()
    assert len(lost) == 3 and [b.step for b in world.learner.batches] == list(range(6))
    assert accounting.trained == 6 * 32 and accounting.discarded[Discard.LOST] > 0
    assert set(lost) <= {g.lease_id for g in world.learner.batches[2].groups}


async def test_weights_that_the_learner_does_not_keep_are_not_replaced_while_a_generator_loads_them():
    world = World(small_config(trainer={"steps": 4}), generators=2)
    world.learner.kept = False
    world.fleet.members["g1"].sync_seconds = 0.05
    publish, loading = world.learner.publish, []

    async def watching(version):
        loading.append([slot.loading for slot in world.driver._generation.slots.values()])
        return await publish(version)

    world.learner.publish = watching
    await world.driver.run()
    assert len(loading) == 5 and not any(map(any, loading))


async def test_many_faults_end_the_run_with_their_reason():
    world = World(small_config(verifier={"max_fault_share": 0.2}))
    world.verifier.fault_every = 2
    with pytest.raises(RunError, match=r"verdicts are faults.*timeout: 5 s"):
        await world.driver.run()
    assert any("timeout: 5 s" in note for note in world.observer.notes)
