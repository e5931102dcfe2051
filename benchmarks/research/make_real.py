"""What ``make real`` gave, as a result file: accuracy by task before and after, seconds, CPU seconds of each role.

    make real
    python -m actors.commands.real --dir runs/real32 learner.dtype=float32
    python -m benchmarks.research.make_real runs/real runs/real32

Writes benchmarks/results/make_real.json, one row a folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.results_file import write_result

KEPT = ("held_out_accuracy_before", "held_out_accuracy_after", "best_constant_accuracy", "by_level", "trained",
        "seconds_start", "seconds_training", "seconds", "cpu_seconds")  # fmt: skip


def row_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    dtype = json.loads((folder / "run" / "run.json").read_text())["config"]["learner"]["dtype"]
    accuracy = {str(e["version"]): e["eval/greedy_accuracy"] for e in summary["evaluations"]}
    rate = summary["trained"] / summary["seconds_training"]
    return {"learner_dtype": dtype, "rollouts_per_s": rate, "accuracy": accuracy, **{k: summary[k] for k in KEPT}}


def main(argv: list[str]) -> int:
    rows = [row_of(Path(folder)) for folder in argv or ["runs/real"]]
    figures = {f"{row['learner_dtype']}_{name}": row[name] for row in rows for name in (*KEPT[:3], "rollouts_per_s")}
    print(write_result("make_real", figures, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
