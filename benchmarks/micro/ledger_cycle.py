"""The draw-allocate-settle cycle of ledger_scale.py: through PromptPool, and as plain NumPy over all prompts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.curriculum.allocation import apportion, sigma_bernoulli
from cures_ray.curriculum.belief import BeliefTable
from cures_ray.curriculum.methods import allocate
from cures_ray.curriculum.pool import PromptPool, rng_for
from cures_ray.curriculum.sampling import TAU_MAX, TAU_MIN
from cures_ray.messages import LeaseChunk, Settlement

M, N = 1024, 8192  # draws and rollouts a step
CLIENTS = 64  # of the actor
TAU, ESS_FRACTION = 0.1, 0.5
MODES = ("fixed", "steered")
Row = dict[str, Any]


def config(mode: str, **curriculum: Any) -> Config:
    own = {"prompts_per_step": M, "rollouts_per_step": N, "snapshot_every": 10**9, **curriculum}
    tau = {"tau": TAU} if mode == "fixed" else {"target_ess_fraction": ESS_FRACTION}
    steps = {"trainer": {"steps": 10**9}, "async_rl": {"max_staleness": 4}}
    return Config.model_validate({"curriculum": own | tau, **steps})


def believe(belief: BeliefTable, seed: int = 0) -> np.ndarray:
    """Give every prompt 0 to 8 outcomes of a true accuracy ~ Beta(0.5, 0.8), which is returned, float32 [N]."""
    rng = np.random.default_rng(seed)
    truth = np.empty(belief.num_prompts, np.float32)
    for i in range(0, len(truth), 2**20):
        rows = slice(i, min(i + 2**20, len(truth)))
        truth[rows] = p = rng.beta(0.5, 0.8, rows.stop - i)
        trials = rng.integers(0, 9, len(p))
        successes = rng.binomial(trials, p)
        age = rng.uniform(0.3, 1.0, len(p))  # discounts have worn the counts: potentials are spread, not a few values
        belief.alpha[rows] += (age * successes).astype(np.float32)
        belief.beta[rows] += (age * (trials - successes)).astype(np.float32)
        belief.visits[rows] += trials > 0
    return truth


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(answer, CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    answer = call()
    return answer, time.process_time() - cpu, time.perf_counter() - wall


# -- cycle ---------------------------------------------------------------------------------------------


class Plain:
    """What one would write with NumPy: everything from the beliefs, over all prompts, at each draw."""

    def __init__(self, belief: BeliefTable, mode: str) -> None:
        self.alpha, self.beta = belief.alpha.copy(), belief.beta.copy()
        self.config, self.mode = config(mode).curriculum, mode
        self.evaluations = 0  # of the ESS, in the last draw

    def draw(self, rng: np.random.Generator) -> Row:
        """Distinct rows, multiplicity, rho, n, tau, ess."""
        p = self.alpha / (self.alpha + self.beta)
        v = np.sqrt(p * (1 - p)).astype(np.float64)
        top, self.evaluations = v.max(), 0
        tau = TAU if self.mode == "fixed" else self._bisect(v - top)
        w = np.exp((v - top) / tau)
        total = np.cumsum(w)
        rows = np.searchsorted(total, rng.random(M) * total[-1], side="right")
        index, multiplicity = np.unique(rows, return_counts=True)
        ess = total[-1] ** 2 / np.square(w).sum()
        n = apportion(
            multiplicity * sigma_bernoulli(p[index].astype(np.float64)), N, self.config.n_min, self.config.n_max
        )
        return {"index": index, "n": n, "rho": w[index] / total[-1], "tau": tau, "ess": float(ess)}

    def _bisect(self, v: np.ndarray) -> float:
        goal, low, high = math.log(ESS_FRACTION * len(v)), math.log(TAU_MIN), math.log(TAU_MAX)
        while True:
            self.evaluations += 1
            middle = 0.5 * (low + high)
            w = np.exp(v / math.exp(middle))
            value = math.log(w.sum() ** 2 / np.square(w).sum()) - goal
            if abs(value) <= 1e-4 or high - low < 1e-12:  # the tolerance of PotentialSampler.solve_tau
                return math.exp(middle)
            low, high = (middle, high) if value < 0 else (low, middle)

    def observe(self, index: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> None:
        d, a, b = self.config.discount, self.config.prior_alpha, self.config.prior_beta
        self.alpha[index] = a + d * (self.alpha[index] - a) + successes
        self.beta[index] = b + d * (self.beta[index] - b) + failures


class Pooled:
    """The same through PromptPool."""

    def __init__(self, pool: PromptPool) -> None:
        self.pool = pool

    def draw(self, rng: np.random.Generator) -> Row:
        draw = self.pool.draw(M, rng)  # applies what ``observe`` left to the sampler
        return {"index": draw.index, "n": allocate(self.pool, draw), "rho": draw.rho, "tau": draw.tau, "ess": draw.ess}

    def observe(self, index: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> None:
        self.pool.belief.observe(index, successes, failures, discount=self.pool.config.curriculum.discount)
        self.pool._touch(index)


def cycle(side: Plain | Pooled, truth: np.ndarray, number: int) -> tuple[Row, float, float]:
    """(draw, CPU seconds, wall seconds) of one cycle; the outcomes are drawn outside the clock."""
    rng = rng_for(1, number)
    drawn, cpu, wall = timed(lambda: side.draw(rng))
    successes = rng.binomial(drawn["n"], truth[drawn["index"]]).astype(np.float64)
    _, more, longer = timed(lambda: side.observe(drawn["index"], successes, drawn["n"] - successes))
    return drawn, cpu + more, wall + longer


def measure_cycles(sizes: list[int], repeats: int, inner: int) -> list[Row]:
    """One row per (repeat, size, mode): the median of ``inner`` cycles through the pool, and one plain cycle."""
    sides: dict[tuple[int, str], tuple[Pooled, Plain, np.ndarray]] = {}
    for size in sizes:
        for mode in MODES:
            pool = PromptPool(config(mode), size)
            truth = believe(pool.belief)
            sides[size, mode] = Pooled(pool), Plain(pool.belief, mode), truth
            _check_equal(sides[size, mode][0], sides[size, mode][1])
    rows, number = [], 0
    for repeat in range(repeats + 1):  # the first warms up
        for (size, mode), (pooled, plain, truth) in sides.items():
            fast = []
            for _ in range(inner):
                number += 1
                fast.append(cycle(pooled, truth, number)[1:])
            _, cpu, wall = cycle(plain, truth, number)
            row: Row = {"section": "cycle", "prompts": size, "tau": mode, "repeat": repeat}
            row |= dict(
                zip(("cycle_cpu_s", "cycle_wall_s"), map(statistics.median, zip(*fast, strict=True)), strict=True)
            )
            row |= {"cycle_cpu_s_slowest": max(f[0] for f in fast), "plain_cpu_s": cpu, "plain_wall_s": wall}
            row |= {"speedup_cpu": cpu / row["cycle_cpu_s"], "speedup_wall": wall / row["cycle_wall_s"]}
            rows.append(row | {"plain_ess_evaluations": plain.evaluations})
    return rows[len(sides) :]


def measure_parts(size: int, repeats: int, inner: int) -> list[Row]:
    """Where a cycle with tau fixed spends its time: CPU seconds of each part, the median of ``inner`` cycles a row."""
    pool = PromptPool(config("fixed"), size)
    truth, rows = believe(pool.belief), []
    for repeat in range(repeats + 1):  # the first warms up
        parts: dict[str, list[float]] = {name: [] for name in ("update_sampler", "draw", "allocate", "observe")}
        for i in range(inner):
            rng = rng_for(2, repeat, i)
            sampler, *update = timed(partial(pool._sampler, rng))
            drawn, *draw = timed(partial(sampler.draw, M, rng, TAU))
            n, *share = timed(partial(allocate, pool, drawn))
            successes = rng.binomial(n, truth[drawn.index]).astype(np.float64)
            _, *observe = timed(partial(Pooled(pool).observe, drawn.index, successes, n - successes))
            for values, seconds in zip(parts.values(), (update, draw, share, observe), strict=True):
                values.append(seconds[0])
        row = {f"{name}_cpu_s": statistics.median(values) for name, values in parts.items()}
        rows.append({"section": "parts", "prompts": size, "tau": "fixed", "repeat": repeat, **row})
    return rows[1:]


def _check_equal(pooled: Pooled, plain: Plain) -> None:
    """Both compute the same law: tau, ESS and, where both drew a prompt, its rho."""
    one, two = pooled.draw(rng_for(0, 0)), plain.draw(rng_for(0, 1))
    _, i, j = np.intersect1d(one["index"], two["index"], return_indices=True)
    for name, a, b in (
        ("tau", one["tau"], two["tau"]),
        ("ess", one["ess"], two["ess"]),
        ("rho", one["rho"][i], two["rho"][j]),
    ):
        if not np.allclose(a, b, rtol=1e-3):
            raise AssertionError(f"pool and plain NumPy disagree on {name}: {a} and {b}")


def settlement(leases: LeaseChunk, rng: np.random.Generator, p: np.ndarray) -> Settlement:
    """Outcomes of all ``leases``; ``p`` [k]: their true accuracies."""
    k, r = len(leases), int(leases.n.sum())
    return Settlement(
        lease_id=leases.lease_id,
        attempt=leases.attempt,
        n=leases.n,
        failed=np.zeros(k, bool),
        generate_seconds=rng.uniform(1, 20, k),
        verify_seconds=rng.uniform(0, 0.1, k),
        rewards=(rng.random(r) < np.repeat(p, leases.n)).astype(np.float32),
        fault=np.zeros(r, bool),
        completion_tokens=rng.integers(100, 2000, r).astype(np.int32),
        min_version=np.zeros(r, np.int32),
    )
