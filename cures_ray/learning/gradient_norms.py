"""Gradient statistics of the output layer, from the training pass itself (ALGORITHMS.md 1.5, eq. 21).

The gradient of log pi(y_t | ...) with respect to the output layer's weight is (e_t h_t^T) / T, with h the last
hidden state [d], e = onehot(y_t) - softmax(logits / T) [V] and T the sampling temperature. So the score of a
rollout, s_j = sum_t e_t h_t^T / T, needs no backward pass:

    |s_j|^2 = sum_{t,u} (h_t . h_u)(e_t . e_u) / T^2 = ((H H^T) o (E E^T)).sum() / T^2

and the class sums of a lease (over its correct, over its other rollouts) are matrices H^T E / T [d, V] that
add up over micro-batches; their squared norms and dot product are what a lease reports. All rollouts of a
lease must therefore be on one rank (packing.pack, ``together``), in any micro-batches.

When d * V is large, e is replaced by a count sketch of K entries: each token id gets a random sign and the
ids equal modulo K share an entry. The sketch keeps inner products in expectation, with relative error
about sqrt(2 / K), far below the sampling error of a few rollouts. One class matrix is then at most
MAX_CLASS_ENTRIES floats.

With tied embeddings this is the gradient through the output path only: the statistic is defined so, because
the path through the input embedding would need the backward pass.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from cures_ray.messages import GradientStatistics

MAX_CLASS_ENTRIES = 2**20  # floats of one class matrix [d, K]: 4 MiB
MIN_SKETCH = 64


class LastLayerStatistics:
    """Accumulates the statistics of one optimizer step on one rank."""

    def __init__(self, temperature: float = 1.0, seed: int = 0) -> None:
        self._temperature, self._seed = temperature, seed
        self._sign: Tensor | None = None  # [V] of the sketch; None while exact
        self._classes: dict[int, list[Tensor | None]] = {}  # lease -> [minus, plus] class sums [d, K]
        self._squares: dict[int, list[float]] = {}  # lease -> [minus, plus] sums of |s_j|^2
        self._counts: dict[int, list[int]] = {}

    @torch.no_grad()
    def residual(self, probs: Tensor, target: Tensor, d: int) -> Tensor:
        """e = onehot(target) - probs of N tokens, float32 [N, V], or its sketch [N, K] when d * V is large."""
        n, vocabulary = probs.shape
        token = torch.arange(n, device=probs.device)
        k = max(MIN_SKETCH, MAX_CLASS_ENTRIES // d)
        if vocabulary <= k:
            e = -probs.float()
            e[token, target] += 1
            return e
        if self._sign is None:
            generator = torch.Generator().manual_seed(self._seed)
            sign = torch.randint(0, 2, (vocabulary,), generator=generator) * 2 - 1
            self._sign = sign.to(device=probs.device, dtype=torch.float32)
        signed = torch.nn.functional.pad(probs.float() * self._sign, (0, -vocabulary % k))
        e = -signed.view(n, -1, k).sum(1)
        e[token, target % k] += self._sign[target]
        return e

    @torch.no_grad()
    def add(self, hidden: Tensor, residual: Tensor, row: Tensor, leases: list[int], plus: list[bool]) -> None:
        """One micro-batch: N completion tokens of B rollouts.

        Args:
            hidden: [N, d] inputs of the output layer.
            residual: [N, K] of ``residual``.
            row: int64 [N], ascending: the tokens of a rollout are contiguous.
            leases, plus: [B] lease and class (reward > 0.5) of each rollout.
        """
        h, e = hidden.detach().float(), residual
        lengths = torch.bincount(row, minlength=len(leases)).tolist()
        starts = [0, *accumulate(lengths)]
        classes: dict[tuple[int, bool], list[slice]] = {}
        norms = []
        for i, (lease, is_plus) in enumerate(zip(leases, plus, strict=True)):
            tokens = slice(starts[i], starts[i + 1])
            norms.append(((h[tokens] @ h[tokens].T) * (e[tokens] @ e[tokens].T)).sum())
            classes.setdefault((lease, is_plus), []).append(tokens)
        for lease, is_plus, norm in zip(leases, plus, torch.stack(norms).tolist(), strict=True):
            self._squares.setdefault(lease, [0.0, 0.0])[is_plus] += norm
            self._counts.setdefault(lease, [0, 0])[is_plus] += 1
        for (lease, is_plus), parts in classes.items():
            total = torch.cat([h[p] for p in parts]).T @ torch.cat([e[p] for p in parts])
            sums = self._classes.setdefault(lease, [None, None])
            before = sums[is_plus]
            sums[is_plus] = total if before is None else before.add_(total)

    def result(self) -> tuple[GradientStatistics, ...]:
        """One entry a lease, in order of the lease ids."""
        scale = 1.0 / self._temperature**2
        entries = []
        for lease in sorted(self._classes):
            minus, plus = self._classes[lease]
            entries.append(
                GradientStatistics(
                    lease_id=lease,
                    n_plus=self._counts[lease][1],
                    n_minus=self._counts[lease][0],
                    sum_sq_plus=scale * self._squares[lease][1],
                    sum_sq_minus=scale * self._squares[lease][0],
                    sq_sum_plus=scale * _dot(plus, plus),
                    sq_sum_minus=scale * _dot(minus, minus),
                    dot=scale * _dot(plus, minus),
                )
            )
        return tuple(entries)


def _dot(a: Tensor | None, b: Tensor | None) -> float:
    return 0.0 if a is None or b is None else float((a * b).sum())
