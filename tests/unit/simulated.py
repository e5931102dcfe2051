"""A curriculum and prompts of known accuracy, without workers: lease, settle, plan, commit by hand."""

from __future__ import annotations

import numpy as np
from fakes import small_config

from cures_ray.config import Config
from cures_ray.curriculum.machine import Curriculum
from cures_ray.messages import Accounting, BatchPlan, CommitReport, Lease, Settlement


def settlement(lease: Lease, rewards, *, fault=None, version: int | None = None, tokens: int = 3) -> Settlement:
    """A chunk of one lease. ``version`` of all its rollouts; None: that of the step it was planned for."""
    n = len(rewards)
    return Settlement(
        lease_id=np.array([lease.lease_id]),
        attempt=np.array([lease.attempt]),
        n=np.array([n]),
        failed=np.zeros(1, bool),
        rewards=np.asarray(rewards, np.float32),
        fault=np.zeros(n, bool) if fault is None else np.asarray(fault, bool),
        completion_tokens=np.full(n, tokens, np.int32),
        min_version=np.full(n, lease.batch if version is None else version, np.int32),
        generate_seconds=np.array([0.01]),
        verify_seconds=np.array([0.001]),
    )


class Run:
    """``accuracy`` [N] of the prompts; m = 8, N = 32, synchronous unless ``staleness``; the rest overrides the
    curriculum section."""

    def __init__(
        self, accuracy, *, levels=None, features=None, staleness: int = 0, steps: int = 100, algo=None, **curriculum
    ) -> None:
        self.accuracy = np.asarray(accuracy, float)
        self.config: Config = small_config(
            curriculum=curriculum,
            async_rl={"max_staleness": staleness},
            trainer={"steps": steps},
            algo=algo or {},
        )
        self.ids = np.arange(1, len(self.accuracy) + 1, dtype=np.uint64)
        self.columns = (levels, features)
        self.curriculum = Curriculum(self.config, self.ids, levels, features)
        self.leased: list[Lease] = []  # all that was handed out by ``step``

    @property
    def accounting(self) -> Accounting:
        return self.curriculum.accounting

    def rewards(self, lease: Lease) -> np.ndarray:
        """Follow from the lease's seed and attempt, as a real rollout's would."""
        rng = np.random.default_rng([lease.seed, lease.attempt])
        return (rng.random(lease.n) < self.accuracy[lease.prompt_index]).astype(np.float32)

    def settle(self, lease: Lease, **options) -> bool:
        accepted = self.curriculum.settle(settlement(lease, self.rewards(lease), **options)).accepted
        self.curriculum.accounting.check()
        return bool(accepted[0])

    def generate(self) -> BatchPlan:
        """Lease and settle until the next batch is finished; its plan."""
        number = self.curriculum.committed
        while (plan := self.curriculum.plan(number)) is None:
            leases = self.curriculum.lease("worker", 10**6, number)
            assert leases, "the curriculum stalls"
            self.leased += leases
            for lease in leases:
                assert self.settle(lease)
        return plan

    def step(self, gradient_statistics=()) -> BatchPlan:
        """One optimizer step: everything that the plan keeps is trained."""
        plan = self.generate()
        trained = {e.lease.lease_id: int(e.keep.sum()) for e in plan.entries}
        self.curriculum.commit(
            CommitReport(
                batch=plan.batch, trained=trained, discarded={}, gradient_statistics=tuple(gradient_statistics)
            )
        )
        return plan


def rollouts(plan: BatchPlan) -> int:
    return sum(e.lease.n for e in plan.entries)


def by_prompt(plan: BatchPlan) -> dict[int, int]:
    """prompt -> rollouts."""
    found: dict[int, int] = {}
    for e in plan.entries:
        found[e.lease.prompt_index] = found.get(e.lease.prompt_index, 0) + e.lease.n
    return found
