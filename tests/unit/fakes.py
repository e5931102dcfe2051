"""Workers that play the driver's ports in one process: a simulated model whose accuracies are known."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from pathlib import Path

import numpy as np

from cures_ray.config import Config
from cures_ray.config_load import merged
from cures_ray.curriculum.machine import Curriculum
from cures_ray.loop.chunks import pack, picked
from cures_ray.loop.driver import Driver, Ports
from cures_ray.loop.ports import CanaryFailed, Survey, WorkerLost
from cures_ray.messages import (
    ChunkSummary,
    LeaseChunk,
    Outcome,
    PromptRow,
    Rollout,
    RolloutChunk,
    StepReport,
    SyncReport,
    TrainingBatch,
    Verdict,
    VerdictChunk,
    WeightUpdate,
)


def small_config(**sections: dict) -> Config:
    """CurES with RLOO: m = 8 prompts, N = 32 rollouts, 6 steps, staleness 1; ``sections`` override."""
    base = {
        "curriculum": {
            "prompts_per_step": 8,
            "rollouts_per_step": 32,
            "n_min": 2,
            "n_max": 16,
            "allocation": "sigma",
            "prior_from": "constant",
            "prior_scope": "unseen",
            "prior_strength": 2.0,
            "discount": 0.95,
        },
        "algo": {"advantage": "rloo"},
        "async_rl": {"max_staleness": 1},
        "trainer": {"steps": 6, "no_progress_timeout_s": 20.0},
        "eval": {"interval": 0},
        "checkpoint": {"interval": 0},
        "rollout": {"max_new_tokens": 16, "health_timeout_s": 0.2},
        "verifier": {"max_fault_share": 1.0},
    }
    return Config.model_validate(merged(base, sections))


class Prompts:
    """``count`` prompts whose accuracies run from 0 to 1."""

    def __init__(self, count: int = 64) -> None:
        self.accuracy = np.linspace(0.0, 1.0, count)
        self.ids = np.arange(1, count + 1, dtype=np.uint64)
        self.levels = (np.arange(count) % 4).astype(np.float64)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index, *, tokenize: bool = True) -> list[PromptRow]:
        return [self.row(int(i)) for i in index]

    def row(self, index: int) -> PromptRow:
        tokens = np.array([1, 2, 3], dtype=np.int32)
        return PromptRow(
            prompt_id=f"{index + 1:016x}", text="q", token_ids=tokens, answer="right", row={"index": index}
        )


class LocalLedger:
    """LedgerPort over the real state machine, in this process."""

    def __init__(self, config: Config, prompts: Prompts) -> None:
        self.curriculum = Curriculum(config, prompts.ids, prompts.levels, None)

    async def lease(self, worker, max_rollouts, version):
        return LeaseChunk.of(self.curriculum.lease(worker, max_rollouts, version))

    async def settle(self, settlement):
        return self.curriculum.settle(settlement)

    async def give_back(self, keys, reason):
        self.curriculum.give_back(keys, reason)

    async def plan(self, batch):
        return self.curriculum.plan(batch)

    async def commit(self, report):
        return self.curriculum.commit(report)

    async def status(self):
        return self.curriculum.status()

    async def save(self, folder: Path) -> None:
        self.curriculum.save(folder)


class FakeGenerator:
    """Answers right with the prompt's accuracy. ``die_after``: leases until it is lost for good;
    ``canary_error``: what its canary measures; ``hang``: never answers; ``time_out``: every fifth lease misses its
    deadline; ``sync_seconds``: how long it takes to load weights; ``forget``: so many leases never come out."""

    def __init__(self, name: str, prompts: Prompts, *, seconds: float = 0.001) -> None:
        self.name, self.prompts, self.seconds = name, prompts, seconds
        self.version = -1
        self.die_after: int | None = None
        self.canary_error, self.canary_repeats = 0.0, False
        self.hang, self.time_out, self.sync_seconds, self.forget = False, False, 0.0, 0
        self.active, self.most_active = 0, 0  # leases
        self.leased: list[tuple[int, int, int]] = []  # (lease, attempt, version held when it came)
        self._done: list[tuple[LeaseChunk, int, list[Rollout]]] = []
        self._finished = asyncio.Event()
        self._lost = False
        self._tasks: set[asyncio.Task[None]] = set()

    def _check(self) -> None:
        if self._lost:
            raise WorkerLost(f"{self.name} was killed")

    async def submit(self, leases: LeaseChunk) -> None:
        self._check()
        for i, key in enumerate(leases.keys):
            if self.die_after is not None:
                self.die_after -= 1
                if self.die_after < 0:
                    self._lost = True
                    self._finished.set()
                    self._check()
            self.leased.append((*key, self.version))
            task = asyncio.create_task(self._work(leases, i))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, leases: LeaseChunk, i: int) -> None:
        rollouts = await self._rollouts(leases, i)
        if self.forget:
            self.forget -= 1
            return
        self._done.append((leases, i, rollouts))
        self._finished.set()

    async def _rollouts(self, leases: LeaseChunk, i: int) -> list[Rollout]:
        began = self.version
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        await asyncio.sleep(3600 if self.hang else self.seconds)
        self.active -= 1
        n, rng = int(leases.n[i]), np.random.default_rng(int(leases.seed[i]))
        right = rng.random(n) < (self.prompts.accuracy[leases.prompt_index[i]] if not leases.greedy else 0.5)
        return [
            Rollout(
                token_ids=np.array([4, 5, 6], np.int32),
                logprobs=np.full(3, -1.0, np.float32),
                finish_reason="stop",
                min_version=began,
                max_version=self.version,
                text="right" if ok else "wrong",
            )
            for ok in right
        ]

    async def collect(self) -> tuple[ChunkSummary, RolloutChunk]:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self._finished.wait()
        self._check()
        if not self._done:
            return self._pack(LeaseChunk.of([]), [])
        done, self._done = self._done, []
        self._finished.clear()
        return self._pack(picked([d[:2] for d in done]), [rollouts for *_, rollouts in done])

    async def generate(self, leases: LeaseChunk) -> tuple[ChunkSummary, RolloutChunk]:
        if self.die_after is not None and self.die_after < len(leases):
            self._lost = True
        self._check()
        return self._pack(leases, [await self._rollouts(leases, i) for i in range(len(leases))])

    def _pack(self, leases: LeaseChunk, rollouts: list[list[Rollout]]) -> tuple[ChunkSummary, RolloutChunk]:
        prompts = [self.prompts.row(int(i)).token_ids for i in leases.prompt_index]
        failed = self.time_out & (leases.lease_id % 5 == 0)
        return pack(leases, prompts, rollouts, self.name, [self.seconds] * len(leases), failed)

    async def update_weights(self, update: WeightUpdate) -> SyncReport:
        self._check()
        await asyncio.sleep(self.sync_seconds)
        if self.canary_error > 1e-3:
            raise CanaryFailed(self.name, update.version, f"mean {self.canary_error}", self.canary_repeats)
        self.version = update.version
        return SyncReport(
            generator=self.name, version=update.version, canary_max_error=0.0, seconds_paused=0.0, seconds=0.0
        )


class FakeFleet:
    def __init__(self, prompts: Prompts, count: int = 1, seconds: float = 0.001) -> None:
        self.prompts, self.seconds = prompts, seconds
        self.members = {f"g{i}": FakeGenerator(f"g{i}", prompts, seconds=seconds) for i in range(count)}
        self.replaced: list[str] = []
        self.replace_seconds = 0.01
        self.replacement_canary_error = 0.0
        self.leaving: dict[str, float] = {}  # drained
        self.room = 0  # for so many more
        self.dismissed: list[str] = []
        self._numbers = itertools.count(count)

    def generators(self) -> list[FakeGenerator]:
        return list(self.members.values())

    async def replace(self, name: str, why: str) -> FakeGenerator:
        self.replaced.append(why)
        await asyncio.sleep(self.replace_seconds)
        self.members[name] = FakeGenerator(name, self.prompts, seconds=self.seconds)
        self.members[name].canary_error = self.replacement_canary_error
        return self.members[name]

    async def survey(self) -> Survey:
        return Survey(leaving={n: left for n, left in self.leaving.items() if n in self.members}, room=self.room > 0)

    async def join(self) -> FakeGenerator | None:
        self.room -= 1
        name = f"g{next(self._numbers)}"
        await asyncio.sleep(self.replace_seconds)
        self.members[name] = FakeGenerator(name, self.prompts, seconds=self.seconds)
        return self.members[name]

    async def dismiss(self, name: str, *, for_good: bool = False) -> None:
        self.dismissed.append(name)
        self.members.pop(name)._lost = True


class FakeVerifier:
    """``fault_every``: each such item ends as a fault; ``die``: that many calls end with the verifier's death."""

    def __init__(self, fault_every: int = 0) -> None:
        self.fault_every, self.seen, self.die, self.calls = fault_every, 0, 0, 0

    async def verify(self, payload: RolloutChunk, rollouts: int) -> VerdictChunk:
        await asyncio.sleep(0)
        assert len(payload) == rollouts
        self.calls += 1
        if self.die:
            self.die -= 1
            raise WorkerLost("verifier-0: ActorDiedError")
        return VerdictChunk.of([self._verdict(text == "right") for text in payload.texts])

    def _verdict(self, right: bool) -> Verdict:
        self.seen += 1
        if self.fault_every and self.seen % self.fault_every == 0:
            return Verdict(outcome=Outcome.FAULT, detail="timeout: 5 s")
        return Verdict(outcome=Outcome.CORRECT if right else Outcome.INCORRECT, reward=float(right))


class FakeLearner:
    """Keeps the batches it was given; looks at ``fleet`` while it trains."""

    def __init__(self, fleet: FakeFleet, seconds: float = 0.0) -> None:
        self.fleet, self.seconds = fleet, seconds
        self.batches: list[TrainingBatch] = []
        self.active_while_training: list[int] = []
        self.together, self.kept = False, True

    async def train(self, batch: TrainingBatch) -> StepReport:
        self.batches.append(batch)
        await asyncio.sleep(self.seconds)
        self.active_while_training.append(sum(g.active for g in self.fleet.generators()))
        nonzero = sum(int((g.advantages != 0).sum()) for g in batch.groups)
        return StepReport(step=batch.step, metrics={"loss": 0.0, "computed_share": nonzero / max(batch.rollouts, 1)})

    async def publish(self, version: int) -> WeightUpdate:
        return WeightUpdate(
            version=version, info={}, canary_token_ids=(), canary_logprobs=(), together=self.together, kept=self.kept
        )

    async def save(self, folder: Path) -> None:
        (folder / "steps").write_text(str(len(self.batches)))

    async def export(self, folder: Path) -> None:
        folder.mkdir(parents=True)


class Recorder:
    """Observer that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []

    def step(self, step, metrics, histograms) -> None:
        self.steps.append((step, metrics))

    def note(self, text: str) -> None:
        self.notes.append(text)


class World:
    """A complete fake run: ``await world.driver.run()``."""

    def __init__(
        self, config: Config, *, generators: int = 1, seconds: float = 0.001, learn_seconds: float = 0.0, **driver
    ) -> None:
        self.config, self.prompts = config, Prompts()
        self.ledger = LocalLedger(config, self.prompts)
        self.fleet = FakeFleet(self.prompts, generators, seconds)
        self.verifier, self.learner, self.observer = FakeVerifier(), FakeLearner(self.fleet, learn_seconds), Recorder()
        ports = Ports(ledger=self.ledger, fleet=self.fleet, verifier=self.verifier, learner=self.learner)
        self.driver = Driver(config, ports, self.observer, **driver)
