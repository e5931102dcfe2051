"""What training on a rollout costs, with generating one as the unit, measured on the run itself.

``algo.train_cost`` turns it into the level of ``min_advantage`` (advantages.thinning_level): where the learner is the
bottleneck fewer, larger advantages are trained; where generation is, nearly all of them.
"""

from __future__ import annotations

import math

SMOOTHING = 0.3  # share of the newest step in the averages
WARMUP_STEPS = 2  # engines compile and caches fill


class Bottleneck:
    """Averages of wall seconds a rollout.

    Args:
        setting: ``algo.train_cost``: None (never known), a number (given) or "measured".
    """

    def __init__(self, setting: float | str | None) -> None:
        self.setting, self._steps = setting, 0
        self._generate = self._train = math.nan  # seconds a rollout

    def observe(self, *, generate_seconds: float, generated: int, train_seconds: float, computed: int) -> None:
        """One step: seconds in which generators were busy (mean over them) and the learner computed, and the
        rollouts that came of it."""
        self._steps += 1
        if self._steps <= WARMUP_STEPS or not generated or not computed:
            return
        self._generate = _average(self._generate, generate_seconds / generated)
        self._train = _average(self._train, train_seconds / computed)

    @property
    def train_cost(self) -> float | None:
        """Of one rollout, generating one = 1. None while it is not known."""
        if self.setting is None or isinstance(self.setting, int | float):
            return self.setting
        if math.isnan(self._generate):
            return None
        return self._train / max(self._generate, 1e-9)


def _average(old: float, new: float) -> float:
    return new if math.isnan(old) else old + SMOOTHING * (new - old)
