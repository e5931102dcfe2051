"""Trained rollouts as a table, for trackers that have tables."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from actors.cluster.adapters import answer
from cures_ray.config import Config
from cures_ray.data.table import PromptTable
from cures_ray.loop.ports import WorkerLost
from cures_ray.messages import TrainingBatch
from cures_ray.run.sinks import RunLog


async def show_rollouts(batch: TrainingBatch, *, config: Config, prompts: PromptTable, log: RunLog) -> None:
    """The first rollout of the first ``eval.logged_samples`` groups of ``batch``; of lost payloads nothing."""
    rows: list[dict[str, Any]] = []
    for group in batch.groups[: config.eval.logged_samples]:
        with suppress(WorkerLost):
            chunk = await answer(group.payload, "rollouts", config.rollout.timeout_s)
            row = int(group.rollout_index[0])
            rows.append(
                {
                    "lease": group.lease_id,
                    "prompt": prompts.row(int(chunk.prompt_index[group.place])).text,
                    "completion": chunk.texts[row],
                    "reward": float(group.rewards[0]),
                    "advantage": float(group.advantages[0]),
                    "version": int(chunk.summary.min_version[row]),
                }
            )
    log.rollouts(batch.step + 1, rows)
