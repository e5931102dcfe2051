"""The canary: does a generator compute with the learner's weights?

After each update the generator scores a few fixed sequences. Their log-probabilities are compared with the learner's
own, token by token. The mean difference and its 90th percentile must stay below a tolerance. The maximum is only
reported: in bfloat16, single improbable tokens differ by up to a nat between two right implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cures_ray.config import Config

FLOAT32_NATS = 3e-4  # the mean difference of vLLM and transformers on CPUs: 2e-5 to 5e-5
LOWER_NATS = 0.1  # in bfloat16: 5e-3 to 4e-2
HIGH_QUANTILE, HIGH_FACTOR = 0.9, 3.0


@dataclass(frozen=True, slots=True)
class Canary:
    """|log p_generator - log p_learner| in nats over ``tokens`` tokens."""

    mean: float
    high: float  # 90th percentile
    largest: float
    tokens: int

    def passes(self, tolerance: float) -> bool:
        """Whether these are the learner's weights. NaN fails."""
        return self.mean <= tolerance and self.high <= HIGH_FACTOR * tolerance

    def repeats(self, other: Canary) -> bool:
        """Whether two readings agree: then their cause is no chance, and trying again cannot help."""
        mine, theirs = [[c.mean, c.high, c.largest] for c in (self, other)]
        return bool(np.allclose(mine, theirs, rtol=0.1, atol=1e-6, equal_nan=True))

    def text(self) -> str:
        return (
            f"mean {self.mean:.3g}, 90th percentile {self.high:.3g}, largest {self.largest:.3g} nats a token "
            f"over {self.tokens} tokens"
        )


def compare(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Canary:
    """``found`` by the generator, ``expected`` by the learner: float32 [T_k - 1] of each sequence. The generator may
    have scored fewer tokens of a sequence."""
    pairs = zip(found, expected, strict=True)
    errors_T = np.concatenate([np.abs(f.astype(np.float64) - e[: len(f)]) for f, e in pairs])
    return Canary(
        mean=float(errors_T.mean()),
        high=float(np.quantile(errors_T, HIGH_QUANTILE)),
        largest=float(errors_T.max()),
        tokens=len(errors_T),
    )


def canary_tolerance(config: Config) -> float:
    """Nats, of the mean. Without a configured one: strict where learner and engine both compute in float32."""
    if config.weights.canary_tolerance is not None:
        return config.weights.canary_tolerance
    return FLOAT32_NATS if _float32(config) else LOWER_NATS


def verdict(config: Config, canary: Canary, *, reproducible: bool) -> str:
    """What a failed canary tells the user: the reading, the limits, and the remedy."""
    tolerance = canary_tolerance(config)
    text = f"{canary.text()}; allowed are a mean of {tolerance:.3g} and a 90th percentile of "
    text += f"{HIGH_FACTOR * tolerance:.3g} (weights.canary_tolerance = {tolerance:g}). "
    if not reproducible:
        return text + "A second transfer measured something else, so the engine is broken"
    text += "A second transfer measured the same, so a new generator would too. "
    if _float32(config):
        return text + "Both sides compute in float32: the weights do not arrive whole"
    return text + (
        "If only rounding differs (mean below about 0.2), raise weights.canary_tolerance, or compute the same on both "
        "sides with rollout.dtype = float32 and learner.dtype = float32; a larger mean means wrong weights"
    )


def _float32(config: Config) -> bool:
    return {config.learner.dtype, engine_dtype(config)} == {"float32"}


def engine_dtype(config: Config) -> str:
    return config.learner.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
