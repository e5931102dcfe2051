"""GRESO's memory (2506.02177): how often in a row a prompt's rewards were all equal, and how readily such are tried."""

from __future__ import annotations

from typing import Any

import numpy as np

FIRST = 0.5  # probability of trying a prompt after one visit with equal rewards, at the start
LEAST, MOST = 0.05, 0.95  # bounds of that probability


class Streaks:
    """Per prompt the visits in a row with equal rewards: +z all right, -z all wrong, 0 unequal. int16 [N].

    ``targets``: shares of all-right and all-wrong groups that are aimed at; ``step``: change of the probabilities at
    each batch.
    """

    def __init__(self, count: int, targets: tuple[float, float], step: float) -> None:
        self.visits = np.zeros(count, np.int16)
        self.probability = np.full(2, FIRST)  # of trying again: all right, all wrong
        self._targets, self._step = np.array(targets), step

    def roll(self, index: np.ndarray) -> np.ndarray:
        """Probability p^z of rolling a prompt out, float64 [k]; 1 where the last rewards were unequal."""
        z = self.visits[index].astype(np.float64)
        return np.where(z > 0, self.probability[0], self.probability[1]) ** np.abs(z)

    def observe(self, index: np.ndarray, successes: np.ndarray, trials: np.ndarray) -> None:
        """The groups of one batch, [k]: lengthens or ends streaks, and moves both probabilities towards the targets."""
        rows, place = np.unique(index, return_inverse=True)
        right, total = np.bincount(place, successes), np.bincount(place, trials)
        rows, right, total = rows[total > 0], right[total > 0], total[total > 0]
        if not len(rows):
            return
        solved, failed = right == total, right == 0
        before = self.visits[rows].astype(np.int64)
        after = np.where(solved, np.maximum(before, 0) + 1, np.where(failed, np.minimum(before, 0) - 1, 0))
        self.visits[rows] = np.clip(after, -1000, 1000)
        shares = np.array([solved.mean(), failed.mean()])
        moved = self.probability - self._step * np.sign(shares - self._targets)
        self.probability = np.clip(moved, LEAST, MOST)

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits, "probability": self.probability}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.visits = np.array(state["visits"], np.int16)
        self.probability = np.array(state["probability"], np.float64)
