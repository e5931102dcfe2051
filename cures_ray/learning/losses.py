"""Policy losses as sums of weighted tokens (ALGORITHMS.md 3.1 and 4).

``loss = sum_t weight_t * term_t`` with the weights of ``advantages.token_weights``, which already hold
1/(m n_i L) of the *global* batch: micro-batches and ranks are added, never averaged, and a masked token
keeps its place in the denominator.

Three policies: theta (now, with gradient), prox (theta before this batch's first update), behaviour (what the
engine sampled from, any staleness and engine mismatch included). Each loss corrects for the distance between
theta and behaviour exactly once:

    loss        factor with a gradient or a clip           detached weight (algo.is_correction)
    clip        PPO, ratio theta/behaviour                 none: the ratio is the correction
    decoupled   PPO, ratio theta/prox (2505.24298)         prox/behaviour, whole | tis | mis
    cispo       log-prob (2506.13585)                      min(theta/behaviour, 1 + clip_eps_high)
    gspo        sequence ratio theta/behaviour (2507.18071)  none: the ratio is the correction
    reinforce   log-prob                                   theta/behaviour: none = 1 | tis | mis

tis truncates the weight at ``is_cap``; mis gives weight 0 to tokens outside [1/is_cap, is_cap].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cures_ray.config import AlgoConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """N completion tokens of one micro-batch, flat; every log-probability at the sampling temperature."""

    logprobs: Tensor  # [N] theta, with gradient
    behaviour: Tensor  # [N] of the engine that sampled
    prox: Tensor | None  # [N] before the first update of this batch; None: theta itself, detached
    reference: Tensor | None  # [N] frozen reference policy, for KL in the loss
    advantages: Tensor  # [N]
    weights: Tensor  # [N]
    row: Tensor  # int64 [N] rollout of each token, 0 .. rollouts - 1
    rollouts: int


@dataclass(frozen=True, slots=True)
class Terms:
    """Per token: the objective (to be maximised), whether it is clipped, and the ratio theta/behaviour."""

    objective: Tensor  # [N]
    clipped: Tensor  # bool [N]: no gradient reaches theta through this token
    ratio: Tensor  # [N], detached


def _clip(x: LossInputs, algo: AlgoConfig) -> Terms:
    ratio = torch.exp(x.logprobs - x.behaviour)
    objective, clipped = _ppo(ratio, x.advantages, algo)
    return Terms(objective, clipped, ratio.detach())


def _decoupled(x: LossInputs, algo: AlgoConfig) -> Terms:
    prox = x.logprobs.detach() if x.prox is None else x.prox
    correction = torch.exp(prox - x.behaviour)
    weight = correction if algo.is_correction == "none" else _corrected(correction, algo)
    objective, clipped = _ppo(torch.exp(x.logprobs - prox), x.advantages, algo)
    return Terms(weight * objective, clipped | (weight == 0), torch.exp(x.logprobs.detach() - x.behaviour))


def _cispo(x: LossInputs, algo: AlgoConfig) -> Terms:
    ratio = torch.exp(x.logprobs.detach() - x.behaviour)
    weight = ratio.clamp(max=1 + algo.clip_eps_high)
    return Terms(weight * x.advantages * x.logprobs, torch.zeros_like(ratio, dtype=torch.bool), ratio)


def _gspo(x: LossInputs, algo: AlgoConfig) -> Terms:
    """The geometric mean of a rollout's token ratios, at each of its tokens."""
    difference = x.logprobs - x.behaviour
    zeros = difference.new_zeros(x.rollouts)
    length = zeros.index_add(0, x.row, torch.ones_like(difference)).clamp(min=1)
    ratio = torch.exp(zeros.index_add(0, x.row, difference) / length)[x.row]
    objective, clipped = _ppo(ratio, x.advantages, algo)
    return Terms(objective, clipped, torch.exp(difference.detach()))


def _reinforce(x: LossInputs, algo: AlgoConfig) -> Terms:
    ratio = torch.exp(x.logprobs.detach() - x.behaviour)
    weight = torch.ones_like(ratio) if algo.is_correction == "none" else _corrected(ratio, algo)
    return Terms(weight * x.advantages * x.logprobs, weight == 0, ratio)


LOSSES: dict[str, Callable[[LossInputs, AlgoConfig], Terms]] = {
    "clip": _clip,
    "decoupled": _decoupled,
    "cispo": _cispo,
    "gspo": _gspo,
    "reinforce": _reinforce,
}


def policy_loss(x: LossInputs, algo: AlgoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch and its metric sums, all 0-dimensional.

    Keys: ``loss``, ``tokens``, ``clipped``, ``ratio``, ``kl`` (k3 to the reference), ``logprob_diff``
    (|theta - behaviour|) are sums over tokens; those that start with ``max_`` are maxima.
    """
    terms = LOSSES[algo.loss](x, algo)
    loss = -(x.weights * terms.objective).sum()
    kl = torch.zeros_like(x.behaviour)
    if x.reference is not None:
        kl = k3(x.logprobs, x.reference)
        if algo.kl_coef and not algo.kl_in_reward:
            loss = loss + algo.kl_coef * (x.weights * kl).sum()
    difference = (x.logprobs.detach() - x.behaviour).abs()
    unit = loss.detach().new_ones(())
    sums = {
        "loss": loss.detach(),
        "tokens": unit * len(difference),
        "clipped": terms.clipped.sum() * unit,
        "ratio": terms.ratio.sum(),
        "kl": kl.detach().sum(),
        "logprob_diff": difference.sum(),
        "max_ratio": terms.ratio.max(),
        "max_logprob_diff": difference.max(),
    }
    return loss, sums


class SampledLogprobs(torch.autograd.Function):
    """(logits [N, V], target [N], temperature) -> log-probabilities [N], entropies [N], probabilities [N, V].

    Only the first has a gradient, (onehot - p) / temperature per token. The probabilities are what the backward
    pass keeps anyway, so the gradient statistics (gradient_norms.py) get them for nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        scaled = logits.float() / temperature
        normaliser = torch.logsumexp(scaled, 1)
        logprobs = scaled.gather(1, target[:, None]).squeeze(1) - normaliser
        probs = torch.exp(scaled - normaliser[:, None])
        entropy = normaliser - torch.linalg.vecdot(probs, scaled)
        ctx.save_for_backward(probs, target)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy, probs)
        return logprobs, entropy, probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probs, target = ctx.saved_tensors
        scale = (gradients[0] / ctx.temperature)[:, None]
        residual = -scale * probs
        residual.scatter_add_(1, target[:, None], scale)
        return residual.to(ctx.dtype), None, None


def mean_metrics(reports: list[dict[str, float]]) -> dict[str, float]:
    """From the sums of ``policy_loss`` of each update on a batch to means over tokens and updates. The distance to
    the sampler is that before the first update."""
    first = reports[0]
    tokens = max(1.0, sum(r["tokens"] for r in reports))
    return {
        "loss": sum(r["loss"] for r in reports) / len(reports),
        "grad_norm": reports[-1]["grad_norm"],
        "lr": reports[-1]["lr"],
        "kl": sum(r["kl"] for r in reports) / tokens,
        "entropy": sum(r["entropy"] for r in reports) / tokens,
        "clip_fraction": sum(r["clipped"] for r in reports) / tokens,
        "is_ratio": sum(r["ratio"] for r in reports) / tokens,
        "is_ratio_max": max(r["max_ratio"] for r in reports),
        "logprob_diff": first["logprob_diff"] / max(1.0, first["tokens"]),
        "logprob_diff_max": first["max_logprob_diff"],
    }


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(theta || reference) per token: exp(d) - d - 1, d = reference - theta."""
    d = reference - logprobs
    return torch.exp(d) - d - 1


def token_advantages(advantages: Tensor, kl: Tensor, row: Tensor, position: Tensor, kl_coef: float) -> Tensor:
    """KL in the reward (REINFORCE++): A_t = A - kl_coef * (sum of k1 from t to the end of the rollout).

    All [N]; ``kl`` = log pi_behaviour - log pi_reference of the sampled token (k1). Tokens of a row are
    contiguous and ordered by ``position``. Whiten afterwards over the global batch with ``whitened``.
    """
    order = torch.arange(len(row), device=row.device)
    if len(order) and not bool(((row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (position[1:] > position[:-1]))).all()):
        raise ValueError("token_advantages: tokens must be ordered by row, then position")
    total = torch.cumsum(kl.double(), 0)
    last = torch.searchsorted(row, row, right=True) - 1  # the last token of each token's row
    to_go = total[last] - total + kl.double()
    return (advantages.double() - kl_coef * to_go).to(advantages.dtype)


def whitened(advantages: Tensor, sums: Tensor, eps: float) -> Tensor:
    """(A - mean) / (std + eps) with ``sums`` [3] = (count, sum, sum of squares) over the global batch."""
    count, total, squares = sums
    mean = total / count.clamp(min=1)
    std = (squares / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
    return ((advantages - mean) / (std + eps)).to(advantages.dtype)


def _ppo(ratio: Tensor, advantages: Tensor, algo: AlgoConfig) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A), and where the clip is what counts."""
    plain = ratio * advantages
    limited = ratio.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high) * advantages
    return torch.minimum(plain, limited), (limited < plain).detach()


def _corrected(ratio: Tensor, algo: AlgoConfig) -> Tensor:
    if algo.is_correction == "tis":
        return ratio.clamp(max=algo.is_cap)
    return torch.where((ratio <= algo.is_cap) & (ratio >= 1 / algo.is_cap), ratio, torch.zeros_like(ratio))
