"""Priors that generalise to prompts not yet seen: by level, and by a predictor fitted online.

Both learn from the raw counts of committed batches and answer a mean accuracy for any prompt; the pool turns
it into a Beta prior of strength ``prior_strength``, which serves sampling, allocation and, through
Lease.alpha / beta, the posterior leave-one-out baseline.

The predictor is a logistic regression on prompt features with AdaGrad steps (Duchi et al. 2011): one
minibatch step an observed batch, O(m d). Its calibration is measured on each batch *before* the update, so
every figure is a forecast.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10


def level_codes(levels: np.ndarray | None, count: int) -> tuple[np.ndarray, int]:
    """Dense codes int [N] of arbitrary level values and how many there are; one level when there is none."""
    if levels is None:
        return np.zeros(count, np.int64), 1
    values = np.asarray(levels)
    if values.dtype == object:
        values = values.astype(str)
    names, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1).astype(np.int32), len(names)


class LevelPrior:
    """Pooled accuracy per level, shrunk to the pooled accuracy of all levels by ``shrink`` rollouts."""

    def __init__(self, levels: np.ndarray | None, count: int, shrink: float = 4.0) -> None:
        self._codes, size = level_codes(levels, count)
        self._successes, self._trials, self._shrink = np.zeros(size), np.zeros(size), shrink

    @property
    def ready(self) -> bool:
        return bool(self._trials.sum() > 0)

    def update(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        np.add.at(self._successes, self._codes[index], successes)
        np.add.at(self._trials, self._codes[index], trials)

    def mean(self, index: np.ndarray) -> np.ndarray:
        overall = (self._successes.sum() + 1.0) / (self._trials.sum() + 2.0)
        by_level = (self._successes + self._shrink * overall) / (self._trials + self._shrink)
        return by_level[self._codes[index]]

    def state_dict(self) -> dict[str, Any]:
        return {"successes": self._successes, "trials": self._trials}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._successes = np.array(state["successes"], np.float64)
        self._trials = np.array(state["trials"], np.float64)


class DifficultyPredictor:
    """p(x) = sigmoid(w . f(x)). Without features, one indicator per level and a bias."""

    def __init__(
        self,
        features: np.ndarray | None,
        levels: np.ndarray | None = None,
        count: int = 0,
        *,
        rate: float = 0.5,
        decay: float = 1e-4,
    ) -> None:
        self._features = features
        self._codes, size = level_codes(levels, count if features is None else len(features))
        width = 1 + (size if features is None else features.shape[1])
        self._weights, self._squares = np.zeros(width), np.zeros(width)
        self._rate, self._decay, self._updates = rate, decay, 0
        # running calibration: per bin of the forecast, trials, successes, sum of forecasts; Brier, log-loss
        self._bins = np.zeros((3, BINS))
        self._brier, self._log_loss = 0.0, 0.0

    @property
    def ready(self) -> bool:
        return self._updates > 0

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Features with a leading 1: float64 [k, 1 + d]."""
        k = len(index)
        if self._features is None:
            rows = np.zeros((k, len(self._weights)))
            rows[np.arange(k), 1 + self._codes[index]] = 1.0
        else:
            rows = np.concatenate([np.ones((k, 1)), self._features[index].astype(np.float64)], axis=1)
        rows[:, 0] = 1.0
        return rows

    def mean(self, index: np.ndarray, chunk: int = 65536) -> np.ndarray:
        """Predicted accuracy, float64 [k]."""
        parts = [_sigmoid(self.rows(index[i : i + chunk]) @ self._weights) for i in range(0, len(index), chunk)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def update(
        self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray, passes: int = 10
    ) -> dict[str, float]:
        """Score the forecast for ``trials`` rollouts of each prompt, then learn from them."""
        seen = trials > 0
        index, successes, trials = index[seen], successes[seen], trials[seen]
        if len(index) == 0:
            return self.calibration()
        rows = self.rows(index)
        self._score(_sigmoid(rows @ self._weights), successes, trials)
        for _ in range(passes):
            error = _sigmoid(rows @ self._weights) * trials - successes
            gradient = rows.T @ error / trials.sum() + self._decay * self._weights
            self._squares += gradient**2
            self._weights -= self._rate * gradient / np.sqrt(self._squares + 1e-12)
        self._updates += 1
        return self.calibration()

    def _score(self, forecast: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        old = 0.95  # a moving window of about 20 batches
        self._bins *= old
        place = np.minimum((forecast * BINS).astype(int), BINS - 1)
        for row, values in enumerate((trials, successes, forecast * trials)):
            np.add.at(self._bins[row], place, values)
        rate, q = successes / trials, np.clip(forecast, 1e-6, 1 - 1e-6)
        weight = trials / trials.sum()
        brier = float(weight @ (rate * (1 - q) ** 2 + (1 - rate) * q**2))
        loss = float(-weight @ (rate * np.log(q) + (1 - rate) * np.log(1 - q)))
        first = self._updates == 0
        self._brier = brier if first else old * self._brier + (1 - old) * brier
        self._log_loss = loss if first else old * self._log_loss + (1 - old) * loss

    def calibration(self) -> dict[str, float]:
        """Expected calibration error over 10 bins, Brier score and log-loss (nats) of past forecasts."""
        trials, successes, forecasts = self._bins
        ece = float(np.abs(successes - forecasts).sum() / max(trials.sum(), 1e-9))
        return {"predictor_ece": ece, "predictor_brier": self._brier, "predictor_log_loss": self._log_loss}

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "squares": self._squares,
            "bins": self._bins,
            "scores": np.array([self._brier, self._log_loss]),
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights, self._squares = np.array(state["weights"]), np.array(state["squares"])
        self._bins = np.array(state["bins"])
        self._brier, self._log_loss = (float(x) for x in state["scores"])
        self._updates = int(state["updates"])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
