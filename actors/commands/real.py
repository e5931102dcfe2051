"""``make real``: a real pretrained model on real tasks, trained and evaluated by task, on one CPU machine.

python -m actors.commands.real [--dir runs/real] [--config FILE] [section.key=value ...]

A second call continues an interrupted run; the model folder is made once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from actors.commands.cli import main as cures
from actors.commands.ending import finish
from cures_ray.config_load import load_config
from cures_ray.messages import ConfigError, RunError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "smollm2-reasoning-gym.yaml"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m actors.commands.real", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/real"), help="of the model and the run")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        real(args.dir, args.config, args.overrides)
    except (ConfigError, RunError) as error:
        print(f"real: {error}", file=sys.stderr)
        return 1
    return 0


def real(folder: Path, config_path: Path, overrides: list[str]) -> dict[str, object]:
    """Prepare the model, train it, and leave ``summary.json`` and the report in ``folder``/run.

    Raises:
        RunError: the model cannot be prepared, or the run failed. ConfigError: bad input.
    """
    began = time.monotonic()
    model, run = folder / "model", folder / "run"
    print(f"real: SmolLM2-135M-Instruct -> {model}", flush=True)
    if cures(["prepare", "smollm2", "--out", str(model)]) != 0:
        raise RunError("cures prepare smollm2 failed; its message is above")
    setup = time.monotonic() - began

    from actors.cluster.launch import train  # late: imports Ray, vLLM and DeepSpeed

    config = load_config(config_path, [f"model.path={model}", f"checkpoint.dir={run}", *overrides])
    print("real: training and evaluating by task (levels are tasks)", flush=True)
    return finish("real", train(config), run, setup, began)


if __name__ == "__main__":
    sys.exit(main())
