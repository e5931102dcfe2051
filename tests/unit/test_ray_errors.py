"""Whatever Ray says that the task itself did not say is a lost worker: the real exception types, without a cluster."""

from concurrent.futures import Future

import pytest
from ray import exceptions
from ray._raylet import ActorID

import actors.cluster.adapters as adapters
from actors.learner import _blame
from cures_ray.loop.ports import LearnerLost, PayloadLost, WorkerLost
from cures_ray.messages import RunError

LOST = [
    exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
    exceptions.NodeDiedError("the node died"),
    exceptions.ActorDiedError(),
    exceptions.ActorUnavailableError("The actor is restarting", ActorID.nil().binary()),
    exceptions.ActorUnschedulableError("its node is gone"),
    exceptions.ActorPlacementGroupRemoved(),
    exceptions.LocalRayletDiedError(),
    exceptions.WorkerCrashedError(),
    exceptions.OutOfDiskError("/tmp is full"),
    exceptions.RaySystemError("lost"),
    exceptions.RpcError("unreachable"),
    exceptions.RuntimeEnvSetupError("no environment"),
]


class Ref:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def future(self) -> Future:
        future: Future = Future()
        future.set_exception(self.error)
        return future


def raised_by_the_task(cause: Exception) -> BaseException:
    return exceptions.RayTaskError("train", f"{type(cause).__name__}: {cause}", cause).as_instanceof_cause()


@pytest.mark.parametrize("error", LOST, ids=lambda e: type(e).__name__)
async def test_rays_own_errors_are_lost_workers_with_rays_message(error):
    with pytest.raises(WorkerLost, match=type(error).__name__) as caught:
        await adapters.answer(Ref(error), "generator-0", 5.0)
    assert not isinstance(caught.value, PayloadLost)


@pytest.mark.parametrize("error", LOST, ids=lambda e: type(e).__name__)
def test_and_a_learner_rank_that_ended_so_starts_again_from_a_checkpoint(error):
    assert isinstance(_blame("train", [(1, error)]), LearnerLost)


async def test_what_the_task_itself_raised_is_no_lost_worker():
    error = raised_by_the_task(ValueError("a prompt fills the context"))
    with pytest.raises(ValueError, match="fills the context"):
        await adapters.answer(Ref(error), "generator-0", 5.0)
    assert type(_blame("train", [(0, error)])) is RunError
