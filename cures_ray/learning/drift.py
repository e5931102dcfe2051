"""SPO's drift (2509.13232): how far the policy has moved on a prompt's last response.

    rows of a step --prompt--> its last response --one forward pass--> mean over tokens of |log pi_then - log pi_now|

Measured by the learner before it updates, on the responses that it trained last; a rank knows those that it computed
itself. A prompt without one is not in the answer, and the belief then forgets at a constant rate
(``curriculum.discount``). Responses are not in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from cures_ray.learning.packing import MicroBatch, Row, collate, pack


class LastResponses:
    """The last response of every prompt of this rank.

    Args:
        max_tokens: of a micro-batch.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._last: dict[bytes, Row] = {}  # by the prompt's tokens

    def follow(
        self,
        rows: list[Row],
        logprobs: Callable[[MicroBatch], Tensor],
        most: Callable[[float], float],
    ) -> tuple[dict[int, float], int]:
        """Drift in nats a token by lease, of the prompts of ``rows`` that have a last response, and the tokens that
        were computed for it. ``rows`` become the last responses.

        Args:
            logprobs: of a micro-batch's completion tokens [N] under the policy of now. A collective.
            most: the largest value over ranks, so that all make as many passes. A collective.
        """
        known = {row.lease_id: self._last[key] for row in rows if (key := row.prompt.tobytes()) in self._last}
        self._last |= {row.prompt.tobytes(): row for row in rows}
        leases, last = list(known), list(known.values())
        tokens = np.array([len(row.prompt) + len(row.completion) for row in last], np.int64)
        plan = pack(tokens, 1, self.max_tokens)[0] if last else []
        drift: dict[int, float] = {}
        for i in range(int(most(float(len(plan))))):
            chosen = plan[i].tolist() if i < len(plan) else []
            micro = collate([last[k] for k in chosen])
            now = logprobs(micro).float().cpu().numpy()
            moved = np.abs(now - micro.behaviour)
            if chosen:
                sums, counts = np.bincount(micro.row, moved), np.bincount(micro.row)
                drift |= {leases[k]: float(s / n) for k, s, n in zip(chosen, sums, counts, strict=True)}
        return drift, int(tokens.sum())
