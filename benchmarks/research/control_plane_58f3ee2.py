"""The control plane of commit 58f3ee2, before leases travelled in chunks: `cures bench control-plane --before`.

It imports that commit's modules: run it with ``PYTHONPATH`` at a checkout of it.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import ray

from actors.cluster.adapters import RayGenerator, RayLedger, RayVerifiers
from actors.cluster.launch import own_ray
from actors.generator import GeneratorActor
from actors.ledger import LedgerActor, write_columns
from actors.verifier import VerifierActor
from cures_ray.config import Config
from cures_ray.loop.driver import Driver
from cures_ray.loop.ports import Ports
from cures_ray.messages import Outcome, PromptRow, RunError, StepReport, SyncReport, Verdict, WeightUpdate

WARMUP_STEPS, PROMPTS, TOKENS = 5, 4096, 16


class Table:
    def row(self, index):
        return PromptRow(prompt_id=f"{index:016x}", text="q", token_ids=np.arange(8, dtype=np.int32), answer="1")


class InstantEngine:
    errored = False

    def __init__(self):
        one = SimpleNamespace(
            token_ids=list(range(TOKENS)),
            logprobs=SimpleNamespace(logprobs=[-1.0] * TOKENS),
            finish_reason="stop",
            weight_versions=None,
            text="1",
        )
        self.output = SimpleNamespace(finished=True, outputs=[one])

    async def generate(self, prompt, sampling, request_id, priority=0):
        await asyncio.sleep(0)
        yield self.output


def classes():
    class InstantGenerator(GeneratorActor):
        async def start(self):
            self._engine, self._max_model_len = InstantEngine(), 4096
            self._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "1")
            return 0.0

        async def pid(self):
            return os.getpid()

        async def update_weights(self, update):
            self.version = update.version
            return SyncReport(
                generator=self.name, version=update.version, canary_max_error=0.0, seconds_paused=0.0, seconds=0.0
            )

    class InstantPool:
        def __init__(self):
            self.verdicts = [
                Verdict(outcome=Outcome.CORRECT, reward=1.0, seconds=1e-4),
                Verdict(outcome=Outcome.INCORRECT, reward=0.0, seconds=1e-4),
            ]
            self.asked = 0

        def prewarm(self):
            return None

        def verify(self, items):
            self.asked += len(items)
            return [self.verdicts[(self.asked + i) % 2] for i in range(len(items))]

    class InstantVerifier(VerifierActor):
        def __init__(self, config):
            super().__init__(config)
            self._pool = InstantPool()

        async def pid(self):
            return os.getpid()

    return InstantGenerator, InstantVerifier


class InstantLearner:
    async def train(self, batch):
        return StepReport(step=batch.step, metrics={"seconds": 0.0})

    async def publish(self, version):
        return WeightUpdate(version=version, info={}, canary_token_ids=(), canary_logprobs=())

    async def transmit(self, update):
        return None


class Fleet:
    def __init__(self, members):
        self.members = members

    def generators(self):
        return self.members

    async def replace(self, name, why):
        raise RunError(why)


class TimedLedger(RayLedger):
    def __init__(self, handle):
        super().__init__(handle)
        self.since, self.latencies = {}, []

    async def lease(self, worker, n, version):
        leases = await super().lease(worker, n, version)
        now = time.monotonic()
        for lease in leases:
            self.since[lease.lease_id, lease.attempt] = now
        return leases

    async def settle(self, settlement):
        reply = await super().settle(settlement)
        self.latencies.append(time.monotonic() - self.since.pop((settlement.lease_id, settlement.attempt)))
        return reply


class Clock:
    def __init__(self, pids, ledger, last):
        self.processes = {r: psutil.Process(p) for r, p in pids.items()}
        self.ledger, self.last, self.marks = ledger, last, []

    def step(self, step, metrics, histograms):
        if step in (WARMUP_STEPS, self.last):
            self.marks.append((time.monotonic(), {r: sum(p.cpu_times()[:2]) for r, p in self.processes.items()}))
            if step == WARMUP_STEPS:
                self.ledger.latencies.clear()

    def note(self, text):
        print(text, file=sys.stderr)


async def run(config, folder):
    Generator, Verifier = classes()
    write_columns(folder, np.random.default_rng(0).integers(0, 2**63, PROMPTS).astype(np.uint64))
    o = {"num_cpus": 0}
    ledger = ray.remote(LedgerActor).options(**o).remote(str(folder), config, uuid.uuid4().hex)
    generator = ray.remote(Generator).options(max_concurrency=1000, **o).remote("generator-0", config, "")
    verifier = ray.remote(Verifier).options(max_concurrency=64, **o).remote(config)
    await generator.start.remote()
    pids = {
        "driver": os.getpid(),
        "ledger": (await ledger.ping.remote())["pid"],
        "generator": await generator.pid.remote(),
        "verifier": await verifier.pid.remote(),
    }
    timed = TimedLedger(ledger)
    clock = Clock(pids, timed, config.trainer.steps)
    ports = Ports(
        ledger=timed,
        fleet=Fleet([RayGenerator("generator-0", generator, 600.0)]),
        verifier=RayVerifiers([verifier], 600.0),
        learner=InstantLearner(),
    )
    await Driver(config, Table(), ports, clock).run()
    (t0, a), (t1, b) = clock.marks
    rollouts = config.curriculum.prompts_per_step * (config.trainer.steps - WARMUP_STEPS)
    used = {r: (b[r] - a[r]) / rollouts * 1e6 for r in pids}
    return {
        "rollouts_per_s": rollouts / (t1 - t0),
        "control_us_per_rollout": used["driver"] + used["ledger"],
        "workers_us_per_rollout": used["generator"] + used["verifier"],
        **{f"{r}_us_per_rollout": v for r, v in used.items()},
        "settled_p50_s": float(np.quantile(timed.latencies, 0.5)),
        "settled_p99_s": float(np.quantile(timed.latencies, 0.99)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    config = Config.model_validate(
        {
            "curriculum": {"prompts_per_step": args.prompts, "rollouts_per_step": args.prompts, "n_min": 1},
            "trainer": {"steps": args.steps, "no_progress_timeout_s": 60.0},
            "eval": {"interval": 0},
            "checkpoint": {"interval": 0},
            "rollout": {"max_new_tokens": TOKENS},
            "ray": {"num_cpus": 4},
        }
    )
    with own_ray(config), tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(run(config, Path(folder)))))
