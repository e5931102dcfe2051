"""From judged answers to accuracies: pass@1, pass@k, maj@k, intervals over prompts, paired tests.

Shapes: P prompts, k answers a prompt. A fault (timeout, crash, unparsable gold) is not solved; it is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedAnswer:
    """One answer to one prompt."""

    reward: float  # in [0, 1]; 0 for a fault
    correct: bool  # the verdict; with graded rewards, reward >= 1
    fault: bool = False
    text: str = ""  # the parsed answer, for the majority vote
    tokens: int = 0
    truncated: bool = False  # ended by the length limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(slots=True, kw_only=True)
class Scores:
    """What one model scored on one set."""

    prompts: int
    answers: int
    accuracy: Estimate  # mean reward: pass@1, averaged over the k answers of a prompt
    pass_at: dict[int, float] = field(default_factory=dict)
    majority_at: dict[int, float] = field(default_factory=dict)
    faults: int = 0
    tokens_mean: float = 0.0
    truncated_share: float = 0.0
    best_constant: float = 0.0  # accuracy of the one answer that is right most often
    by_level: dict[str, float] = field(default_factory=dict)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k answers is right, unbiased from ``correct`` of n (Chen et al., arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k > n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers a prompt, {n} given")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_at_k(answers: Sequence[JudgedAnswer], k: int) -> float:
    """Chance that the most frequent of the first k answers is right; ties share it. Right answers are one class,
    however they are written; wrong ones are told apart by their text; faults do not vote."""
    votes = Counter("" if a.correct else f"wrong {a.text}" for a in answers[:k] if not a.fault)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [key for key, count in votes.items() if count == most]
    return winners.count("") / len(winners)


def estimate(scores: np.ndarray) -> Estimate:
    """Mean of per-prompt scores [P] in [0, 1]: Wilson's interval where all are 0 or 1, else Student's.

    Raises:
        ValueError: no scores.
    """
    scores = np.asarray(scores, np.float64)
    if not len(scores):
        raise ValueError("no prompts were evaluated")
    mean, count = float(scores.mean()), len(scores)
    if np.isin(scores, (0.0, 1.0)).all():
        ci = stats.binomtest(int(scores.sum()), count).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(mean=mean, low=float(ci.low), high=float(ci.high))
    if count == 1:
        return Estimate(mean=mean, low=0.0, high=1.0)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * scores.std(ddof=1) / np.sqrt(count))
    return Estimate(mean=mean, low=max(mean - half, 0.0), high=min(mean + half, 1.0))


def prompt_scores(answers: Sequence[Sequence[JudgedAnswer]]) -> np.ndarray:
    """Mean reward of each prompt's answers, float64 [P]."""
    return np.array([np.mean([0.0 if a.fault else a.reward for a in group]) for group in answers])


def score(
    answers: Sequence[Sequence[JudgedAnswer]],
    golds: Sequence[str] | None = None,
    levels: Sequence[object] | None = None,
) -> Scores:
    """All figures of one set.

    Args:
        answers: one sequence a prompt, of any length >= 1.
        golds: [P], for the best constant answer; prompts with the same gold are solved by the same constant.
        levels: [P], any printable values.
    """
    flat = [a for group in answers for a in group]
    per_prompt = prompt_scores(answers)
    smallest = min(len(group) for group in answers)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= smallest] if smallest > 1 else []
    right = [(len(group), sum(a.correct for a in group)) for group in answers]
    return Scores(
        prompts=len(answers),
        answers=len(flat),
        accuracy=estimate(per_prompt),
        pass_at={k: float(np.mean([pass_at_k(n, c, k) for n, c in right])) for k in ks},
        majority_at={k: float(np.mean([majority_at_k(group, k) for group in answers])) for k in ks if k > 2},
        faults=sum(a.fault for a in flat),
        tokens_mean=float(np.mean([a.tokens for a in flat])),
        truncated_share=float(np.mean([a.truncated for a in flat])),
        best_constant=best_constant(golds) if golds is not None else 0.0,
        by_level=by_level(per_prompt, levels) if levels is not None else {},
    )


def best_constant(golds: Sequence[str]) -> float:
    """Accuracy of answering every prompt with the most frequent gold: what a model that ignores the prompt gets."""
    counts = Counter(str(gold).strip() for gold in golds)
    return max(counts.values()) / len(golds) if counts else 0.0


def by_level(scores: np.ndarray, levels: Sequence[object]) -> dict[str, float]:
    """Mean score of each level, in natural order."""
    names = np.array([level_name(level) for level in levels])
    return {name: float(np.mean(scores[names == name])) for name in sorted(set(names.tolist()), key=_natural)}


def level_name(level: object) -> str:
    """2.0 -> "2"; text as it is."""
    return f"{level:g}" if isinstance(level, float | np.floating) else str(level)


def _natural(name: str) -> tuple[float, str]:
    digits = "".join(c for c in name if c.isdigit() or c == ".")
    try:
        return (float(digits), name)
    except ValueError:
        return (float("inf"), name)


def paired_p_value(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value that two models' per-prompt scores [P] have the same mean: signs flipped per prompt."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if not difference.any():
        return 1.0
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=9_999,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)
