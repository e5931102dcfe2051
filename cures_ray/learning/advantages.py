"""Advantages of variable-size groups, and the loss weight of a token (ALGORITHMS.md 2 and 3).

A group is *all* rollouts of one prompt in the batch: whoever calls merges the leases of a prompt first.
``n_i`` differs between groups, so everything is a list of arrays; nothing is ever reshaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Groups = list[np.ndarray]  # one float array [n_i] a prompt
SMALLEST_STD = 0.25  # of a belief that scales an advantage: a surprise counts at most four times


def _raw(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """REINFORCE: A = r."""
    return [np.array(r) for r in rewards]


def _dr_grpo(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """Dr.GRPO (2503.20783): A = r - mean. Shrinks the gradient by (n-1)/n, by definition of the method."""
    return [r - r.mean() if len(r) else r for r in rewards]


def _grpo(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """GRPO (2402.03300): A = (r - mean) / (std + eps), std over the n rewards (divided by n)."""
    return [(r - r.mean()) / (r.std() + eps) if len(r) else r for r in rewards]


def _rloo(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """RLOO (2402.14740): r minus the mean of the others = n/(n-1) (r - mean). A lone rollout has no
    baseline and gets 0."""
    return [(r - r.mean()) * (len(r) / (len(r) - 1)) if len(r) > 1 else np.zeros_like(r) for r in rewards]


def _reinforce_pp(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """REINFORCE++ (2501.03262): rewards whitened over the global batch."""
    return _whiten(rewards, eps)


def _reinforce_pp_baseline(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """REINFORCE++-baseline: the group mean first, then whitening over the global batch."""
    return _whiten(_dr_grpo(rewards, alpha, beta, eps), eps)


def _posterior_loo(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """Posterior leave-one-out: b_j = (alpha0 + sum of the other rewards) / (alpha0 + beta0 + n - 1).

    ``alpha``, ``beta`` are the belief from *before* this step, so b_j does not depend on r_j: unbiased for
    every n, n = 1 included, and tends to RLOO as n grows (ALGORITHMS.md 3.2).
    """
    together, baseline, sizes = _loo_baseline(rewards, alpha, beta)
    return split(together - baseline, sizes)


def _posterior_centred(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """``_posterior_loo`` minus the mean of the batch's other advantages. Beliefs lag behind a policy that improves:
    without this the mean advantage stays positive, which rewards whatever was sampled and costs entropy."""
    return _centred(_posterior_loo(rewards, alpha, beta, eps))


def _posterior_std(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """``_posterior_loo`` over the standard deviation that the same belief expects, sqrt(b_j (1 - b_j)), at least
    SMALLEST_STD, then centred: rare outcomes count more, as under GRPO, but the scale does not depend on r_j and one
    rollout is enough."""
    together, baseline, sizes = _loo_baseline(rewards, alpha, beta)
    b = np.clip(baseline, 0.0, 1.0)  # a penalty can take it out of the belief's range
    scaled = (together - baseline) / np.maximum(np.sqrt(b * (1.0 - b)), SMALLEST_STD)
    return _centred(split(scaled, sizes))


def _raft_pp(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """RAFT++ (2504.11343): only correct rollouts (r > 0.5), A = r."""
    return [np.where(r > 0.5, r, 0.0) for r in rewards]


def _posterior_whitened(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """SPO (2509.13232): ``_posterior_loo`` whitened over the batch."""
    return _whiten(_posterior_loo(rewards, alpha, beta, eps), eps)


def _shrinkage(rewards: Groups, alpha: np.ndarray, beta: np.ndarray, eps: float) -> Groups:
    """James-Stein shrinkage (2511.03710): b_ij = (1 - lambda_i) mean of the prompt's other rollouts + lambda_i mean of
    the other prompts' means, lambda_i = v / (v + t) with v the variance of the first within prompts and t the variance
    of accuracies between prompts, both from the other prompts alone: b_ij knows neither r_ij nor its size."""
    sizes = np.array([len(r) for r in rewards])
    if len(rewards) < 2 or not sizes.all():
        return _rloo(rewards, alpha, beta, eps)
    means = np.array([r.mean() for r in rewards])
    within = np.array([r.var(ddof=1) if len(r) > 1 else np.nan for r in rewards])
    result = []
    for i, r in enumerate(rewards):
        others = np.delete(means, i)
        known = np.delete(within, i)
        sample = float(np.nanmean(known)) if np.isfinite(known).any() else float(others.mean() * (1 - others.mean()))
        between = others.var(ddof=1) if len(others) > 1 else 0.0
        t = max(between - sample * float((1 / np.delete(sizes, i)).mean()), 0.0)  # the means' own noise aside
        if len(r) == 1:
            result.append(r - others.mean())
            continue
        v = sample / (len(r) - 1)
        share = v / (v + t) if v + t > 0 else 1.0
        result.append(r - (1 - share) * (r.sum() - r) / (len(r) - 1) - share * others.mean())
    return result


ADVANTAGES: dict[str, Callable[[Groups, np.ndarray, np.ndarray, float], Groups]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "posterior_loo": _posterior_loo,
    "posterior_centred": _posterior_centred,
    "posterior_std": _posterior_std,
    "posterior_whitened": _posterior_whitened,
    "posterior_token_whitened": _posterior_loo,  # and whitened over tokens by compute_advantages
    "shrinkage": _shrinkage,
    "raft_pp": _raft_pp,
}

# Advantages that end in a batch whitening, and what they are before it. With `algo.kl_in_reward` the learner
# subtracts the KL reward-to-go from these and whitens over all tokens of the batch (losses.token_advantages).
BEFORE_WHITENING = {"reinforce_pp": _raw, "reinforce_pp_baseline": _dr_grpo}


def compute_advantages(
    name: str,
    rewards: Sequence[np.ndarray],
    alpha: np.ndarray,
    beta: np.ndarray,
    std_eps: float = 1e-6,
    *,
    whiten: bool = True,
    lengths: Sequence[np.ndarray] | None = None,
) -> Groups:
    """Advantages of g groups: ``rewards`` [n_i] each, ``alpha`` and ``beta`` [g] the Beta belief before the step.

    ``whiten=False`` leaves out the final batch whitening of REINFORCE++ and its -baseline. ``lengths``: tokens of the
    rollouts [n_i] each, which ``posterior_token_whitened`` needs.
    Raises KeyError for an unknown name (the configuration admits none).
    """
    function = ADVANTAGES[name] if whiten else BEFORE_WHITENING.get(name, ADVANTAGES[name])
    advantages = function([np.asarray(r, np.float64) for r in rewards], alpha, beta, std_eps)
    if name == "posterior_token_whitened" and lengths is not None:
        return _token_whitened(advantages, lengths, std_eps)
    return advantages


def token_weights(
    loss_length: str, prompt_weights: np.ndarray, lengths: Sequence[np.ndarray], max_new_tokens: int
) -> Groups:
    """The loss weight of each token of each rollout, W_i c_i / (m n_i L): one array [n_i] a prompt.

    ``prompt_weights`` [g] is W_i c_i / m (Lease.weight), ``lengths`` the completion lengths of the n_i trained
    rollouts of each prompt. L by ``loss_length``:

    - constant: ``max_new_tokens`` (Dr.GRPO; unbiased in length),
    - sequence: the rollout's own length (GRPO),
    - token: one L for the whole batch, its mean completion length with each prompt at its weight. At equal
      n_i this is DAPO's mean over all tokens; at unequal n_i a prompt still counts W_i and not n_i.
    """
    share = [w / max(len(n), 1) for w, n in zip(prompt_weights, lengths, strict=True)]  # W_i c_i / (m n_i)
    if loss_length == "constant":
        return [np.full(len(n), s / max_new_tokens) for s, n in zip(share, lengths, strict=True)]
    if loss_length == "sequence":
        return [s / np.maximum(n, 1) for s, n in zip(share, lengths, strict=True)]
    if loss_length == "token":
        total = sum(s * float(n.sum()) for s, n in zip(share, lengths, strict=True))
        trained = sum(float(w) for w, n in zip(prompt_weights, lengths, strict=True) if len(n))
        mean_length = max(total / trained, 1.0) if trained > 0 else 1.0
        return [np.full(len(n), s / mean_length) for s, n in zip(share, lengths, strict=True)]
    raise ValueError(f"unknown loss_length {loss_length!r}: constant, sequence or token")


def overlong_penalty(lengths: np.ndarray, max_new_tokens: int, penalty_tokens: int) -> np.ndarray:
    """DAPO's soft overlong punishment (2503.14476, eq. 13), in [-1, 0], added to the reward: falls linearly
    over the last ``penalty_tokens`` tokens before ``max_new_tokens``; 0 tokens switch it off."""
    if not penalty_tokens:
        return np.zeros(len(lengths))
    return -np.clip((lengths - (max_new_tokens - penalty_tokens)) / penalty_tokens, 0.0, 1.0)


def _centred(values: Groups) -> Groups:
    """Each value minus the mean of the others, over all rollouts of the batch."""
    together = np.concatenate(values) if values else np.zeros(0)
    if len(together) < 2:
        return values
    mean, scale = together.mean(), len(together) / (len(together) - 1)
    return [(v - mean) * scale for v in values]


def _token_whitened(values: Groups, lengths: Sequence[np.ndarray], eps: float) -> Groups:
    """SPO++ (2608.24870): whitened over the batch's action tokens, each of which has its rollout's advantage."""
    together, tokens = np.concatenate([*values, np.zeros(0)]), np.concatenate([*lengths, np.zeros(0)])
    if not tokens.sum():
        return values
    mean = np.average(together, weights=tokens)
    std = np.sqrt(np.average(np.square(together - mean), weights=tokens))
    return [(v - mean) / (std + eps) for v in values]


def _whiten(values: Groups, eps: float) -> Groups:
    """(A - mean) / (std + eps) over all rollouts of the batch."""
    together = np.concatenate(values) if values else np.zeros(0)
    if not len(together):
        return values
    mean, std = together.mean(), together.std()
    return [(v - mean) / (std + eps) for v in values]


def _loo_baseline(rewards: Groups, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, Sequence[int]]:
    """All rewards [R] in one array, b_j of each [R], and the groups' sizes. One array for the batch: groups are small
    and many, and a NumPy call for each costs the driver more than the rest of its step."""
    sizes = [len(r) for r in rewards]
    owner = np.repeat(np.arange(len(sizes)), np.array(sizes, np.int64))
    together = np.concatenate([*rewards, np.zeros(0)])
    others = np.bincount(owner, together, len(sizes))[owner] - together
    counts = np.array(sizes, np.float64)[owner]
    return together, (alpha[owner] + others) / (alpha[owner] + beta[owner] + counts - 1), sizes


def split(values: np.ndarray, sizes: Sequence[int] | np.ndarray) -> Groups:
    """``values`` [sum of sizes] cut into pieces of these sizes."""
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [values[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
