"""What a GPU engine is started with, and the order in which learner and engines take turns on a shared GPU."""

import asyncio

import pytest

from actors.cluster.colocate import asleep
from actors.engine_settings import engine_arguments
from actors.generator import GeneratorActor
from cures_ray.config import Config
from cures_ray.loop.ports import WorkerLost


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 4096}')
    return str(tmp_path)


def arguments(model: str, **sections) -> dict:
    return engine_arguments(Config.model_validate(sections), model, True)


def test_tensor_parallel_engines_use_processes_of_their_own_bundle(model):
    """Ray's executor wants one bundle a GPU and refuses a bundle that holds several."""
    several = arguments(model, rollout={"tensor_parallel_size": 4})
    assert several["tensor_parallel_size"] == 4 and several["distributed_executor_backend"] == "mp"
    assert "distributed_executor_backend" not in arguments(model)


def test_an_engine_that_shares_its_gpu_takes_a_part_of_it_and_can_sleep(model):
    alone = arguments(model)
    assert (alone["gpu_memory_utilization"], alone["enable_sleep_mode"]) == (0.85, False)
    shared = arguments(model, placement={"colocate": True})
    assert (shared["gpu_memory_utilization"], shared["enable_sleep_mode"]) == (0.45, True)
    own = arguments(model, placement={"colocate": True}, rollout={"gpu_memory_utilization": 0.6})
    assert own["gpu_memory_utilization"] == 0.6


def test_vllm_knows_every_argument(model):
    from vllm.engine.arg_utils import AsyncEngineArgs

    AsyncEngineArgs(**arguments(model, placement={"colocate": True}, rollout={"tensor_parallel_size": 2}))


class Engine:
    """Writes down what it is told."""

    def __init__(self, log: list, name: str = "engine") -> None:
        self.log, self.name = log, name

    async def sleep(self, level: int, mode: str) -> None:
        await asyncio.sleep(0)
        self.log.append((self.name, "sleep", level, mode))

    async def wake_up(self) -> None:
        self.log.append((self.name, "wake"))


def generator(log: list, name: str, may_sleep: bool = True) -> GeneratorActor:
    actor = GeneratorActor(name, Config(), "model", {})
    actor._engine, actor._may_sleep = Engine(log, name), may_sleep
    return actor


async def test_all_engines_sleep_before_the_learner_trains_and_wake_after_it():
    log: list = []
    fleet = [generator(log, "g0"), generator(log, "g1")]
    async with asleep(lambda: fleet):
        log.append("train")
    # level 1: weights to host memory; "keep": requests in flight go on afterwards
    assert sorted(log[:2]) == [("g0", "sleep", 1, "keep"), ("g1", "sleep", 1, "keep")]
    assert log[2] == "train" and sorted(log[3:]) == [("g0", "wake"), ("g1", "wake")]


async def test_engines_wake_although_the_step_failed():
    log: list = []
    with pytest.raises(RuntimeError, match="loss"):
        async with asleep(lambda: [generator(log, "g0")]):
            raise RuntimeError("loss")
    assert log[-1] == ("g0", "wake")


async def test_a_lost_engine_does_not_stop_the_learner_but_another_error_does():
    class Lost:
        async def sleep(self) -> None:
            raise WorkerLost("g0")

        async def wake(self) -> None:
            raise WorkerLost("g0")

    class Broken(Lost):
        async def sleep(self) -> None:
            raise ValueError("cannot sleep")

    log: list = []
    async with asleep(lambda: [Lost(), generator(log, "g1")]):
        log.append("train")
    assert log[1] == "train" and log[2] == ("g1", "wake")
    with pytest.raises(ValueError, match="cannot sleep"):
        async with asleep(lambda: [Broken()]):
            raise AssertionError("trained beside an engine that did not sleep")


async def test_an_engine_that_has_its_device_alone_never_sleeps():
    log: list = []
    async with asleep(lambda: [generator(log, "g0", may_sleep=False)]):
        pass
    assert log == []
