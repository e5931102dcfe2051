"""The prompt pool: what the ledger believes of every prompt, and draws from it.

Holds the Beta beliefs, the priors that generalise to unseen prompts (level, predictor) and the samplers over
them. Evidence is *observed* as soon as a lease settles; priors *learn* at commit, in plan order, and sampler
updates wait until the next draw, in index order. So the draw of a batch depends on which settlements came
before it and not on their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cures_ray.belief import BeliefTable
from cures_ray.config import Config
from cures_ray.messages import GradientStatistics
from cures_ray.predictor import DifficultyPredictor, LevelPrior
from cures_ray.sampling import Draw, EpochSampler, PotentialSampler, UniformSampler, potential

SAMPLE = 10_000  # prompts that metrics and histograms look at


SUBSETS = 1 << 40  # random stream of the partition into subsets; batches have small numbers


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random stream of (seed, key): the same wherever and whenever it is made."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


class PromptPool:
    """N prompts. ``levels``: any hashable per prompt; ``features`` float32 [N, d] for the predictor."""

    def __init__(
        self, config: Config, count: int, levels: np.ndarray | None = None, features: np.ndarray | None = None
    ) -> None:
        c = config.curriculum
        self.config, self.count = config, count
        self.belief = BeliefTable(count, c.prior_alpha, c.prior_beta, track_gradients=c.sigma == "last_layer")
        self.level = LevelPrior(levels, count) if c.prior_from == "level" else None
        self.predictor = DifficultyPredictor(features, levels, count) if c.prior_from == "predictor" else None
        self.subset = -1  # number of the subset in play; -1: all prompts
        self._members: np.ndarray | None = None  # global indices of the subset, sorted
        self._samplers: dict[str, PotentialSampler] = {}
        self._dirty: list[np.ndarray] = []
        self._commits_since_refresh = 0
        self.epochs = EpochSampler(count, config.trainer.seed) if c.draw == "epoch" else None
        cost_aware = c.allocation == "cost_aware"
        self.cost = np.full(count, np.nan, np.float32) if cost_aware else None  # tokens a rollout; NaN: not seen
        self._speed = np.zeros(2)  # tokens generated, seconds of generation

    # -- evidence --------------------------------------------------------------------------------

    def observe(self, index: int, rewards: np.ndarray, evidence: np.ndarray) -> None:
        """Count the verified rollouts of one lease. ``rewards`` in [0, 1] [n]; ``evidence`` [n]: their weights."""
        if len(rewards) == 0:
            return
        c = self.config.curriculum
        where = np.array([index])
        discount = c.discount if c.belief == "discount" else 1.0
        successes, total = float(evidence @ rewards.astype(np.float64)), float(evidence.sum())
        self.belief.observe(where, [successes], [max(total - successes, 0.0)], discount=discount)
        self._dirty.append(where)

    def observe_gradients(self, index: list[int], statistics: list[GradientStatistics]) -> None:
        """Cache the score moments of leases; nothing unless ``sigma: last_layer``."""
        if index and self.belief.gradients is not None:
            self.belief.observe_gradients(index, statistics)

    def observe_cost(self, index: int, n: int, tokens: int, generate_s: float, verify_s: float) -> None:
        """Moving cost of a rollout in tokens; verifier seconds count at the generators' mean speed."""
        if self.cost is None:
            return
        self._speed += (tokens, generate_s)
        rate = self._speed[0] / self._speed[1] if self._speed[1] > 0 else 0.0
        new, old = (tokens + verify_s * rate) / n, self.cost[index]
        self.cost[index] = new if np.isnan(old) else 0.5 * (old + new)

    def costs(self, index: np.ndarray) -> np.ndarray:
        """Cost of a rollout in tokens, float64 [k]; NaN where not seen yet."""
        return np.ones(len(index)) if self.cost is None else self.cost[index].astype(np.float64)

    def learn(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> dict[str, float]:
        """At commit: the raw counts of one batch, in plan order, to the priors. Returns calibration metrics,
        measured before the update."""
        metrics: dict[str, float] = {}
        if self.level is not None:
            self.level.update(index, successes, trials)
        if self.predictor is not None:
            metrics = self.predictor.update(index, successes, trials)
        if self.level is not None or self.predictor is not None:
            self._commits_since_refresh += 1
            # at most about 32 m prompts of work a commit, however many there are
            if self._commits_since_refresh * self.config.curriculum.prompts_per_step * 32 >= self.count:
                self._refresh_priors()
        return metrics

    def _refresh_priors(self) -> None:
        """Prior of every unseen prompt from the pooled means: alpha0 + beta0 = prior_strength."""
        self._commits_since_refresh = 0
        unseen = np.flatnonzero(self.belief.visits == 0)
        prior = self.level or self.predictor
        if len(unseen) == 0 or prior is None or not prior.ready:
            return
        mean = np.clip(prior.mean(unseen), 0.01, 0.99)
        strength = self.config.curriculum.prior_strength
        self.belief.set_prior(unseen, strength * mean, strength * (1.0 - mean))
        self._dirty.append(unseen)

    # -- reading ---------------------------------------------------------------------------------

    def sample_index(self) -> np.ndarray:
        """At most SAMPLE prompts, evenly spread: always the same."""
        return np.arange(0, self.count, max(1, -(-self.count // SAMPLE)))

    @property
    def members(self) -> np.ndarray:
        """Global indices that may be drawn."""
        return np.arange(self.count) if self._members is None else self._members

    @property
    def size(self) -> int:
        """How many prompts may be drawn: |D|."""
        return self.count if self._members is None else len(self._members)

    # -- subsets (Algorithm 1) -------------------------------------------------------------------

    def enter_subset(self, number: int) -> None:
        """Draw only from subset ``number`` mod T from now on; its beliefs start from the prior."""
        total = min(self.config.curriculum.subsets, self.count)
        self.subset = number
        self._select(number % total, total)
        self.belief.reset(self.members)
        self._samplers.clear()
        self._dirty.clear()

    def _select(self, part: int, total: int) -> None:
        self._members = None
        if total > 1:
            order = generator(self.config.trainer.seed, SUBSETS).permutation(self.count)
            self._members = np.sort(np.array_split(order, total)[part])
        if self.epochs is not None:
            self.epochs = EpochSampler(self.size, self.config.trainer.seed)

    # -- draws -----------------------------------------------------------------------------------

    def draw(self, m: int, rng: np.random.Generator) -> Draw:
        """m i.i.d. draws with replacement from rho* = softmax(sqrt(p(1-p)) / tau) (eq. 14), duplicates merged;
        tau fixed or steered to the target ESS."""
        c = self.config.curriculum
        sampler = self._sampler(rng)
        tau = c.tau if c.tau is not None else sampler.solve_tau(c.target_ess_fraction)
        return self._global(sampler.draw(m, rng, tau))

    def draw_uniform(self, m: int, rng: np.random.Generator) -> Draw:
        """m uniform draws: i.i.d. with replacement, or in epochs (every prompt once, then reshuffled)."""
        if self.epochs is not None:
            return self._global(self.epochs.draw(m))
        return self._global(UniformSampler(self.size).draw(m, rng))

    def _global(self, draw: Draw) -> Draw:
        return draw if self._members is None else replace(draw, index=self._members[draw.index])

    def _sampler(self, rng: np.random.Generator) -> PotentialSampler:
        """The sampler with every pending change applied, in index order."""
        members = self.members
        if self.config.curriculum.belief_draw == "thompson":  # a fresh accuracy for each prompt: O(N) a draw
            return PotentialSampler(potential(self.belief.sample(rng, members)))
        if "mean" not in self._samplers:
            self._dirty.clear()
            self._samplers["mean"] = PotentialSampler(potential(self.belief.mean(members)))
        elif self._dirty:
            changed = np.unique(np.concatenate(self._dirty))
            self._dirty.clear()
            local = changed
            if self._members is not None:
                local = np.searchsorted(members, changed)
                inside = members[np.minimum(local, len(members) - 1)] == changed
                local, changed = local[inside], changed[inside]
            if len(changed):
                self._samplers["mean"].update(local, potential(self.belief.mean(changed)))
        return self._samplers["mean"]

    # -- persistence -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of numbers, strings and arrays: enough to continue exactly."""
        state: dict[str, Any] = {
            "belief": self.belief.state_dict(),
            "subset": self.subset,
            "commits_since_refresh": self._commits_since_refresh,
            "dirty": np.unique(np.concatenate(self._dirty)) if self._dirty else np.zeros(0, np.int64),
        }
        if self.epochs is not None:
            state["epochs"] = self.epochs.state_dict()
        if self.cost is not None:
            state["cost"], state["speed"] = self.cost, self._speed
        if "mean" in self._samplers:
            state["sampler"] = self._samplers["mean"].state_dict()
        if self.level is not None:
            state["level"] = self.level.state_dict()
        if self.predictor is not None:
            state["predictor"] = self.predictor.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.belief.load_state_dict(state["belief"])
        self.subset = int(state["subset"])
        self._commits_since_refresh = int(state["commits_since_refresh"])
        total = min(self.config.curriculum.subsets, self.count)
        if self.subset >= 0:
            self._select(self.subset % total, total)
        if self.epochs is not None:
            self.epochs.load_state_dict(state["epochs"])
        if self.cost is not None:
            self.cost, self._speed = np.array(state["cost"]), np.array(state["speed"])
        self._samplers.clear()
        if "sampler" in state:
            self._samplers["mean"] = PotentialSampler(np.zeros(self.size))
            self._samplers["mean"].load_state_dict(state["sampler"])
        self._dirty = [np.asarray(state["dirty"], np.int64)] if len(state["dirty"]) else []
        if self.level is not None:
            self.level.load_state_dict(state["level"])
        if self.predictor is not None:
            self.predictor.load_state_dict(state["predictor"])

