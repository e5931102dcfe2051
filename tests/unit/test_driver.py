import asyncio
import time

import numpy as np
import pytest
from fakes import World, small_config

from cures_ray.curriculum.machine import Curriculum
from cures_ray.loop.evaluate import Evaluator
from cures_ray.messages import Discard, RunError


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
    assert world.fleet.members["g0"].version == 6
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
    assert accounting.trained == 0 and world.learner.batches == []
    assert world.fleet.members["g0"].version == 3


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


async def test_weights_do_not_change_under_an_evaluation():
    config = small_config(eval={"interval": 2})
    world = World(config, seconds=0.005)
    seen = []

    class Watching(Evaluator):
        async def __call__(self, version, generators):
            before = [g.version for g in generators()]
            metrics = await super().__call__(version, generators)
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
    assert world.fleet.members["late"].version == 20
    assert world.fleet.members["late"].most_active > 0


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
            for name in ("rewards", "advantages", "weights", "rollout_index"):
                assert np.array_equal(getattr(a, name), getattr(b, name))
