"""Prompts whose rows are made once, and the exact accuracy of a model on them."""

from __future__ import annotations

import numpy as np

from benchmarks.inprocess.sampler import Sampler
from cures_ray.data.table import PromptTable
from cures_ray.messages import PromptRow
from cures_ray.synthetic.tasks import TASKS


class RowCache:
    """A prompt source whose rows are made once: tokenizing again at every lease would be most of the time."""

    def __init__(self, table: PromptTable) -> None:
        self.all = table.rows(np.arange(len(table)))
        self.levels, self.ids = table.levels, table.ids

    def __len__(self) -> int:
        return len(self.all)

    def row(self, index: int) -> PromptRow:
        return self.all[index]

    def rows(self, index: np.ndarray, *, tokenize: bool = True) -> list[PromptRow]:
        return [self.all[i] for i in index.tolist()]


class ExactAccuracy:
    """The exact accuracy of a task: the probability of the one right completion up to what closes its box or function,
    without sampling noise. What follows it is not judged, so a policy that no longer stops is as accurate."""

    def __init__(self, sampler: Sampler, rows: RowCache, task: str) -> None:
        self.sampler = sampler
        self.prompts = [row.token_ids for row in rows.all]
        texts = [TASKS[task].gold(row.text, row.answer) for row in rows.all]
        answers = sampler.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.answers = [np.array(ids, np.int32) for ids in answers]

    def __call__(self) -> np.ndarray:
        """float64 [prompts], under the sampler's current weights."""
        return self.sampler.probability(self.prompts, self.answers)
