"""RayFleet: budget of restarts, joining and leaving, with actors replaced by handles that fail to start."""

import asyncio

import pytest
from ray.exceptions import RayTaskError

import actors.cluster.fleet as fleet_module
from actors.cluster.fleet import RayFleet
from cures_ray.config import Config
from cures_ray.loop.ports import Retired, WorkerLost
from cures_ray.messages import ConfigError, RunError


class Starts:
    """Plays ``ray`` and the actors: start number k fails where ``fails(k)``."""

    def __init__(self, monkeypatch, fails) -> None:
        self.count, self.killed, self.names = 0, 0, []
        self.fails = fails
        monkeypatch.setattr(fleet_module, "answer", self.answer)
        monkeypatch.setattr(fleet_module, "BACKOFF_S", 0.01)
        monkeypatch.setattr(fleet_module, "LOOK_S", 0.01)
        monkeypatch.setattr(fleet_module.ray, "kill", self.kill)

    def kill(self, handle) -> None:
        self.killed += 1

    def make(self, name: str, options: dict):
        self.names.append(name)

        class Handle:
            class start:
                @staticmethod
                def remote():
                    return name

        return Handle

    async def answer(self, ref, who, timeout_s):
        self.count += 1
        number = self.count
        await asyncio.sleep(0)
        if self.fails(number):
            raise WorkerLost(f"{who}: ActorDiedError")


class Rooms:
    """Places with ``free`` rooms; generators in ``gone`` have lost theirs, those in ``drained`` are about to."""

    def __init__(self, free: int) -> None:
        self.free_rooms, self.held = free, set()
        self.gone, self.drained = set(), {}
        self.refusals = 0  # so many nodes lack the run's files

    def take(self, name):
        if name in self.held and name in self.gone | self.drained.keys():
            self.held.remove(name)  # the room went with its node
        if name not in self.held:
            if self.refusals:
                self.refusals -= 1
                raise ConfigError("model.path does not exist there")
            if not self.free_rooms:
                return None
            self.free_rooms -= 1
            self.held.add(name)
            self.gone.discard(name)
        return {}

    def stays(self, name):
        return name in self.held and name not in self.gone

    def survey(self):
        return dict(self.drained), self.free_rooms > 0

    def free(self, name):
        if name in self.held:
            self.held.remove(name)
            self.free_rooms += name not in self.gone | self.drained.keys()


def make(monkeypatch, fails=lambda k: False, rooms: int = 1, **rollout):
    starts, notes = Starts(monkeypatch, fails), []
    config = Config.model_validate({"rollout": rollout, "placement": {"timeout_s": 0.05}})
    places = Rooms(max(rooms, config.rollout.num_generators))
    fleet = RayFleet(starts.make, places, config, notes.append)
    fleet.places = places
    return fleet, starts, notes


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


# -- joining and leaving ---------------------------------------------------------------------------------------------


async def test_a_generator_joins_while_there_is_room_and_up_to_max_generators(monkeypatch):
    fleet, _starts, _ = make(monkeypatch, rooms=3, num_generators=1, max_generators=2)
    await fleet.launch()
    assert (await fleet.survey()).room
    assert (await fleet.join()).name == "generator-1"
    assert not (await fleet.survey()).room, "rollout.max_generators is reached"
    fixed, *_ = make(monkeypatch, rooms=3, num_generators=1)
    await fixed.launch()
    assert not (await fixed.survey()).room


async def test_one_that_is_starting_counts(monkeypatch):
    fleet, *_ = make(monkeypatch, rooms=3, num_generators=1, max_generators=2)
    await fleet.launch()
    joining = asyncio.create_task(fleet.join())
    await asyncio.sleep(0)
    assert not (await fleet.survey()).room
    await joining


async def test_a_lost_node_without_a_spare_one_retires_the_generator_until_there_is_room(monkeypatch):
    fleet, _starts, _ = make(monkeypatch, num_generators=2)
    await fleet.launch()
    fleet.places.gone.add("generator-1")
    with pytest.raises(Retired, match=r"node died.*no node had room.*joins when there is room"):
        await fleet.replace("generator-1", "its node died")
    assert [g.name for g in fleet.generators()] == ["generator-0"] and not (await fleet.survey()).room
    fleet.places.free_rooms = 1
    assert (await fleet.survey()).room and (await fleet.join()).name == "generator-1"


async def test_a_lost_node_with_a_spare_one_moves_the_generator(monkeypatch):
    fleet, *_ = make(monkeypatch, rooms=3, num_generators=2)
    await fleet.launch()
    fleet.places.gone.add("generator-1")
    assert (await fleet.replace("generator-1", "its node died")).name == "generator-1"
    assert fleet.places.free_rooms == 0


async def test_a_start_whose_node_goes_away_ends_and_does_not_wait_for_the_start_deadline(monkeypatch):
    fleet, starts, notes = make(monkeypatch, rooms=2, num_generators=1)

    async def never(ref, who, timeout_s):
        fleet.places.gone.add("generator-0")
        monkeypatch.setattr(fleet_module, "answer", starts.answer)
        await asyncio.sleep(3600)

    await fleet.launch()
    monkeypatch.setattr(fleet_module, "answer", never)
    await asyncio.wait_for(fleet.replace("generator-0", "killed"), 5)
    assert "its node went away while it started" in notes[0] and starts.killed == 2


async def test_a_drained_generator_leaves_room_for_another_that_starts_before_it_left(monkeypatch):
    fleet, *_ = make(monkeypatch, rooms=3, num_generators=2)
    await fleet.launch()
    fleet.places.drained["generator-0"] = 30.0
    survey = await fleet.survey()
    assert survey.leaving == {"generator-0": 30.0} and survey.room
    assert (await fleet.join()).name == "generator-2"
    await fleet.dismiss("generator-0")
    assert {g.name for g in fleet.generators()} == {"generator-1", "generator-2"}
    assert not (await fleet.survey()).room and not (await fleet.survey()).leaving


async def test_one_that_joins_and_fails_again_and_again_is_given_up(monkeypatch):
    fleet, _starts, notes = make(monkeypatch, lambda k: k > 1, rooms=2, max_generators=2, max_restarts=2)
    await fleet.launch()
    for _ in range(2):
        assert (await fleet.survey()).room and await fleet.join() is None
    assert not (await fleet.survey()).room and len(notes) == 2 and fleet.places.free_rooms == 1


async def test_what_a_start_raises_ends_no_run_that_goes_on_already(monkeypatch):
    fleet, _, notes = make(monkeypatch, rooms=2, max_generators=2, max_restarts=1)
    await fleet.launch()

    async def raises(ref, who, timeout_s):
        raise RayTaskError("start", "torch.OutOfMemoryError: CUDA out of memory", RuntimeError("CUDA out of memory"))

    monkeypatch.setattr(fleet_module, "answer", raises)
    assert await fleet.join() is None
    with pytest.raises(Retired):
        await fleet.replace("generator-0", "killed")
    assert len(notes) == 2 and all("CUDA out of memory" in note for note in notes)


async def test_a_node_without_the_runs_files_is_said_and_another_is_taken(monkeypatch):
    fleet, _, notes = make(monkeypatch, rooms=2, max_generators=2)
    await fleet.launch()
    fleet.places.refusals = 1
    assert (await fleet.join()).name == "generator-1"
    assert "model.path does not exist there" in notes[0]


async def test_a_start_that_is_cancelled_leaves_no_actor(monkeypatch):
    fleet, starts, _ = make(monkeypatch, rooms=2, max_generators=2)
    await fleet.launch()

    async def never(ref, who, timeout_s):
        await asyncio.sleep(3600)

    monkeypatch.setattr(fleet_module, "answer", never)
    joining = asyncio.create_task(fleet.join())
    await asyncio.sleep(0.1)
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    assert starts.killed == 1 and [g.name for g in fleet.generators()] == ["generator-0"]
    assert (await fleet.survey()).room, "its place is free again"
