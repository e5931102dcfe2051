"""``cures train`` that ends by SIGKILL, the whole run at once, at a moment that it proves to have reached.

python dying_run.py CONFIG.yaml PHASE VERSION

The driver's ports are the real ones. The one that PHASE names begins its real call, and while that is in work every
process of the run is killed. Just before, ``RUN/death.json`` says what was in work. With PHASE "none" nothing dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from actors.cluster import launch
from cures_ray.config_load import load_config
from cures_ray.loop.ports import Ports

PHASES = ("generation", "verification", "learner step", "publishing", "checkpoint", "evaluation")


class DyingRun(launch.Run):
    phase, version = "none", 0

    async def _start_actors(self) -> Ports:
        ports = await super()._start_actors()
        port, method = {
            "generation": (ports.ledger, "lease"),
            "verification": (ports.verifier, "verify"),
            "learner step": (ports.learner, "train"),
            "publishing": (ports.learner, "publish"),
            "checkpoint": (ports.learner, "save"),
            "evaluation": (ports.verifier, "verify"),
        }[self.phase]
        real = getattr(port, method)

        async def call(*arguments: Any) -> Any:
            if not self.due():
                return await real(*arguments)
            if self.phase == "generation":
                answer = await real(*arguments)
                if len(answer):
                    asyncio.get_running_loop().call_later(0.1, self.die)
                return answer
            return await self.die_during(real(*arguments))

        setattr(port, method, call)
        return ports

    def due(self) -> bool:
        assert self.driver is not None
        evaluating = self.driver._evaluation is not None
        reached = self.driver.version + (self.phase in ("publishing", "checkpoint"))  # of the version to come
        return reached >= self.version and evaluating == (self.phase == "evaluation")

    async def die_during(self, call: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0.005)
        if not task.done():
            self.die()
        return await task

    def die(self) -> None:
        assert self.driver is not None
        processes = psutil.Process().children(recursive=True)
        facts = {
            "phase": self.phase,
            "version": self.driver.version,
            "rollouts": sum(slot.rollouts for slot in self.driver._generation.slots.values()),
            "doing": self.driver._doing,
            "writing": [path.name for path in self.store.root.glob(".writing-*")],
            "pids": [p.pid for p in processes] + [os.getpid()],
        }
        (self.inputs.run_dir / "death.json").write_text(json.dumps(facts))
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)


def main(path: str, phase: str, version: str) -> None:
    if phase != "none":
        DyingRun.phase, DyingRun.version = phase, int(version)
        launch.Run = DyingRun
    launch.train(load_config(Path(path), []))


if __name__ == "__main__":
    main(*sys.argv[1:])
