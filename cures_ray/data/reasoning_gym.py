"""Prompts of the package ``reasoning-gym``: procedural tasks with their own scorers (``data.train: reasoning-gym``).

    data.reasoning_gym.tasks --this process--> JSON --> python -m cures_ray.data.reasoning_gym --> JSON lines

They are made in a process of its own with a fixed PYTHONHASHSEED: some of the package's tasks walk over sets, so that
the same seed gives other prompts in every process otherwise. ``cures_ray/verify/reasoning_gym.py`` makes an entry again
from (task, parameters, seed, index) to score an answer, under the same hash seed.

Held-out prompts come from their own stream of seeds, and a training prompt is never the text of a held-out one, so the
held-out set does not change with the training set's size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import DataConfig, ReasoningGymConfig, ReasoningGymTask
from cures_ray.messages import ConfigError

SOURCE = "reasoning-gym"  # the value of data.train and data.eval
SIZE = 10_000  # entries of one of the package's data sets; some make a table of that size at the start
SEED_STRIDE = 1_000_003  # between two data sets of a stream: entry i of a data set is drawn from seed + i
HELD_OUT = 500_000_000  # added to the seed of the held-out stream
MISSES = 200  # draws without a new prompt, per wanted one, until a task is called exhausted
BALANCE_FROM = 4  # balanced tasks: candidates per wanted prompt
Row = dict[str, Any]


def generated_rows(config: DataConfig, which: str) -> Iterator[list[Row]]:
    """The rows of ``data.reasoning_gym``: prompt, answer, level (the task's label), data_source, difficulty,
    reasoning_gym (task, params, seed, index, partial_credit).

    Raises:
        ConfigError: no tasks, the package is missing, an unknown task or parameter, or a task without enough prompts.
    """
    gym = config.reasoning_gym
    if not gym.tasks:
        raise ConfigError(f"data.{which} = {SOURCE}, but data.reasoning_gym.tasks is empty; see configs/")
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
    }
    request = json.dumps({"which": which, "config": gym.model_dump()})
    done = subprocess.run(
        [sys.executable, "-m", "cures_ray.data.reasoning_gym"],
        input=request,
        capture_output=True,
        text=True,
        env=environment,
        timeout=3600,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise ConfigError(f"data.{which} = {SOURCE}: {last}")
    yield [json.loads(line) for line in done.stdout.splitlines()]


def identity(row: Row) -> str:
    """What a prompt's id is the hash of: task, parameters, seed, index."""
    made = row["reasoning_gym"]
    return json.dumps([SOURCE, made["task"], made["params"], made["seed"], made["index"]], sort_keys=True)


def tags_of(row: Row) -> str:
    """Words for the difficulty predictor: the task's parameters in this row; "" for rows of other sources."""
    difficulty = row.get("difficulty")
    if "reasoning_gym" not in row or not isinstance(difficulty, dict):
        return ""
    return " ".join(f"{name}={value}" for name, value in difficulty.items())


# What follows runs in the process of its own.


def make(config: ReasoningGymConfig, which: str) -> list[Row]:
    """All rows of ``which`` (train or eval), in random order."""
    eval_counts, train_counts = (shares(config, n) for n in (config.eval_size, config.train_size))
    seen: set[str] = set()
    rows: list[Row] = []
    for task, wanted in zip(config.tasks, eval_counts, strict=True):
        rows += _draw(task, wanted, config, config.seed + HELD_OUT, seen)
    if which == "train":
        rows = []
        for task, wanted in zip(config.tasks, train_counts, strict=True):
            rows += _draw(task, wanted, config, config.seed, seen)
    return [rows[i] for i in np.random.default_rng(config.seed).permutation(len(rows))]


def shares(config: ReasoningGymConfig, total: int) -> list[int]:
    """``total`` prompts over the tasks by weight; largest remainders get the rest."""
    weights = np.array([task.weight for task in config.tasks])
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]:
        counts[i] += 1
    return counts.tolist()


def _draw(task: ReasoningGymTask, wanted: int, config: ReasoningGymConfig, seed: int, seen: set[str]) -> list[Row]:
    """``wanted`` prompts that are not in ``seen``, which they join."""
    pool = BALANCE_FROM * wanted if task.balance_answers else wanted
    rows: list[Row] = []
    misses = 0
    for dataset_seed, index, entry in _entries(task, seed):
        if len(rows) >= pool or misses > MISSES * max(wanted, 10):
            break
        if entry["question"] in seen:
            misses += 1
            continue
        seen.add(entry["question"])
        rows.append(_row(task, config, dataset_seed, index, entry))
    chosen = _balanced(rows, wanted) if task.balance_answers else rows
    if len(chosen) < wanted:
        sys.exit(
            f"task {task.name} with {task.params} has no {wanted} distinct prompts beside those of the other tasks and "
            f"splits ({len(chosen)} found); lower its weight or the sizes, or widen its parameters"
        )
    return chosen


def _entries(task: ReasoningGymTask, seed: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    while True:
        dataset = dataset_of(task.name, task.params, seed)
        for index in range(SIZE):
            yield seed, index, dataset[index]
        seed += SEED_STRIDE


def dataset_of(name: str, params: dict[str, Any], seed: int) -> Any:
    """One of the package's data sets.

    Raises:
        ValueError: unknown task. TypeError, AssertionError: unknown or impossible parameters.
    """
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=SIZE, **params)


def _row(task: ReasoningGymTask, config: ReasoningGymConfig, seed: int, index: int, entry: dict[str, Any]) -> Row:
    metadata = entry["metadata"]
    ranges = metadata.get("difficulty")
    difficulty = {}
    for name, spread in ranges.items() if isinstance(ranges, dict) else ():
        value = metadata.get(name, spread)  # this prompt's value, else the range that it is drawn from
        if isinstance(value, int | float | str) and len(str(value)) <= 24:
            difficulty[str(name)] = value
    return {
        "prompt": entry["question"],
        "answer": "" if entry["answer"] is None else str(entry["answer"]),  # some tasks are judged by rule alone
        "level": task.label or task.name,
        "data_source": f"{SOURCE}/{task.name}",
        "difficulty": difficulty,
        "reasoning_gym": {
            "task": task.name,
            "params": task.params,
            "seed": seed,
            "index": index,
            "partial_credit": config.partial_credit,
        },
    }


def _balanced(rows: list[Row], wanted: int) -> list[Row]:
    """Up to ``wanted`` rows with the answers in equal shares, as far as there are enough of each."""
    by_answer: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_answer[row["answer"]].append(row)
    piles = list(by_answer.values())
    chosen: list[Row] = []
    depth = 0
    while len(chosen) < wanted and any(len(pile) > depth for pile in piles):
        chosen += [pile[depth] for pile in piles if len(pile) > depth]
        depth += 1
    return chosen[:wanted]


def main() -> None:
    request = json.loads(sys.stdin.read())
    config = ReasoningGymConfig.model_validate(request["config"])
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        sys.exit(f"the package reasoning-gym cannot be imported ({error}); pip install 'cures-ray[reasoning-gym]'")
    unknown = [task.name for task in config.tasks if task.name not in DATASETS]
    if unknown:
        sys.exit(f"reasoning-gym has no task {', '.join(unknown)}; it has {', '.join(sorted(DATASETS))}")
    try:
        rows = make(config, request["which"])
    except (TypeError, ValueError, AssertionError) as error:
        sys.exit(f"the parameters of a task are refused: {error}")
    sys.stdout.write("".join(json.dumps(row, default=str) + "\n" for row in rows))


if __name__ == "__main__":
    main()
