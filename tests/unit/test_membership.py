"""Generators join and leave while the real driver and curriculum run. Every test asserts that it happened."""

import asyncio

import pytest
from fakes import World, small_config

import cures_ray.loop.membership as membership
from cures_ray.loop.ports import Retired
from cures_ray.messages import Discard, RunError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(membership, "SURVEY_S", 0.01)
    monkeypatch.setattr(membership, "LOOK_S", 0.01)
    monkeypatch.setattr(membership, "NOTICE_S", 0.1)


def world(generators: int = 2, **rollout) -> World:
    """A run without end whose generators hold few rollouts at a time, so that each gets some."""
    config = small_config(
        trainer={"steps": 100_000}, rollout={"num_generators": generators, "max_concurrent_rollouts": 8} | rollout
    )
    return World(config, generators=generators)


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def steps(world: World, more: int) -> None:
    """So many further steps are trained."""
    target = len(world.learner.batches) + more
    await until(lambda: len(world.learner.batches) >= target)


async def hung(generator) -> None:
    """It never answers again, and has leases."""
    generator.hang = True
    await asyncio.sleep(0.05)  # those that it had finish
    await until(lambda: generator.active > 0)


async def ended(world: World, running: asyncio.Task) -> None:
    world.driver.stop()
    accounting = await asyncio.wait_for(running, 10)
    accounting.check()
    assert accounting.planned == accounting.trained + sum(accounting.discarded.values()) + accounting.in_flight


async def test_a_generator_joins_proves_the_current_weights_and_works():
    w = world(generators=1, max_generators=3)
    running = asyncio.create_task(w.driver.run())
    await steps(w, 5)
    w.fleet.room = 2
    await until(lambda: {"g1", "g2"} <= w.fleet.members.keys() and all(g.leased for g in w.fleet.generators()))
    await steps(w, 3)
    first = w.fleet.members["g1"].leased[0]
    assert first[2] >= 5, "its first lease came after it held the weights of the day"
    assert [n for n in w.observer.notes if "joined" in n and "3 generators" in n]
    await ended(w, running)


async def test_learner_and_fleet_go_on_while_one_starts():
    w = world(generators=1, max_generators=2)
    running = asyncio.create_task(w.driver.run())
    await steps(w, 1)
    w.fleet.replace_seconds, w.fleet.room = 3600.0, 1
    await until(lambda: w.fleet.room == 0)
    await steps(w, 10)
    assert "g1" not in w.fleet.members
    await ended(w, running)


async def test_a_drained_generator_finishes_its_leases_and_leaves():
    w = world()
    running = asyncio.create_task(w.driver.run())
    await steps(w, 2)
    drained = w.fleet.members["g0"]
    w.fleet.leaving["g0"] = 60.0
    await until(lambda: w.fleet.dismissed == ["g0"])
    leased = len(drained.leased)
    await steps(w, 5)
    assert len(drained.leased) == leased and drained.active == 0, "it got no more leases and finished its own"
    notes = " ".join(w.observer.notes)
    assert "g0: its node is drained, 60 s left" in notes and "g0 left. The run goes on with 1 generators" in notes
    await ended(w, running)
    assert w.ledger.curriculum.accounting.discarded.get(Discard.LOST, 0) == 0


async def test_shortly_before_its_node_goes_it_gives_back_what_it_has():
    w = world()
    running = asyncio.create_task(w.driver.run())
    await steps(w, 2)
    drained = w.fleet.members["g0"]
    await hung(drained)
    w.fleet.leaving["g0"] = 0.3
    await until(lambda: w.fleet.dismissed == ["g0"])
    await steps(w, 5)
    assert any("rollouts that it had in work are generated again" in note for note in w.observer.notes)
    assert w.ledger.curriculum.accounting.discarded[Discard.LOST] > 0
    await ended(w, running)


async def test_a_drained_generator_that_the_run_needs_works_on_until_another_has_joined():
    w = world(generators=1, max_generators=2)
    running = asyncio.create_task(w.driver.run())
    await steps(w, 2)
    w.fleet.leaving["g0"] = 3600.0
    await until(lambda: any("its node is drained" in note for note in w.observer.notes))
    before = len(w.fleet.members["g0"].leased)
    await steps(w, 5)
    assert len(w.fleet.members["g0"].leased) > before and w.fleet.dismissed == []
    w.fleet.room = 1
    await until(lambda: w.fleet.dismissed == ["g0"])
    await steps(w, 5)
    assert w.fleet.members.keys() == {"g1"}
    await ended(w, running)


async def test_without_another_it_works_until_its_node_is_gone_and_then_the_run_ends():
    w = world(generators=1)

    async def replace(name, why):
        del w.fleet.members[name]
        raise Retired(f"{name} was lost ({why}): no node had room for it")

    w.fleet.replace = replace
    running = asyncio.create_task(w.driver.run())
    await steps(w, 2)
    only = w.fleet.members["g0"]
    w.fleet.leaving["g0"] = 0.2
    await asyncio.sleep(0.3)
    await steps(w, 2)
    assert w.fleet.dismissed == []
    only.die_after = 0
    with pytest.raises(RunError, match=r"no node had room.*0 generators are left"):
        await asyncio.wait_for(running, 10)


async def test_a_drained_generator_whose_node_dies_early_loses_only_its_work():
    w = world()
    running = asyncio.create_task(w.driver.run())
    await steps(w, 2)
    drained = w.fleet.members["g0"]
    await hung(drained)
    w.fleet.leaving["g0"] = 3600.0
    await until(lambda: w.driver._generation.slots["g0"].leaving)
    drained._lost = True
    await until(lambda: w.fleet.dismissed == ["g0"])
    await steps(w, 5)
    assert any("g0 left early (g0 was killed)" in note for note in w.observer.notes)
    assert w.fleet.replaced == [] and w.ledger.curriculum.accounting.discarded[Discard.LOST] > 0
    await ended(w, running)


async def test_one_whose_weights_stay_wrong_is_never_admitted_again():
    w = world()
    running = asyncio.create_task(w.driver.run())
    await steps(w, 1)
    w.fleet.replacement_canary_error = 1.0
    w.fleet.members["g0"].canary_error = 1.0
    await until(lambda: w.fleet.dismissed == ["g0"])
    await steps(w, 10)
    assert len(w.fleet.replaced) == 1 and w.fleet.members.keys() == {"g1"}
    await ended(w, running)
