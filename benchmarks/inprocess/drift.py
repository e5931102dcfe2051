"""SPO's policy drift, measured as in the authors' release: how far the policy has moved on a prompt's last response.

D = mean over the response's tokens of |log pi_then - log pi_now|, by one forward pass of the current policy over prompt
and response. It is charged like a prefill. The full system does not measure it and forgets at a constant rate
(curriculum.discount).
"""

from __future__ import annotations

import numpy as np

from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.sampler import Sampled, Sampler
from cures_ray.curriculum.machine import Curriculum
from cures_ray.messages import Lease, PromptRow


class DriftMeter:
    """Remembers the last trained response of every prompt."""

    def __init__(self, sampler: Sampler, rows: list[PromptRow], costs: Costs) -> None:
        self.sampler, self.rows, self.costs = sampler, rows, costs
        self._last: dict[int, Sampled] = {}  # prompt -> its last response
        self._prompt_of: dict[int, int] = {}  # lease -> prompt

    def measure(self, curriculum: Curriculum, leases: list[Lease]) -> None:
        """Tell the curriculum the drift of every leased prompt; 0 where this is its first response."""
        leases = [lease for lease in leases if lease.weight > 0]  # offline samples have no drift
        self._prompt_of |= {lease.lease_id: lease.prompt_index for lease in leases}
        index = [lease.prompt_index for lease in leases]
        known = [i for i in index if i in self._last]
        prompts, answers = [self.rows[i].token_ids for i in known], [self._last[i][0] for i in known]
        with self.costs.timed("drift"):
            now = self.sampler.token_logprobs(prompts, answers)
        drift = dict.fromkeys(index, 0.0)
        for i, prompt, logprobs in zip(known, prompts, now, strict=True):
            drift[i] = float(np.abs(self._last[i][1] - logprobs).mean())
            self.costs.generated(self.sampler.parameters, len(prompt) + len(logprobs), 0)
        if index:
            curriculum.pool.note_drift(np.array(list(drift)), np.array(list(drift.values())))

    def record(self, lease_id: int, rollouts: list[Sampled]) -> None:
        if lease_id in self._prompt_of:
            self._last[self._prompt_of.pop(lease_id)] = rollouts[-1]
