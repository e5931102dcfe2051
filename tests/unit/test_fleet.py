"""RayFleet's budget of restarts, with actors replaced by handles that fail to start."""

import asyncio

import pytest

import actors.cluster.fleet as fleet_module
from actors.cluster.fleet import RayFleet
from cures_ray.config import RolloutConfig
from cures_ray.loop.ports import Retired, WorkerLost
from cures_ray.messages import RunError


class Starts:
    """Plays ``ray`` and the actors: start number k fails where ``fails(k)``."""

    def __init__(self, monkeypatch, fails) -> None:
        self.count, self.killed, self.slept = 0, 0, []
        self.fails = fails
        monkeypatch.setattr(fleet_module, "answer", self.answer)
        monkeypatch.setattr(fleet_module, "BACKOFF_S", 0.01)
        monkeypatch.setattr(fleet_module.ray, "kill", self.kill)

    def kill(self, handle) -> None:
        self.killed += 1

    def make(self, index: int):
        class Handle:
            class start:
                @staticmethod
                def remote():
                    return index

        return Handle

    async def answer(self, ref, who, timeout_s):
        self.count += 1
        number = self.count
        await asyncio.sleep(0)
        if self.fails(number):
            raise WorkerLost(f"{who}: ActorDiedError")


def make(monkeypatch, fails, **rollout):
    starts, notes = Starts(monkeypatch, fails), []
    return RayFleet(starts.make, RolloutConfig(**rollout), notes.append), starts, notes


async def test_a_start_that_fails_is_tried_again(monkeypatch):
    fleet, starts, notes = make(monkeypatch, lambda k: k in (2, 3))
    await fleet.launch()
    generator = await fleet.replace("generator-0", "killed")
    assert generator.name == "generator-0" and starts.count == 4 and len(notes) == 2


async def test_a_generator_is_retired_when_its_budget_is_used_up(monkeypatch):
    fleet, starts, _ = make(monkeypatch, lambda k: k > 1, max_restarts=3)
    await fleet.launch()
    with pytest.raises(Retired, match=r"rollout\.max_restarts = 3"):
        await fleet.replace("generator-0", "killed")
    assert starts.count == 4 and fleet.generators() == []


async def test_old_restarts_are_forgiven(monkeypatch):
    fleet, _, _ = make(monkeypatch, lambda k: False, max_restarts=1)
    await fleet.launch()
    await fleet.replace("generator-0", "killed")
    with pytest.raises(Retired):
        await fleet.replace("generator-0", "killed")
    fleet2, _, _ = make(monkeypatch, lambda k: False, max_restarts=1)
    monkeypatch.setattr(fleet_module, "FORGIVEN_S", 0.0)
    await fleet2.launch()
    for _ in range(3):
        await fleet2.replace("generator-0", "killed")


async def test_the_run_starts_with_those_that_started(monkeypatch):
    fleet, _, notes = make(monkeypatch, lambda k: k == 2, num_generators=3)
    await fleet.launch()
    assert len(fleet.generators()) == 2 and "did not start" in notes[0]
    few, _, _ = make(monkeypatch, lambda k: k == 2, num_generators=3, min_generators=3)
    with pytest.raises(RunError, match=r"2 of 3 generators started, rollout.min_generators is 3"):
        await few.launch()
