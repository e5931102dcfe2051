"""``make demo``: base model, training, evaluation, summary and picture, on one CPU machine in minutes.

python -m actors.commands.demo [--seed 0] [--dir runs/demo] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from actors.commands.cli import main as cures
from actors.commands.ending import finish
from cures_ray.config_load import load_config
from cures_ray.messages import RunError
from cures_ray.run.folder import Lock

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m actors.commands.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of base model, data and training")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        demo(args.seed, args.dir, args.config, args.overrides)
    except RunError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demo(seed: int, folder: Path, config_path: Path, overrides: list[str]) -> dict[str, object]:
    """Make the base model, train it, and leave ``summary.json`` and ``accuracy.png`` in ``folder``."""
    began = time.monotonic()
    base = folder / "base"
    if folder.exists():
        Lock(folder / "lock").release()  # not under a run that is using it
        print(f"demo: {folder} is made anew")
        shutil.rmtree(folder)
    print(f"demo: a small base model and its task, seed {seed} -> {base}", flush=True)
    if cures(["prepare", "--out", str(base), "--task", "chain", "--seed", str(seed)]) != 0:
        raise RunError("cures prepare failed; its message is above")
    setup = time.monotonic() - began

    from actors.cluster.launch import train  # late: imports Ray, vLLM and DeepSpeed

    places = [
        f"model.path={base / 'model'}",
        f"data.train={base / 'train.jsonl'}",
        f"data.eval={base / 'eval.jsonl'}",
        f"checkpoint.dir={folder}",
        f"trainer.seed={seed}",
        f"learner.seed={seed}",
    ]
    print("demo: training (vLLM generates, math-verify judges, DeepSpeed learns, all as Ray actors)", flush=True)
    return finish("demo", train(load_config(config_path, [*places, *overrides])), folder, setup, began)


if __name__ == "__main__":
    sys.exit(main())
