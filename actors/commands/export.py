"""``cures export CHECKPOINT --out DIR``: the model of a checkpoint as a Hugging Face folder.

Rank 0 wrote it into the checkpoint (learner/model), whole, for any number of ranks and ZeRO stage. So nothing is
started here: the checkpoint is checked against its hashes and the folder is copied.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore, check, step_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-..., or RUN: its newest intact checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    args = parser.parse_args(argv)
    checkpoint = find(args.checkpoint)
    export(checkpoint, args.out)
    print(f"{args.out}: the model after step {step_of(checkpoint)} (AutoModelForCausalLM.from_pretrained, vllm.LLM)")
    return 0


def find(folder: Path) -> Path:
    """The intact checkpoint that ``folder`` is, or the newest of the run that it is.

    Raises:
        ConfigError: there is none.
    """
    if (folder / "checkpoints").is_dir():
        newest, problems = CheckpointStore(folder).newest_intact()
        if newest is None:
            raise ConfigError("\n  ".join([f"{folder} has no intact checkpoint", *problems]))
        return newest
    problem = check(folder)
    if problem is not None:
        raise ConfigError(f"{folder}: {problem}; RUN/checkpoints/step-... or RUN is expected")
    return folder


def export(checkpoint: Path, out: Path) -> None:
    """Copy the model of ``checkpoint`` to ``out``, whole or not at all: what a failed try left is replaced.

    Raises:
        ConfigError: the checkpoint holds no model, or ``out`` exists or cannot be written.
    """
    source = checkpoint / "learner" / "model"
    if not source.is_dir():
        raise ConfigError(f"{checkpoint} holds no model (learner/model): it is not of a run of this version")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already; choose a new folder")
    temporary = out.parent / f".{out.name}.writing"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, temporary)
        os.replace(temporary, out)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(f"--out {out} cannot be written: {error}; free space there and repeat the command") from None
