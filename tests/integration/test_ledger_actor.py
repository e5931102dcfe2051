"""The ledger actor killed by SIGKILL while the real driver works: nothing is lost, nothing is counted twice."""

import asyncio
import os
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.cluster.adapters import RayLedger
from actors.ledger import LedgerActor
from cures_ray.ledger.ledger import Ledger, journal_path
from cures_ray.ledger.prompts import write_prompts
from cures_ray.messages import RunError
from tests.unit.fakes import World, small_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
KILLS = 3


def start(folder: Path, world: World, session: str):
    actor = ray.remote(LedgerActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0)
    write_prompts(folder, world.prompts.ids, world.prompts.levels)
    return actor.remote(str(folder), world.config, session)


async def kill_repeatedly(handle, world: World) -> list[int]:
    """SIGKILL the ledger's process at uneven moments of the run; the process ids."""
    killed = []
    for i in range(KILLS):
        before = len(world.observer.steps)
        while len(world.observer.steps) < before + 1 + 2 * i:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.013 * i)
        while True:
            try:
                pid = (await asyncio.wrap_future(handle.process.remote().future()))["pid"]
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.1)
                continue
            break
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    return killed


def test_a_run_whose_ledger_is_killed_again_and_again_ends_with_every_rollout_accounted(ray_session, tmp_path):
    world = World(small_config(trainer={"steps": 24, "no_progress_timeout_s": 60.0}), generators=2, seconds=0.01)
    session = uuid.uuid4().hex
    handle = start(tmp_path / "ledger", world, session)
    world.driver.ports.ledger = RayLedger(handle)

    async def run():
        killer = asyncio.create_task(kill_repeatedly(handle, world))
        return await world.driver.run(), await killer

    accounting, killed = asyncio.run(run())
    assert len(set(killed)) == KILLS, "each time another process was killed"
    assert ray.get(handle.process.remote())["recovered"] > 0
    assert accounting.in_flight == 0 and accounting.trained > 0
    assert [step for step, _ in world.observer.steps] == list(range(1, 25))
    assert sum(batch.rollouts for batch in world.learner.batches) == accounting.trained

    ray.kill(handle)  # what is on disk is what it had said
    back = Ledger(tmp_path / "ledger", world.config, world.prompts.ids, world.prompts.levels, session=session)
    assert back.curriculum.accounting == accounting and back.curriculum.committed == 24
    evidence = sum(back.curriculum.pool.belief.visits)
    assert evidence >= len({(g.lease_id) for b in world.learner.batches for g in b.groups})
    assert np.all(back.curriculum.pool.belief.alpha > 0)


def test_damage_in_the_middle_of_the_journal_ends_the_run_within_seconds_with_file_and_offset(ray_session, tmp_path):
    world = World(small_config(), generators=1)
    handle = start(tmp_path / "ledger", world, "s")
    ledger = RayLedger(handle)

    async def run():
        await ledger.lease("g0", 8, 0)
        await ledger.lease("g0", 8, 0)
        pid = (await asyncio.wrap_future(handle.process.remote().future()))["pid"]
        path = journal_path(tmp_path / "ledger", 0)
        offset = path.read_bytes().index(b"\n") + 1
        data = bytearray(path.read_bytes())
        data[offset + 20] ^= 1
        path.write_bytes(data)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RunError) as caught:
            while True:
                await ledger.status()
        return str(caught.value), offset, time.monotonic() - began

    text, offset, seconds = asyncio.run(run())
    assert f"journal-000000.log is damaged at byte {offset}" in text and "checkpoint.resume" in text
    assert seconds < 20
