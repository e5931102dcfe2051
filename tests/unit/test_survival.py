"""What a run survives, on the real driver and curriculum with workers that die, hang and lie. Every test asserts that
its fault happened."""

import asyncio
import time

import pytest
from fakes import World, small_config

from cures_ray.loop.ports import LearnerLost, Retired
from cures_ray.messages import CheckpointError, Discard, RunError


class Grave:
    """A fleet whose generator ``name`` cannot come back."""

    def __init__(self, world: World, name: str) -> None:
        self.tried = 0

        async def replace(who: str, why: str):
            assert who == name
            self.tried += 1
            del world.fleet.members[who]
            raise Retired(f"{who} was lost ({why}) and is retired")

        world.fleet.replace = replace


async def test_a_generator_that_cannot_come_back_is_retired_and_the_run_goes_on():
    world = World(small_config(), generators=2)
    world.fleet.members["g0"].die_after = 5
    grave = Grave(world, "g0")
    accounting = await world.driver.run()
    assert grave.tried == 1 and accounting.discarded[Discard.LOST] > 0
    assert any("The run goes on with 1 generators" in note for note in world.observer.notes)
    assert accounting.trained == 6 * 32 and accounting.in_flight == 0


async def test_a_run_ends_below_min_generators_and_says_so():
    world = World(small_config(rollout={"min_generators": 2, "num_generators": 2}), generators=2)
    world.fleet.members["g0"].die_after = 5
    grave = Grave(world, "g0")
    with pytest.raises(RunError, match=r"g0 was lost .*1 generators are left, rollout.min_generators is 2"):
        await world.driver.run()
    assert grave.tried == 1


async def test_a_failed_checkpoint_is_said_and_training_goes_on():
    failed = []

    async def save(version: int) -> None:
        failed.append(version)
        raise CheckpointError("no space left on device")

    world = World(small_config(checkpoint={"interval": 2}), save_checkpoint=save)
    accounting = await world.driver.run()
    assert failed == [2, 4, 6] and accounting.trained == 6 * 32
    assert [n for n in world.observer.notes if "no checkpoint at version 2: no space left" in n]


async def test_the_last_checkpoint_is_written_before_the_last_evaluation_which_may_fail():
    saved = []

    async def save(version: int) -> None:
        saved.append(version)

    async def evaluate(version, generators, progress):
        if version == 6:
            assert saved == [6]
            raise RunError("the only generator was killed in the final evaluation")
        return {"eval/version": float(version)}

    config = small_config(eval={"interval": 6}, checkpoint={"interval": 0})
    world = World(config, evaluate=evaluate, save_checkpoint=save)
    with pytest.raises(RunError, match="final evaluation"):
        await world.driver.run()
    assert saved[0] == 6


async def test_a_run_that_fails_between_two_steps_leaves_a_checkpoint_of_them():
    saved = []

    async def save(version: int) -> None:
        saved.append(version)

    world = World(small_config(), save_checkpoint=save)
    verify, calls = world.verifier.verify, []

    async def broken(payload, rollouts):
        if len(world.learner.batches) >= 3:
            calls.append(1)
            raise RunError("the verifier's machine is gone")
        return await verify(payload, rollouts)

    world.verifier.verify = broken
    with pytest.raises(RunError, match="machine is gone"):
        await world.driver.run()
    assert calls and saved == [world.driver.version] and saved[0] >= 2
    assert any("is saved" in note for note in world.observer.notes)


async def test_a_lost_learner_is_told_to_whoever_can_restart_it_and_nothing_broken_is_saved():
    saved = []

    async def save(version: int) -> None:
        saved.append(version)

    world = World(small_config(), save_checkpoint=save)
    train = world.learner.train

    async def dying(batch):
        if batch.step == 2:
            raise LearnerLost("learner rank 0 died during train")
        return await train(batch)

    world.learner.train = dying
    with pytest.raises(LearnerLost, match="rank 0 died"):
        await world.driver.run()
    assert saved == [] and world.driver.version == 2


async def test_stopping_does_not_wait_for_leases_that_do_not_come():
    saved = []

    async def save(version: int) -> None:
        saved.append(version)

    config = small_config(trainer={"steps": 50, "no_progress_timeout_s": 60.0, "stop_timeout_s": 0.2})
    world = World(config, save_checkpoint=save)
    running = asyncio.create_task(world.driver.run())
    while len(world.learner.batches) < 3:
        await asyncio.sleep(0.01)
    world.fleet.members["g0"].hang = True
    await asyncio.sleep(0.2)
    began = time.monotonic()
    world.driver.stop()
    await asyncio.wait_for(running, 10)
    assert time.monotonic() - began < 3.0
    assert world.fleet.members["g0"].active > 0, "leases were in work"
    assert world.driver.interrupted_at == saved[-1] < 50
    assert any("stopping" in note and "Again: end at once" in note for note in world.observer.notes)
