"""Two learner groups on a tiny model, of one rank and of two, started once; batches of unequal groups."""

import asyncio

import numpy as np
import ray
from tiny_model import write_tiny_model

from actors.learner import LearnerGroup
from cures_ray.config import Config
from cures_ray.loop.chunks import pack
from cures_ray.messages import LeaseChunk, Rollout, TrainingBatch, TrainingGroup

CANARY = [np.arange(3, 20), np.arange(30, 12, -1)]
TEMPERATURE = 0.8


class World:
    """Both groups, a model, two batches; ``build`` gives a group new settings without new processes."""

    def __init__(self, folder) -> None:
        self.folder, self.model = folder, write_tiny_model(folder / "model", scale=0.15)
        self.groups = {n: LearnerGroup(self.config(n), [{"num_cpus": 0.5}] * n) for n in (1, 2)}
        self.batches = [make_batch(step) for step in range(2)]

    def config(self, ranks=1, *, algo=None, sigma="last_layer", lora=None, **learner) -> Config:
        return Config.model_validate(
            {
                "model": {"path": str(self.model), "lora": lora},
                "rollout": {"max_new_tokens": 40, "temperature": TEMPERATURE, "health_timeout_s": 30.0},
                "algo": algo or {},
                "curriculum": {"allocation": "sigma", "sigma": sigma},
                "trainer": {"steps": 10, "no_progress_timeout_s": 60.0},
                "learner": {
                    "num_ranks": ranks,
                    "dtype": "float32",
                    "lr": 1e-3,
                    "max_tokens_per_rank": 200,
                    "weight_decay": 0.01,
                    **learner,
                },
            }
        )

    async def start(self) -> None:
        await asyncio.gather(*(g.start(self.folder / "shm", "shm", CANARY) for g in self.groups.values()))

    def build(self, ranks=1, resume=None, **settings) -> LearnerGroup:
        group = self.groups[ranks]
        config = self.config(ranks, **settings)
        asyncio.run(group.build(config, self.folder / f"shm{ranks}", "shm", CANARY, resume))
        return group

    def train(self, group, batches=None):
        return [asyncio.run(group.train(b)) for b in (self.batches if batches is None else batches)]


def one_lease(lease_id: int, n: int) -> LeaseChunk:
    one = np.ones(1, np.int64)
    return LeaseChunk(lease_id=lease_id * one, attempt=0 * one, prompt_index=0 * one, n=n * one, seed=0 * one)


def make_batch(step: int) -> TrainingBatch:
    rng = np.random.default_rng(step)
    groups = []
    for lease_id, n in enumerate([5, 1, 3, 8, 2]):
        lengths, prompt = rng.integers(3, 30, n), int(rng.integers(4, 12))
        rollouts = tuple(
            Rollout(
                token_ids=rng.integers(3, 50, length).astype(np.int32),
                logprobs=(-4 + rng.normal(size=length)).astype(np.float32),
                finish_reason="stop",
                min_version=step,
                max_version=step,
                text="",
            )
            for length in lengths
        )
        tokens = rng.integers(3, 50, prompt).astype(np.int32)
        _, payload = pack(one_lease(lease_id, n), [tokens], [rollouts], "g", [0.0])
        index = np.flatnonzero(np.arange(n) != 1).astype(np.int32)  # rollout 1 of a group was a fault
        k = len(index)
        groups.append(
            TrainingGroup(
                lease_id=lease_id,
                payload=ray.put(payload),
                place=0,
                rollout_index=index,
                rewards=(rng.random(k) < 0.5).astype(np.float32),
                advantages=(np.zeros(k) if lease_id == 2 else rng.normal(size=k)).astype(np.float32),
                weights=np.full(k, 1 / 5 / k / 20, np.float32),
                prompt_tokens=prompt,
                completion_tokens=lengths[index].astype(np.int32),
            )
        )
    return TrainingBatch(step=step, groups=tuple(groups))
