"""A prior that may be wrong: experts forecast every rollout, and their measured log-loss sets their weight.

Each expert answers a mean accuracy for any prompt, worth ``strength`` rollouts. Its *posterior* at a prompt is that
prior plus the prompt's own counts. When evidence is about to be counted, every expert's posterior forecasts it first:

    L_k <- exp(-n / MEMORY) L_k + sum of -log p_k(reward)        n = rollouts of the evidence
    w_k  = exp(-L_k) / sum_j exp(-L_j)                           exponential weights (Vovk 1990)
    prior of a prompt = sum_k w_k strength_k Beta(mean_k, 1 - mean_k)        sum of pseudo-counts

Experts learn at commit, which is after their forecasts of the same rollouts: no figure is hindsight, and the belief
that a lease carries never contains a reward of that lease. An expert without skill loses its weight within a few
batches, so a predictor on worthless features costs nothing. Judged by learning curves, calibration alone is not the
aim: stacking forecasts better and trains worse (docs/results.md).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from cures_ray.curriculum.belief import BeliefTable
from cures_ray.curriculum.predictor import DifficultyPredictor, LevelPrior

MEMORY = 2560.0  # rollouts over which a loss fades to 1/e
WINDOW = 512.0  # rollouts over which the recent mean fades to 1/e
RECENT_STRENGTH = 1.0  # of the recent mean, in rollouts: it knows nothing of the prompt, so a prompt's own counts win
CERTAIN = 0.01  # forecasts stay this far from 0 and 1
BINS = 10

EXPERTS: dict[str, tuple[str, ...]] = {  # curriculum.prior_from -> its experts
    "constant": (),
    "level": ("level",),
    "predictor": ("predictor",),
    "mixture": ("recent", "level", "predictor"),
}


class Expert(Protocol):
    """Forecasts a mean accuracy [k] for prompts ``index``; learns from raw counts [k] at commit."""

    @property
    def ready(self) -> bool: ...
    def mean(self, index: np.ndarray) -> np.ndarray: ...
    def update(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RecentMean:
    """The mean reward of all recent rollouts, the same for every prompt: REINFORCE++'s baseline as an expert."""

    def __init__(self) -> None:
        self._sums = np.zeros(2)  # successes, trials, faded

    @property
    def ready(self) -> bool:
        return bool(self._sums[1] > 0)

    def mean(self, index: np.ndarray) -> np.ndarray:
        return np.full(len(index), (self._sums[0] + 1.0) / (self._sums[1] + 2.0))

    def update(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        total = float(trials.sum())
        self._sums = self._sums * np.exp(-total / WINDOW) + (float(successes.sum()), total)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = np.array(state["sums"], np.float64)


class ExpertMixture:
    """The experts of ``prior_from``, their losses, and the loss and calibration of the belief that is used.

    ``levels``: any hashable per prompt or None. ``features``: float32 [N, d] or None, then levels serve.
    ``strength``: rollouts that a level's or the predictor's mean is worth.
    """

    def __init__(
        self, prior_from: str, count: int, levels: np.ndarray | None, features: np.ndarray | None, strength: float
    ) -> None:
        names = EXPERTS[prior_from]
        self.level = LevelPrior(levels, count) if "level" in names else None
        self.predictor = DifficultyPredictor(features, levels, count) if "predictor" in names else None
        made: dict[str, Expert | None] = {"recent": RecentMean(), "level": self.level, "predictor": self.predictor}
        self.experts: dict[str, Expert] = {name: expert for name in names if (expert := made[name]) is not None}
        self.strengths = np.array([RECENT_STRENGTH if name == "recent" else strength for name in names])
        self.losses = np.zeros(len(names) + 1)  # nats, faded; the last is the belief's own
        self.scored = np.zeros(len(names) + 1)  # rollouts behind them, faded
        self._bins = np.zeros((3, BINS))  # of the belief's forecasts: trials, successes, sum of forecasts, faded

    @property
    def ready(self) -> bool:
        """Whether there is a prior to set."""
        return bool(self.experts) and all(expert.ready for expert in self.experts.values())

    @property
    def weights(self) -> np.ndarray:
        """float64 [K], sums to 1."""
        relative = np.exp(self.losses[:-1].min(initial=np.inf) - self.losses[:-1])
        return relative / relative.sum() if len(relative) else relative

    def score(self, belief: BeliefTable, index: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> None:
        """Judge the forecasts of evidence [k] that ``belief`` has not counted yet."""
        total = successes + failures
        n = float(total.sum())
        if not n:
            return
        fade = np.exp(-n / MEMORY)
        forecasts = [belief.mean(index)]
        if self.ready:
            own_alpha, own_beta = belief.evidence(index)
            posterior = [
                (own_alpha + strength * mean) / (own_alpha + own_beta + strength)
                for strength, mean in zip(self.strengths, self._means(index), strict=True)
            ]
            forecasts = [*posterior, *forecasts]
        new = np.array([_log_loss(p, successes, failures) for p in forecasts])
        self.losses[-len(new) :] = fade * self.losses[-len(new) :] + new
        self.scored[-len(new) :] = fade * self.scored[-len(new) :] + n
        place = np.minimum((forecasts[-1] * BINS).astype(int), BINS - 1)
        self._bins *= fade
        for row, values in enumerate((total, successes, forecasts[-1] * total)):
            np.add.at(self._bins[row], place, values)

    def prior(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pseudo-counts (alpha, beta) of the prompts, float64 [k] each. Only when ``ready``."""
        counts, means = self.weights * self.strengths, self._means(index)
        alpha = counts @ means
        return alpha, counts.sum() - alpha

    def _means(self, index: np.ndarray) -> np.ndarray:
        """float64 [K, k]."""
        return np.stack([np.clip(e.mean(index), CERTAIN, 1.0 - CERTAIN) for e in self.experts.values()])

    def update(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        for expert in self.experts.values():
            expert.update(index, successes, trials)

    def metrics(self) -> dict[str, float]:
        """Log-loss in nats a rollout of every expert and of the belief in use, the skill of each expert over the best
        other one, their weights, and the belief's expected calibration error."""
        found: dict[str, float] = {}
        if self.scored[-1]:
            *losses, own = self.losses / np.maximum(self.scored, 1e-9)
            trials, successes, forecasts = self._bins
            found["belief/logloss"] = float(own)
            found["belief/ece"] = float(np.abs(successes - forecasts).sum() / max(trials.sum(), 1e-9))
            for i, name in enumerate(self.experts if self.scored[0] else ()):
                others = [loss for j, loss in enumerate(losses) if j != i]
                found[f"belief/logloss_{name}"] = float(losses[i])
                if others:
                    found[f"belief/skill_{name}"] = float(min(others) - losses[i])
        found |= {f"belief/weight_{name}": float(w) for name, w in zip(self.experts, self.weights, strict=True)}
        return found | (self.predictor.calibration() if self.predictor is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "scored": self.scored,
            "bins": self._bins,
            "experts": {name: expert.state_dict() for name, expert in self.experts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.scored = np.array(state["losses"], np.float64), np.array(state["scored"], np.float64)
        self._bins = np.array(state["bins"], np.float64)
        for name, expert in self.experts.items():
            expert.load_state_dict(state["experts"][name])


def _log_loss(p: np.ndarray, successes: np.ndarray, failures: np.ndarray) -> float:
    """Nats of all rollouts together; the same limit on certainty for every forecaster."""
    p = np.clip(p, CERTAIN, 1.0 - CERTAIN)
    return float(-(successes @ np.log(p) + failures @ np.log1p(-p)))
