"""What the control plane costs: real Ray, driver, ledger, generator and verifier actors; an engine, judges and a
learner that answer at once.

    driver (the measuring process) <-> LedgerActor, with its journal on disk
                                   <-> GeneratorActor over an engine without a model
                                   <-> VerifierActor over judges that do not look

One rollout a prompt. A window is a process of its own: rollouts/s, CPU seconds of each role, seconds from lease to
settlement. ``--before`` alternates with commit 58f3ee2, where every lease travelled alone (needs the git history).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray

from actors.cluster.adapters import RayLedger, RayVerifiers
from actors.cluster.connect import own_ray
from actors.cluster.fleet import RayGenerator
from actors.generator import GeneratorActor
from actors.ledger import LedgerActor
from actors.verifier import VerifierActor
from benchmarks.harness.results_file import RESULTS, spread, write_result
from benchmarks.inprocess.fixed_fleet import FixedFleet
from cures_ray.config import Config
from cures_ray.ledger.prompts import write_prompts
from cures_ray.loop.driver import Driver
from cures_ray.loop.ports import Ports
from cures_ray.messages import (
    Key,
    LeaseChunk,
    Outcome,
    PromptRow,
    RunError,
    Settlement,
    SettleReply,
    StepReport,
    SyncReport,
    TrainingBatch,
    Verdict,
    WeightUpdate,
)
from cures_ray.verify.pool import VerifyItem

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "58f3ee2"  # the last commit whose leases travel alone
WARMUP_STEPS = 5
PROMPTS, TOKENS = 4096, 16  # in the table; of a completion
BARS = {"rollouts_per_s": 3000.0, "control_us_per_rollout": 300.0, "workers_us_per_rollout": 500.0}


class Table:
    """Prompts of eight tokens."""

    def rows(self, index: np.ndarray, *, tokenize: bool = True) -> list[PromptRow]:
        tokens = np.arange(8, dtype=np.int32)
        return [PromptRow(prompt_id=f"{i:016x}", text="q", token_ids=tokens, answer="1") for i in index.tolist()]


class InstantEngine:
    """What GeneratorActor asks of vLLM's AsyncLLM."""

    errored = False

    def __init__(self) -> None:
        ids, logprobs = list(range(TOKENS)), SimpleNamespace(logprobs=[-1.0] * TOKENS)
        one = SimpleNamespace(
            token_ids=ids, logprobs=logprobs, finish_reason="stop", weight_versions=None, text="\\boxed{1}"
        )
        self.output = SimpleNamespace(finished=True, outputs=[one])

    async def generate(self, prompt: Any, sampling: Any, request_id: str, priority: int = 0) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        yield self.output


class InstantGenerator(GeneratorActor):
    """Everything of the actor but the model."""

    async def start(self) -> float:
        from vllm import SamplingParams  # noqa: F401 - imported before the clock runs

        self._engine: Any = InstantEngine()
        self._tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["1"] * len(ids))
        self._max_model_len = 4096
        return 0.0

    async def pid(self) -> int:
        return os.getpid()

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        self.version = update.version
        none = {"canary_max_error": 0.0, "canary_mean_error": 0.0, "seconds_paused": 0.0, "seconds": 0.0}
        return SyncReport(generator=self.name, version=update.version, **none)


class InstantPool:
    """What VerifierActor asks of VerifyPool."""

    def __init__(self) -> None:
        self.verdicts = [
            Verdict(outcome=Outcome.CORRECT, reward=1.0, seconds=1e-4),
            Verdict(outcome=Outcome.INCORRECT, reward=0.0, seconds=1e-4),
        ]
        self.asked = 0

    def prewarm(self) -> None:
        return None

    def verify(self, items: Sequence[VerifyItem]) -> list[Verdict]:
        self.asked += len(items)
        return [self.verdicts[(self.asked + i) % 2] for i in range(len(items))]


class InstantVerifier(VerifierActor):
    def __init__(self, config: Config, prompts: Any) -> None:
        super().__init__(config, prompts)
        self._pool: Any = InstantPool()

    async def pid(self) -> int:
        return os.getpid()


class InstantLearner:
    async def train(self, batch: TrainingBatch) -> StepReport:
        return StepReport(step=batch.step, metrics={"seconds": 0.0})

    async def publish(self, version: int) -> WeightUpdate:
        return WeightUpdate(version=version, info={}, canary_token_ids=(), canary_logprobs=())

    async def save(self, folder: Path) -> None:
        return None

    async def export(self, folder: Path) -> None:
        return None


class TimedLedger(RayLedger):
    """Notes the seconds from the arrival of each lease to the answer to its settlement."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle)
        self.since: dict[Key, float] = {}
        self.latencies: list[float] = []

    async def lease(self, worker: str, max_rollouts: int, version: int) -> LeaseChunk:
        leases = await super().lease(worker, max_rollouts, version)
        self.since.update(dict.fromkeys(leases.keys, time.monotonic()))
        return leases

    async def settle(self, settlement: Settlement) -> SettleReply:
        reply = await super().settle(settlement)
        now = time.monotonic()
        keys = zip(settlement.lease_id.tolist(), settlement.attempt.tolist(), strict=True)
        self.latencies += [now - self.since.pop(key) for key in keys]
        return reply


class Clock:
    """Observer that reads the CPU time of every role after the warm-up and at the end."""

    def __init__(self, pids: dict[str, int], ledger: TimedLedger, last: int) -> None:
        self.processes = {role: psutil.Process(pid) for role, pid in pids.items()}
        self.ledger, self.last = ledger, last
        self.marks: list[tuple[float, dict[str, float]]] = []

    def step(self, step: int, metrics: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        if step in (WARMUP_STEPS, self.last):
            self.marks.append((time.monotonic(), {role: _cpu_seconds(p) for role, p in self.processes.items()}))
            if step == WARMUP_STEPS:
                self.ledger.latencies.clear()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def window(prompts: int, steps: int) -> dict[str, float]:
    """One run of ``steps`` steps of ``prompts`` leases, in a Ray of its own."""
    config = Config.model_validate(
        {
            "curriculum": {"prompts_per_step": prompts, "rollouts_per_step": prompts},
            "trainer": {"steps": steps, "no_progress_timeout_s": 180.0},
            "eval": {"interval": 0},
            "checkpoint": {"interval": 0},
            "rollout": {"max_new_tokens": TOKENS},
            "ray": {"num_cpus": 4},
        }
    )
    with own_ray(config), tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(config, Path(folder)))


async def _run(config: Config, folder: Path) -> dict[str, float]:
    tables, session = {"train": Table()}, uuid.uuid4().hex
    write_prompts(folder, np.random.default_rng(0).integers(0, 2**63, PROMPTS).astype(np.uint64))
    remote: dict[str, Any] = {"num_cpus": 0}
    generators: Any = ray.remote(InstantGenerator).options(max_concurrency=1000, **remote)
    verifiers: Any = ray.remote(InstantVerifier).options(max_concurrency=64, **remote)
    ledgers: Any = ray.remote(LedgerActor).options(**remote)
    ledger = ledgers.remote(str(folder), config, session)
    generator = generators.remote("generator-0", config, "", tables)
    verifier = verifiers.remote(config, tables)
    await generator.start.remote()
    pids = {
        "driver": psutil.Process().pid,
        "ledger": (await ledger.process.remote())["pid"],
        "generator": await generator.pid.remote(),
        "verifier": await verifier.pid.remote(),
    }
    timed = TimedLedger(ledger)
    clock = Clock(pids, timed, config.trainer.steps)
    ports = Ports(
        ledger=timed,
        fleet=FixedFleet([RayGenerator("generator-0", generator, config.rollout)]),
        verifier=RayVerifiers([verifier], config),
        learner=InstantLearner(),
    )
    await Driver(config, ports, clock).run()
    (began, before), (ended, after) = clock.marks
    rollouts = config.curriculum.prompts_per_step * (config.trainer.steps - WARMUP_STEPS)
    used = {role: (after[role] - before[role]) / rollouts * 1e6 for role in pids}
    return {
        "rollouts_per_s": rollouts / (ended - began),
        "control_us_per_rollout": used["driver"] + used["ledger"],
        "workers_us_per_rollout": used["generator"] + used["verifier"],
        **{f"{role}_us_per_rollout": value for role, value in used.items()},
        "settled_p50_s": float(np.quantile(timed.latencies, 0.5)),
        "settled_p99_s": float(np.quantile(timed.latencies, 0.99)),
    }


def old_window(folder: Path) -> list[str]:
    """Command of a window of the commit before chunks, in a work tree of its own.

    Raises:
        RunError: git cannot make the work tree.
    """
    tree = (folder / BEFORE).resolve()
    if not tree.exists():
        add = ["git", "worktree", "add", "--detach", str(tree), BEFORE]
        done = subprocess.run(add, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(add)} failed: {done.stderr.strip()}. --before needs a clone with its history.")
    script = ROOT / "benchmarks" / "research" / f"control_plane_{BEFORE}.py"
    return ["env", "-C", str(tree), f"PYTHONPATH={tree}", sys.executable, str(script)]


def measure(sides: dict[str, list[str]], repeats: int) -> list[dict[str, Any]]:
    """One row a window; the sides alternate."""
    rows = []
    for repeat in range(repeats):
        for side, command in list(sides.items())[:: 1 if repeat % 2 else -1]:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                raise RunError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
            row = {"side": side, "repeat": repeat, **json.loads(done.stdout.strip().splitlines()[-1])}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures bench control-plane", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1024, help="leases a step, one rollout each")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", action="store_true", help="alternate with commit 58f3ee2")
    parser.add_argument("--one", action="store_true", help="a single window, printed as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(window(args.prompts, args.steps)))
        return 0
    options = ["--one", f"--prompts={args.prompts}", f"--steps={args.steps}"]
    sides = {"now": [sys.executable, "-m", "benchmarks.micro.control_plane", *options]}
    if args.before:
        sides["before"] = old_window(Path("runs/bench/control-plane"))
    rows = measure(sides, args.repeats)
    figures = {
        f"{side}_{name}": spread([row[name] for row in rows if row["side"] == side])
        for side in sides
        for name in rows[0]
        if name not in ("side", "repeat")
    }
    path = write_result("control_plane", figures, rows, folder=args.out)
    missed = [name for name, bar in BARS.items() if (figures[f"now_{name}"][1] < bar) == (name == "rollouts_per_s")]
    print(f"{path}: {'missed: ' + ', '.join(missed) if missed else 'all bars met'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
