"""Control: sigma as many samples would tell it. Whenever an allocation asks for the score moments of its prompts
(``curriculum.sigma: last_layer``, ALGORITHMS.md 1.5), they are measured on fresh rollouts of the current policy, free
of charge, instead of read from the cache of past training steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.inprocess.judges import Judge
from benchmarks.inprocess.local_learner import LocalLearner
from benchmarks.inprocess.sampler import Request, Sampler
from cures_ray.curriculum.belief import BeliefTable, ScoreMoments, moments_from
from cures_ray.curriculum.machine import Curriculum
from cures_ray.learning.gradient_norms import LastLayerStatistics
from cures_ray.learning.packing import Row, collate
from cures_ray.messages import PromptRow

SAMPLES = 64  # rollouts per prompt and plan
ROWS_PER_PASS = 512  # rollouts in one forward pass


class MeasuredMoments:
    """``BeliefTable.moments`` by sampling.

    Args:
        learner: whose policy is differentiated; with max_staleness 0 it is the one that is planned for.
        sampler: must hold the same weights.
    """

    def __init__(self, learner: LocalLearner, sampler: Sampler, judge: Judge, rows: Sequence[PromptRow]) -> None:
        self.learner, self.sampler, self.judge, self.rows = learner, sampler, judge, rows
        self.calls = 0

    def __call__(self, index: np.ndarray | Sequence[int]) -> ScoreMoments:
        """Moments [k] of the prompts ``index`` [k]."""
        self.calls += 1
        rate = self.learner.config.rollout.temperature
        statistics = LastLayerStatistics(rate, self.calls)
        drawn = self._sample(np.asarray(index, np.int64))
        for at in range(0, len(drawn), ROWS_PER_PASS):
            part = drawn[at : at + ROWS_PER_PASS]
            m = collate(part)
            row = torch.as_tensor(m.row)
            with torch.no_grad():
                _, _, hidden, residual = self.learner.policy(
                    torch.as_tensor(m.input_ids),
                    torch.as_tensor(m.row * m.input_ids.shape[1] + m.position),
                    torch.as_tensor(m.target),
                    rate,
                    1,
                    statistics.residual,
                )
            statistics.add(hidden, residual, row, [r.lease_id for r in part], [r.reward > 0.5 for r in part])
        return moments_from(statistics.result())

    def _sample(self, index: np.ndarray) -> list[Row]:
        """SAMPLES rows a prompt; the place in ``index`` is the lease id."""
        prompts = [self.rows[int(i)] for i in index]
        requests = [Request(p.token_ids, SAMPLES, (self.calls << 20) + k) for k, p in enumerate(prompts)]
        return [
            Row(
                lease_id=k,
                prompt=prompt.token_ids,
                completion=ids,
                logprobs=logprobs,
                reward=self.judge(text, prompt),
                advantage=0.0,
                weight=0.0,
            )
            for k, (prompt, group) in enumerate(zip(prompts, self.sampler.sample(requests), strict=True))
            for ids, logprobs, _, text in group
        ]


def install(curriculum: Curriculum, measured: MeasuredMoments) -> None:
    """Let ``curriculum`` ask ``measured`` for moments.

    Raises:
        ValueError: its table keeps no moments (``curriculum.sigma`` is not ``last_layer``).
    """
    table: BeliefTable = curriculum.pool.belief
    if table.gradients is None:
        raise ValueError("the sigma oracle needs curriculum.sigma = last_layer")
    table.moments = measured  # type: ignore[method-assign]
