"""The prompt pool: what the ledger believes of every prompt, and draws from it.

Holds the Beta beliefs, the experts whose priors generalise to unseen prompts (experts.py) and the samplers over
them. Evidence waits until a draw or a commit reads the beliefs and is then counted in lease order (a discount
makes the order matter); priors *learn* at commit, in plan order; sampler updates wait until the next draw, in
index order. So the draw of a batch depends on which settlements came before it and not on their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cures_ray.config import Config, CuresCurriculum, GresoCurriculum, SpoCurriculum
from cures_ray.curriculum.belief import BeliefTable
from cures_ray.curriculum.experts import ExpertMixture
from cures_ray.curriculum.sampling import Draw, EpochSampler, PotentialSampler, UniformSampler, potential
from cures_ray.curriculum.streaks import Streaks
from cures_ray.messages import GradientStatistics

BUILD_ANEW = 2**20  # changed potentials
Kind = TypeVar("Kind")  # of a curriculum section
SAMPLE = 10_000  # prompts that metrics and histograms look at


SUBSETS = 1 << 40  # random stream of the partition into subsets; batches have small numbers


def rng_for(seed: int, *key: int) -> np.random.Generator:
    """The random stream of (seed, key): the same wherever and whenever it is made."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


class PromptPool:
    """N prompts. ``levels``: any hashable per prompt; ``features`` float32 [N, d] for the predictor."""

    def __init__(
        self, config: Config, count: int, levels: np.ndarray | None = None, features: np.ndarray | None = None
    ) -> None:
        c = config.curriculum
        self.config, self.count = config, count
        self._belief = BeliefTable(count, c.prior_alpha, c.prior_beta, track_gradients=c.measures_gradients)
        # observed and not counted yet: (batch, lease, attempt, prompt, successes, failures)
        self._pending: list[tuple[int, int, int, int, float, float]] = []
        self.mixture = ExpertMixture(c.prior_from, count, levels, features, c.prior_strength)
        self.subset = -1  # number of the subset in play; -1: all prompts
        self._members: np.ndarray | None = None  # global indices of the subset, sorted
        self._samplers: dict[str, PotentialSampler] = {}
        self._dirty: list[np.ndarray] = []
        self._commits_since_refresh = 0
        self.epochs = EpochSampler(count, config.trainer.seed) if c.in_epochs else None
        self.cost = np.full(count, np.nan, np.float32) if c.measures_cost else None  # tokens a rollout; NaN: not seen
        self._speed = np.zeros(2)  # tokens generated, seconds of generation
        self.streaks: Streaks | None = None
        if isinstance(c, GresoCurriculum):
            self.streaks = Streaks(count, (c.greso_target_easy, c.greso_target_hard), c.greso_step)
        self.drift: np.ndarray | None = None  # nats a token since the prompt's last response; NaN: not measured
        if isinstance(c, SpoCurriculum):
            self.drift = np.full(count, np.nan, np.float32)
            self._belief.forget_prior()

    def settings(self, kind: type[Kind]) -> Kind:
        """The curriculum section, which must be that of the method that asks.

        Raises:
            TypeError: it is another method's.
        """
        section = self.config.curriculum
        if not isinstance(section, kind):
            raise TypeError(f"curriculum.method = {section.method} has no {kind.__name__}")
        return section

    # -- evidence --------------------------------------------------------------------------------

    @property
    def belief(self) -> BeliefTable:
        """The beliefs, with all evidence counted. Only calls that change the curriculum may read them here: when
        evidence is counted is part of its state."""
        if self._pending:
            c = self.config.curriculum
            *_, index, successes, failures = zip(*sorted(self._pending), strict=True)
            self._pending.clear()
            rows = np.array(index, np.int64)
            discount: np.ndarray | float = c.discount if c.belief == "discount" else 1.0
            if c.belief == "drift":
                discount = self._forgetting(rows)
            self.mixture.score(self._belief, rows, np.array(successes), np.array(failures))
            self._belief.observe(rows, successes, failures, discount=discount)
            self._touch(rows)
        return self._belief

    def observe(self, key: tuple[int, int, int], index: int, rewards: np.ndarray, lag: np.ndarray) -> None:
        """Note the verified rollouts of one lease. ``key`` = (batch, lease, attempt); ``rewards`` in [0, 1] [n];
        ``lag`` [n]: policy versions that they are behind, worth lambda^lag under a discount (ALGORITHMS.md 4)."""
        if len(rewards):
            c = self.config.curriculum
            evidence = c.discount**lag if c.belief == "discount" else np.ones(len(lag))
            successes, total = float(evidence @ rewards.astype(np.float64)), float(evidence.sum())
            self._pending.append((*key, index, successes, max(total - successes, 0.0)))

    def note_drift(self, drift: dict[int, float]) -> None:
        """How far the policy had moved on the last responses of prompts, nats a token, for evidence that is not counted
        yet."""
        if self.drift is not None and drift:
            self.drift[list(drift)] = list(drift.values())

    def _forgetting(self, rows: np.ndarray) -> np.ndarray:
        """SPO's rho = 2^(-D / D_half) within its bounds, float64 [k]; where D is not known ``discount``, and 1 for the
        first evidence."""
        c = self.settings(SpoCurriculum)
        assert self.drift is not None
        drift = self.drift[rows].astype(np.float64)
        self.drift[rows] = np.nan  # it is about these rewards; the next ones have their own
        rho = np.clip(np.exp2(-drift / c.drift_half_life), c.rho_min, c.rho_max)
        return np.where(np.isnan(drift), np.where(self._belief.visits[rows] == 0, 1.0, c.discount), rho)

    def _touch(self, rows: np.ndarray) -> None:
        if self._samplers:  # one that is built later reads every belief anyway
            self._dirty.append(rows)

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

    def learn(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        """At commit: the raw counts of one batch, in plan order, to the experts."""
        _ = self.belief  # its evidence is forecast before the experts learn from it
        self.mixture.update(index, successes, trials)
        if self.streaks is not None:
            self.streaks.observe(index, successes, trials)
        if self.mixture.ready:
            self._commits_since_refresh += 1
            # at most about 32 m prompts of work a commit, however many there are
            if self._commits_since_refresh * self.config.curriculum.prompts_per_step * 32 >= self.count:
                self._commits_since_refresh = 0
                self._set_priors(np.arange(self.count))

    def freshen(self, rows: np.ndarray) -> None:
        """Give ``rows`` [k] the newest prior when the whole pool is too large to follow at every commit."""
        if self._commits_since_refresh:
            self._set_priors(np.unique(rows))

    def _set_priors(self, rows: np.ndarray) -> None:
        """The experts' prior for those of ``rows`` that have no evidence (``prior_scope: all``: for every one; what a
        prompt has shown itself is kept)."""
        if self.config.curriculum.prior_scope != "all":
            rows = rows[self.belief.visits[rows] == 0]
        if len(rows):
            self.belief.set_prior(rows, *self.mixture.prior(rows))
            self._touch(rows)

    # -- reading ---------------------------------------------------------------------------------

    def sampled_accuracy(self) -> np.ndarray:
        """Accuracy of at most SAMPLE prompts that may be drawn, evenly spread, as of the last draw or commit."""
        every = max(1, -(-self.size // SAMPLE))
        return self._belief.mean(np.arange(0, self.count, every) if self._members is None else self._members[::every])

    def metrics(self) -> dict[str, float]:
        """Figures of ``sampled_accuracy``. Collapsed: hardly a prompt is left from which anything can be learned."""
        p = self.sampled_accuracy()
        extreme = float(((p < 0.05) | (p > 0.95)).mean())
        return {
            "belief_mean": float(p.mean()),
            "belief_std": float(p.std()),
            "belief_extreme": extreme,
            "collapsed": float(extreme > 0.95),
            **self.mixture.metrics(),
        }

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
        total = min(self.settings(CuresCurriculum).subsets, self.count)
        self.subset = number
        self._select(number % total, total)
        self.belief.reset(self.members)
        self._samplers.clear()
        self._dirty.clear()

    def _select(self, part: int, total: int) -> None:
        self._members = None
        if total > 1:
            order = rng_for(self.config.trainer.seed, SUBSETS).permutation(self.count)
            self._members = np.sort(np.array_split(order, total)[part])
        if self.epochs is not None:
            self.epochs = EpochSampler(self.size, self.config.trainer.seed)

    # -- draws -----------------------------------------------------------------------------------

    def draw(self, m: int, rng: np.random.Generator) -> Draw:
        """m i.i.d. draws with replacement from rho* = softmax(sqrt(p(1-p)) / tau) (eq. 14), duplicates merged;
        tau fixed or steered to the target ESS."""
        c = self.settings(CuresCurriculum)
        sampler = self._sampler(rng)
        tau = c.tau if c.tau is not None else sampler.solve_tau(c.target_ess_fraction)
        return self._global(sampler.draw(m, rng, tau))

    def draw_uniform(self, m: int, rng: np.random.Generator) -> Draw:
        """m uniform draws: i.i.d. with replacement, or in epochs (every prompt once, then reshuffled)."""
        if self.epochs is not None:
            return self._global(self.epochs.draw(m))
        return self._global(UniformSampler(self.size).draw(m, rng))

    def _global(self, draw: Draw) -> Draw:
        drawn = draw if self._members is None else replace(draw, index=self._members[draw.index])
        self.freshen(drawn.index)
        return drawn

    def _sampler(self, rng: np.random.Generator) -> PotentialSampler:
        """The sampler with every pending change applied, in index order."""
        belief = self.belief  # counts what is pending, so that it is among the changes below
        members = self._members  # None: all, of which a list would cost O(N) a draw
        if self.settings(CuresCurriculum).belief_draw == "thompson":  # a fresh accuracy for each prompt: O(N) a draw
            return PotentialSampler(potential(belief.sample(rng, members)))
        if sum(map(len, self._dirty)) > max(BUILD_ANEW, self.size // 4):
            self._samplers.clear()  # new priors for most of a large pool: building takes a tenth of the memory
        if "mean" not in self._samplers:
            self._dirty.clear()
            self._samplers["mean"] = PotentialSampler(potential(belief.mean(members)))
        elif self._dirty:
            changed = np.sort(np.concatenate(self._dirty))
            changed = changed[np.r_[True, changed[1:] != changed[:-1]]]  # np.unique takes four times as long
            self._dirty.clear()
            local = changed
            if members is not None:
                local = np.searchsorted(members, changed)
                inside = members[np.minimum(local, len(members) - 1)] == changed
                local, changed = local[inside], changed[inside]
            if len(changed):
                self._samplers["mean"].update(local, potential(belief.mean(changed)))
        return self._samplers["mean"]

    # -- persistence -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of numbers, strings and arrays: enough to continue exactly."""
        state: dict[str, Any] = {
            "belief": self._belief.state_dict(),
            "mixture": self.mixture.state_dict(),
            "pending": np.array(self._pending, np.float64).reshape(-1, 6),
            "subset": self.subset,
            "commits_since_refresh": self._commits_since_refresh,
            "dirty": np.unique(np.concatenate(self._dirty)) if self._dirty else np.zeros(0, np.int64),
        }
        if self.epochs is not None:
            state["epochs"] = self.epochs.state_dict()
        if self.cost is not None:
            state["cost"], state["speed"] = self.cost, self._speed
        if self.streaks is not None:
            state["streaks"] = self.streaks.state_dict()
        if self.drift is not None:
            state["drift"] = self.drift
        if "mean" in self._samplers:
            state["sampler"] = self._samplers["mean"].state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._belief.load_state_dict(state["belief"])
        self._pending = [(int(a), int(b), int(c), int(i), s, f) for a, b, c, i, s, f in state["pending"].tolist()]
        self.subset = int(state["subset"])
        self._commits_since_refresh = int(state["commits_since_refresh"])
        if self.subset >= 0:
            total = min(self.settings(CuresCurriculum).subsets, self.count)
            self._select(self.subset % total, total)
        if self.epochs is not None:
            self.epochs.load_state_dict(state["epochs"])
        if self.cost is not None:
            self.cost, self._speed = np.array(state["cost"]), np.array(state["speed"])
        if self.streaks is not None:
            self.streaks.load_state_dict(state["streaks"])
        if self.drift is not None:
            self.drift = np.array(state["drift"], np.float32)
        self._samplers.clear()
        if "sampler" in state:
            self._samplers["mean"] = PotentialSampler.restored(self.size, state["sampler"])
        self._dirty = [np.asarray(state["dirty"], np.int64)] if len(state["dirty"]) else []
        self.mixture.load_state_dict(state["mixture"])
