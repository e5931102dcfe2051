"""How many rollouts each drawn prompt gets: integers n_i with sum exactly N (eq. 20, ALGORITHMS.md 1.3, 3.3, 3.4).

All functions take the *distinct* prompts of one draw, k of them. A prompt drawn c times has objective weight
c W / m and therefore share c W sigma. ``n_min`` and ``n_max`` bound each distinct prompt, as scalars or [k];
pass ``n_max * multiplicity`` where a prompt drawn c times may have c times as many.
"""

from __future__ import annotations

import numpy as np

from cures_ray.curriculum.belief import ScoreMoments

Bound = int | np.ndarray

_FLOOR = 1e-12  # share of a zero-weight prompt relative to the largest weight: gets what nobody else can take


def apportion(weights: np.ndarray, total: int, n_min: Bound, n_max: Bound | None = None) -> np.ndarray:
    """n_i proportional to ``weights`` [k] >= 0 within the bounds, summing to ``total``: int64 [k].

    Finds the scale t with sum clip(t w_i, n_min, n_max) = total, rounds by largest remainder, ties to the
    earlier prompt. A larger weight never gets fewer. All weights zero: uniform.
    Raises ValueError when the bounds do not admit ``total``, or a weight is negative or not finite.
    """
    w = np.asarray(weights, np.float64)
    low, high = _bounds(len(w), total, n_min, total if n_max is None else n_max)
    if not (np.all(np.isfinite(w)) and np.all(w >= 0)):
        raise ValueError("allocation weights must be finite and >= 0")
    if not len(w):
        return np.zeros(0, np.int64)
    floored = np.maximum(w / w.max(), _FLOOR) if w.max() > 0 else np.ones_like(w)
    share = np.clip(_scale(floored, total, low, high) * floored, low, high)
    n = np.clip(np.floor(share + 1e-9).astype(np.int64), low, high)
    for _ in range(2):  # the second pass only when rounding errors left more units than open prompts
        missing = total - int(n.sum())
        if not missing:
            break
        open_ = np.flatnonzero(n < high) if missing > 0 else np.flatnonzero(n > low)
        order = open_[np.lexsort((-w[open_] * np.sign(missing), (n - share)[open_] * np.sign(missing)))]
        n[order[: abs(missing)]] += np.sign(missing)
    assert n.sum() == total
    return n


def sigma_bernoulli(p: np.ndarray) -> np.ndarray:
    """sqrt(p (1 - p)): eq. 21 with |s|^2 = 1 in both classes and mu_plus = mu_minus."""
    return np.sqrt(np.maximum(p * (1.0 - p), 0.0))


def sigma_gradient(p: np.ndarray, baseline: np.ndarray | float, moments: ScoreMoments) -> np.ndarray:
    """Standard deviation of (r - b) s, the gradient of one rollout with a generic baseline b (ALGORITHMS.md 3.4):
    sigma^2 = p (1-b)^2 M_plus + (1-p) b^2 M_minus - (p (1-p))^2 |mu_plus - mu_minus|^2. Moments must be known
    (``impute``); b = p is eq. 21."""
    second = p * (1.0 - baseline) ** 2 * moments.m_plus + (1.0 - p) * np.square(baseline) * moments.m_minus
    cross = np.square(p * (1.0 - p)) * np.maximum(moments.diff_sq, 0.0)
    return np.sqrt(np.maximum(second - cross, 0.0))


def sigma_for(
    advantage: str, p: np.ndarray, moments: ScoreMoments | None = None, pooled: ScoreMoments | None = None
) -> np.ndarray:
    """sigma [k] of the estimator that is trained (``algo.advantage``), from the accuracies p [k].

    ``moments`` None takes unit scores, for which the group baselines give ``sigma_bernoulli`` and GRPO a flat
    1. Unknown moments are imputed from the batch, then from ``pooled``.
    """
    known = impute(moments, pooled) if moments is not None else unit_moments(len(p))
    if advantage == "raft_pp":  # A = r, correct rollouts only
        return sigma_gradient(p, 0.0, known)
    if advantage == "reinforce_pp":  # whitened over the batch: one baseline for all, the batch mean
        return sigma_gradient(p, float(np.mean(p)) if len(p) else 0.0, known)
    sigma = sigma_gradient(p, p, known)
    if advantage in ("grpo", "posterior_std"):
        return sigma / np.maximum(sigma_bernoulli(p), 1e-6)
    if advantage in ("rloo", "dr_grpo", "shrinkage", "reinforce_pp_baseline") or advantage.startswith("posterior_"):
        return sigma
    raise ValueError(f"no sigma for algo.advantage = {advantage}")


def unit_moments(k: int) -> ScoreMoments:
    """|s|^2 = 1 in both classes, mu_plus = mu_minus = 0."""
    one, zero = np.ones(k), np.zeros(k)
    return ScoreMoments(m_plus=one, m_minus=one, diff_sq=zero, dot=zero)


def impute(moments: ScoreMoments, pooled: ScoreMoments | None = None) -> ScoreMoments:
    """Fill unknown (NaN) moments [k]: a missing M+ or M- by the mean of the batch's known ones, then by
    ``pooled``, then by the other class, then by 1; a missing cross term by 0 (conservative: sigma gets larger).
    A cross term estimated below 0 is 0."""
    plus = _fill(moments.m_plus, pooled.m_plus if pooled else np.nan)
    minus = _fill(moments.m_minus, pooled.m_minus if pooled else np.nan)
    plus, minus = np.where(np.isnan(plus), minus, plus), np.where(np.isnan(minus), plus, minus)
    return ScoreMoments(
        m_plus=np.maximum(np.nan_to_num(plus, nan=1.0), 0.0),
        m_minus=np.maximum(np.nan_to_num(minus, nan=1.0), 0.0),
        diff_sq=np.maximum(np.nan_to_num(moments.diff_sq), 0.0),
        dot=np.nan_to_num(moments.dot),
    )


def rloo_zeta(p: np.ndarray, moments: ScoreMoments) -> np.ndarray:
    """zeta = p(1-p)/2 (M_plus + M_minus - 2 mu_plus.mu_minus) - (p(1-p))^2 |mu_plus - mu_minus|^2."""
    q = p * (1.0 - p)
    return 0.5 * q * (moments.m_plus + moments.m_minus - 2 * moments.dot) - q**2 * moments.diff_sq


def rloo_variance(n: np.ndarray, sigma_sq: np.ndarray, zeta: np.ndarray) -> np.ndarray:
    """Variance of the RLOO gradient of a prompt with n >= 2 rollouts: [(n-2) sigma^2 + 2 zeta] / (n (n-1))."""
    return ((n - 2) * sigma_sq + 2 * zeta) / (n * (n - 1.0))


def rloo_gain(
    p: np.ndarray, moments: ScoreMoments | None, weights: np.ndarray, total: int, n_min: Bound, n_max: Bound
) -> np.ndarray:
    """Integers n_i that minimise sum weights_i^2 V_i(n_i) exactly, int64 [k]; ``weights`` = c W.

    V falls convexly (2 zeta >= sigma^2, by Hoeffding), so taking the largest marginal gains is optimal.
    Raises ValueError for n_min < 2 and for bounds that do not admit ``total``.
    """
    low, high = _bounds(len(p), total, n_min, n_max)
    if np.any(low < 2):
        raise ValueError("allocation = rloo_gain needs n_min >= 2: RLOO has no variance for a lone rollout")
    known = impute(moments) if moments is not None else unit_moments(len(p))
    sigma_sq = sigma_gradient(p, p, known) ** 2
    zeta = np.maximum(rloo_zeta(p, known), sigma_sq / 2)
    n = np.arange(int(low.min(initial=2)), int(high.max(initial=2)) + 1)[None, :]
    value = -np.square(weights)[:, None] * rloo_variance(n, sigma_sq[:, None], zeta[:, None])
    return _greedy(value, n[0, 0], total, low, high)


def knapsack(p: np.ndarray, weights: np.ndarray, total: int, n_min: Bound, n_max: Bound) -> np.ndarray:
    """Knapsack RL (2509.25849): n_i that maximise sum weights_i (1 - p^n - (1-p)^n) p (1-p)^2, int64 [k].

    Concave in n from 1 on, so greedy is exact. Prompts with p = 0 or 1 have no value: they get n_min, and what
    the others cannot take is spread over them evenly. Raises ValueError for n_min < 1.
    """
    low, high = _bounds(len(p), total, n_min, n_max)
    if np.any(low < 1):
        raise ValueError("method = knapsack needs n_min >= 1")
    n = np.arange(int(low.min(initial=1)), int(high.max(initial=1)) + 1)[None, :]
    column = p[:, None]
    value = (1 - column**n - (1 - column) ** n) * (weights * p * (1 - p) ** 2)[:, None]
    return _greedy(value, n[0, 0], total, low, high)


def cost_aware(sigma: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """sigma / sqrt(cost): least variance at a given total cost. Costs [k] are in any one unit; an unknown cost
    (NaN or <= 0) is the mean of the known ones."""
    known = np.isfinite(cost) & (cost > 0)
    mean = float(cost[known].mean()) if known.any() else 1.0
    return sigma / np.sqrt(np.where(known, cost, mean))


def gvm_weights(p: np.ndarray, gradient_norm: np.ndarray, alpha: float = 1e-3, beta: float = 2.0) -> np.ndarray:
    """GVM (2505.02391): G / sqrt(p + alpha / p^(beta-1)); 0 where p or G is 0. p is the pilots' raw accuracy,
    G the mean |s| over accepted pilots."""
    live = (p > 0) & (gradient_norm > 0)
    safe = np.where(live, p, 1.0)
    return np.where(live, gradient_norm / np.sqrt(safe + alpha / safe ** (beta - 1.0)), 0.0)


def _bounds(k: int, total: int, n_min: Bound, n_max: Bound) -> tuple[np.ndarray, np.ndarray]:
    low = np.broadcast_to(np.asarray(n_min, np.int64), (k,))
    high = np.broadcast_to(np.asarray(n_max, np.int64), (k,))
    if np.any(low > high) or not int(low.sum()) <= total <= int(high.sum()):
        raise ValueError(
            f"unsatisfiable allocation: {k} prompts can take {int(low.sum())} to {int(high.sum())} rollouts "
            f"(sums of n_min and n_max), not {total}"
        )
    return low, high


def _scale(w: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> float:
    """t with sum clip(t w, low, high) = total, w > 0: a binary search over the knots of the piecewise linear
    sum, each evaluated anew (running sums of slopes would cancel when weights span many decades)."""
    free = total / w.sum()
    if np.all(free * w >= low) and np.all(free * w <= high):  # no bound binds
        return float(free)
    knot = np.sort(np.concatenate([low / w, high / w]))
    left, right = 0, len(knot) - 1  # the sum is <= total at the left knot and >= total at the right one
    while right - left > 1:
        middle = (left + right) // 2
        if np.clip(knot[middle] * w, low, high).sum() <= total:
            left = middle
        else:
            right = middle
    grows = (low / w <= knot[left]) & (high / w >= knot[right])
    slope = w[grows].sum()
    filled = np.clip(knot[left] * w, low, high).sum()
    return float(min(knot[left] + (total - filled) / slope, knot[right])) if slope > 0 else float(knot[right])


def _greedy(value: np.ndarray, first: int, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Spend total - sum(low) units on the largest gains of ``value`` [k, n], whose column j is n = first + j and
    whose rows are concave. Ties go to the smaller n, then to the earlier prompt."""
    left = total - int(low.sum())
    gain = np.diff(value, axis=1)
    step = first + np.arange(gain.shape[1])[None, :]  # this gain raises n from step to step + 1
    allowed = (step >= low[:, None]) & (step < high[:, None])
    gain = np.where(allowed, np.minimum.accumulate(np.where(allowed, gain, np.inf), axis=1), -np.inf)
    chosen = np.argsort(-gain.T.ravel(), kind="stable")[:left]  # column by column: smaller n first
    return low + np.bincount(chosen % max(len(low), 1), minlength=len(low))


def _fill(values: np.ndarray, fallback: np.ndarray | float) -> np.ndarray:
    known = values[~np.isnan(values)]
    return np.where(np.isnan(values), known.mean() if len(known) else fallback, values)
