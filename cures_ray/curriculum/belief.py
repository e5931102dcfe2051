"""What is believed about each prompt's accuracy: p ~ Beta(alpha, beta), one row a prompt (eq. 22-24).

The estimate is the posterior mean, never c/n. Rows are float32 structure-of-arrays, so that 10^7 prompts fit:
8 bytes of counts, 8 of priors (only once they differ between prompts), 4 of visits, 16 of cached gradient
statistics (only with ``track_gradients``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cures_ray.messages import GradientStatistics

Index = np.ndarray | Sequence[int] | None
Values = np.ndarray | float

SMALLEST = 1e-6  # a Beta parameter never gets smaller: keeps the mean inside (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMoments:
    """Moments of the score s given the reward, per prompt (ALGORITHMS.md 1, eq. 21). NaN: unknown."""

    m_plus: np.ndarray  # E[|s|^2 | r=1]
    m_minus: np.ndarray  # E[|s|^2 | r=0]
    diff_sq: np.ndarray  # |mu_plus - mu_minus|^2, an unbiased estimate, may be negative
    dot: np.ndarray  # mu_plus . mu_minus


def moments_from(statistics: Sequence[GradientStatistics]) -> ScoreMoments:
    """Unbiased moments [k] of k leases; NaN where a class has too few rollouts.

    |mu|^2 is the U-statistic (|sum s|^2 - sum |s|^2) / (n (n-1)) and needs two rollouts of the class.
    """
    fields = ("n_plus", "n_minus", "sum_sq_plus", "sum_sq_minus", "sq_sum_plus", "sq_sum_minus", "dot")
    table = np.array([[getattr(s, f) for f in fields] for s in statistics], np.float64).reshape(-1, len(fields))
    n1, n0, ss1, ss0, sq1, sq0, dot = table.T
    with np.errstate(divide="ignore", invalid="ignore"):
        mu1 = np.where(n1 > 1, (sq1 - ss1) / (n1 * (n1 - 1)), np.nan)
        mu0 = np.where(n0 > 1, (sq0 - ss0) / (n0 * (n0 - 1)), np.nan)
        cross = np.where((n1 > 0) & (n0 > 0), dot / (n1 * n0), np.nan)
        return ScoreMoments(
            m_plus=np.where(n1 > 0, ss1 / n1, np.nan),
            m_minus=np.where(n0 > 0, ss0 / n0, np.nan),
            diff_sq=mu1 + mu0 - 2 * cross,
            dot=cross,
        )


class BeliefTable:
    """Beta posteriors and visit counts of ``num_prompts`` prompts, keyed by row.

    A row without evidence equals its prior. ``visits`` counts observations (settled leases with at least one
    verified rollout) over the whole run; ``reset`` keeps it.
    """

    def __init__(
        self,
        num_prompts: int,
        prior_alpha: float = 1.0,
        prior_beta: float = 1.0,
        track_gradients: bool = False,
        gradient_rate: float = 0.3,
    ) -> None:
        """``gradient_rate`` in (0, 1]: share of a new gradient statistic in the running average."""
        if not (num_prompts > 0 and prior_alpha > 0 and prior_beta > 0):
            raise ValueError(f"needs prompts and a proper prior, got {num_prompts}, Beta({prior_alpha}, {prior_beta})")
        self.num_prompts = num_prompts
        self.alpha = np.full(num_prompts, prior_alpha, np.float32)
        self.beta = np.full(num_prompts, prior_beta, np.float32)
        self.visits = np.zeros(num_prompts, np.uint32)
        # one entry while all prompts share the prior, [N] after set_prior
        self.prior_alpha = np.array([prior_alpha], np.float32)
        self.prior_beta = np.array([prior_beta], np.float32)
        self.gradient_rate = gradient_rate
        # [4, N] rows: m_plus, m_minus, diff_sq, dot; and their averages over all prompts, to impute from
        self.gradients = np.full((4, num_prompts), np.nan, np.float32) if track_gradients else None
        self.pooled = np.full(4, np.nan)

    def mean(self, index: Index = None) -> np.ndarray:
        """Posterior mean of the accuracy, float64 [k], strictly inside (0, 1)."""
        alpha, beta = self.counts(index)
        return alpha / (alpha + beta)

    def counts(self, index: Index = None) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), float64 [k]."""
        rows = slice(None) if index is None else np.asarray(index, np.int64)
        return self.alpha[rows].astype(np.float64), self.beta[rows].astype(np.float64)

    def evidence(self, index: Index = None) -> tuple[np.ndarray, np.ndarray]:
        """What was observed, discounted as it is: the counts without the prior, float64 [k] each."""
        alpha, beta = self.counts(index)
        rows = slice(None) if index is None else np.asarray(index, np.int64)
        prior_alpha, prior_beta = self._prior(self.prior_alpha, rows), self._prior(self.prior_beta, rows)
        return np.maximum(alpha - prior_alpha, 0.0), np.maximum(beta - prior_beta, 0.0)

    def sample(self, rng: np.random.Generator, index: Index = None) -> np.ndarray:
        """One Thompson draw of the accuracy per row, float64 [k]."""
        return rng.beta(*self.counts(index))

    def observe(
        self,
        index: np.ndarray | Sequence[int],
        successes: np.ndarray | Sequence[float],
        failures: np.ndarray | Sequence[float],
        evidence: Values = 1.0,
        discount: Values = 1.0,
    ) -> None:
        """alpha <- alpha0 + discount (alpha - alpha0) + evidence * successes; beta likewise with failures.

        All [k]. ``evidence`` scales the new counts (lambda ** lag of late evidence). A prompt that occurs
        several times is updated once for each, in order. Observations without a verified rollout (faults
        only) change nothing.
        """
        rows = np.asarray(index, np.int64)
        s, f, e, d = (
            np.broadcast_to(np.asarray(v, np.float64), rows.shape) for v in (successes, failures, evidence, discount)
        )
        if not (np.all(s >= 0) and np.all(f >= 0) and np.all(e >= 0) and np.all((d >= 0) & (d <= 1))):
            raise ValueError("counts and evidence must be >= 0 and discounts in [0, 1]")
        seen = (s + f) > 0
        s, f = s * e, f * e
        if not seen.all():
            rows, s, f, d = rows[seen], s[seen], f[seen], d[seen]
        for turn in _turns(rows):  # one turn unless a prompt occurs twice
            at = rows[turn]
            self.alpha[at] = self._decay(self.alpha[at], self._prior(self.prior_alpha, at), d[turn]) + s[turn]
            self.beta[at] = self._decay(self.beta[at], self._prior(self.prior_beta, at), d[turn]) + f[turn]
            self.visits[at] += 1

    def reset(self, index: Index = None) -> None:
        """Forget the evidence and the gradient statistics of the rows (Algorithm 1, c). Visits stay."""
        rows = slice(None) if index is None else np.asarray(index, np.int64)
        self.alpha[rows] = self._prior(self.prior_alpha, rows)
        self.beta[rows] = self._prior(self.prior_beta, rows)
        if self.gradients is not None:
            self.gradients[:, rows] = np.nan

    def rescale(self, total: float) -> None:
        """Bring every row's alpha + beta to ``total``, at its mean: what was observed so far weighs that much."""
        factor = total / (self.alpha + self.beta)
        self.alpha, self.beta = self.alpha * factor, self.beta * factor

    def forget_prior(self) -> None:
        """From now on the prior is evidence like any other: a discount fades it too."""
        self.prior_alpha, self.prior_beta = np.array([SMALLEST], np.float32), np.array([SMALLEST], np.float32)

    def set_prior(self, index: Index, alpha: Values, beta: Values) -> None:
        """Replace the prior of the rows (all when None); evidence that the rows already have is kept."""
        a, b = np.asarray(alpha, np.float32), np.asarray(beta, np.float32)
        if not (np.all(a > 0) and np.all(b > 0) and np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
            raise ValueError("prior counts must be positive and finite")
        if len(self.prior_alpha) < self.num_prompts:
            self.prior_alpha = np.full(self.num_prompts, self.prior_alpha[0], np.float32)
            self.prior_beta = np.full(self.num_prompts, self.prior_beta[0], np.float32)
        rows = slice(None) if index is None else np.asarray(index, np.int64)
        self.alpha[rows] = np.maximum(self.alpha[rows] + (a - self.prior_alpha[rows]), SMALLEST)
        self.beta[rows] = np.maximum(self.beta[rows] + (b - self.prior_beta[rows]), SMALLEST)
        self.prior_alpha[rows], self.prior_beta[rows] = a, b

    def observe_gradients(self, index: np.ndarray | Sequence[int], statistics: Sequence[GradientStatistics]) -> None:
        """Average the statistics [k] of k leases into their prompts' rows, and into the pooled estimate."""
        if self.gradients is None:
            raise ValueError("this table was built without track_gradients (curriculum.sigma = last_layer)")
        rows = np.asarray(index, np.int64)
        m = moments_from(statistics)
        new = np.stack([m.m_plus, m.m_minus, m.diff_sq, m.dot])
        for turn in _turns(rows):
            at = rows[turn]
            self.gradients[:, at] = _average(self.gradients[:, at].astype(np.float64), new[:, turn], self.gradient_rate)
        known = np.isfinite(new)
        if known.any():
            total = np.where(known, new, 0.0).sum(1)
            batch = np.divide(total, known.sum(1), out=np.full(4, np.nan), where=known.any(1))
            self.pooled = _average(self.pooled, batch, self.gradient_rate)

    def moments(self, index: np.ndarray | Sequence[int]) -> ScoreMoments:
        """Score moments [k] of the rows, NaN where never observed. ``pooled_moments`` imputes them."""
        if self.gradients is None:
            raise ValueError("this table was built without track_gradients (curriculum.sigma = last_layer)")
        table = self.gradients[:, np.asarray(index, np.int64)].astype(np.float64)
        return ScoreMoments(m_plus=table[0], m_minus=table[1], diff_sq=table[2], dot=table[3])

    def pooled_moments(self) -> ScoreMoments:
        """The average over all prompts observed so far, 0-dimensional arrays."""
        table = [np.array(v) for v in self.pooled]
        return ScoreMoments(m_plus=table[0], m_minus=table[1], diff_sq=table[2], dot=table[3])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.state_dict().values())

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays themselves, not copies: write them out before the next change."""
        state = {
            "alpha": self.alpha,
            "beta": self.beta,
            "visits": self.visits,
            "prior_alpha": self.prior_alpha,
            "prior_beta": self.prior_beta,
            "pooled": self.pooled,
        }
        return state if self.gradients is None else state | {"gradients": self.gradients}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over the arrays of ``state_dict`` (no copy when they are writable and of the right type)."""
        for name in ("alpha", "beta", "visits"):
            if len(state[name]) != self.num_prompts:
                raise ValueError(f"belief state has {len(state[name])} prompts in {name}, the table {self.num_prompts}")
        for name in ("alpha", "beta", "prior_alpha", "prior_beta"):
            setattr(self, name, np.require(state[name], np.float32, "W"))
        self.visits = np.require(state["visits"], np.uint32, "W")
        self.pooled = np.require(state["pooled"], np.float64, "W")
        if self.gradients is not None and "gradients" in state:
            self.gradients = np.require(state["gradients"], np.float32, "W").reshape(4, self.num_prompts)

    @staticmethod
    def _prior(prior: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        return prior if len(prior) == 1 else prior[rows]

    @staticmethod
    def _decay(value: np.ndarray, prior: np.ndarray, discount: np.ndarray) -> np.ndarray:
        return prior + discount * (value.astype(np.float64) - prior)


def _turns(rows: np.ndarray) -> list[np.ndarray | slice]:
    """Split positions so that no turn holds a row twice: turn j holds the j-th occurrence of each row."""
    ordered = np.sort(rows)
    if not (ordered[1:] == ordered[:-1]).any():
        return [slice(None)]
    order = np.argsort(rows, kind="stable")
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    group_start = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    occurrence = np.empty(len(rows), np.int64)
    occurrence[order] = np.arange(len(rows)) - group_start
    return [np.flatnonzero(occurrence == j) for j in range(int(occurrence.max()) + 1)]


def _average(old: np.ndarray, new: np.ndarray, rate: float) -> np.ndarray:
    """Exponential average; NaN means unknown on either side."""
    blended = np.where(np.isnan(old), new, old + rate * (new - old))
    return np.where(np.isnan(new), old, blended)
