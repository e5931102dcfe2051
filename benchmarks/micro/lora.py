"""LoRA against full training of the same model on the same batches: seconds, memory, checkpoint size.

    python -m benchmarks.micro.lora --model FOLDER [--rank 16] [--steps 5] [--rollouts 64] [--dtype bfloat16]

One learner rank each (DeepSpeed ZeRO 1 on Ray, ``learner.cpus_per_rank`` auto), first one, then the other, each in
processes of its own. Per step: the optimizer step, publishing the weights. The first step of each warms up. Memory is
the peak resident size of the rank's process, and of its GPU where there is one. Writes benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results_file import spread, write_result
from benchmarks.micro.gradient_stats import make_batch
from cures_ray.config import Config


def config_of(options: argparse.Namespace, lora: dict[str, Any] | None) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(options.model.resolve()), "lora": lora},
            "rollout": {"max_new_tokens": 2 * options.tokens},
            "learner": {
                "dtype": options.dtype,
                "lr": 1e-4 if lora else 1e-5,
                "max_tokens_per_rank": options.max_tokens,
            },
        }
    )


async def measure(options: argparse.Namespace, lora: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Figures of one learner, each [low, median, high] over the steps."""
    from transformers import AutoConfig

    from actors.learner import LearnerGroup

    vocabulary = AutoConfig.from_pretrained(options.model).vocab_size
    config = config_of(options, lora)
    group = LearnerGroup(config, [{"num_cpus": 1}])
    await group.start(folder / "shm", "shm", [np.arange(8)])
    train, publish, computed = [], [], 0.0
    for step in range(options.steps + 1):
        report = await group.train(make_batch(step, vocabulary, options.rollouts, tokens=options.tokens))
        train.append(report.metrics["seconds"])
        computed = report.metrics["computed_tokens"]
        began = time.perf_counter()
        await group.publish(step + 1)
        publish.append(time.perf_counter() - began)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    await group.save(checkpoint)
    memory = await group.ranks[0].__ray_call__.remote(peak_mib)
    group.stop()
    return {
        "train_seconds": spread(train[1:]),
        "publish_seconds": spread(publish[1:]),
        "tokens_per_second": computed / float(np.median(train[1:])),
        "peak_mib": memory[0],
        "peak_gpu_mib": memory[1],
        "checkpoint_mib": sum(f.stat().st_size for f in checkpoint.iterdir()) / 2**20,
    }


def peak_mib(rank: Any) -> tuple[float, float]:
    """Peak resident size of the process, peak memory on its GPU."""
    import torch

    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, gpu


def main(arguments: list[str] | None = None) -> int:
    from actors.cluster.connect import own_ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; alpha is twice the rank")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=50, help="of a completion, on average")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--name", default="lora", help="of the result file")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    arms = {"full": None, "lora": {"rank": options.rank, "alpha": 2 * options.rank}}
    with own_ray(Config()):
        for arm, lora in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"arm": arm} | asyncio.run(measure(options, lora, Path(folder))))
            print(rows[-1], flush=True)
    figures = {f"{key}_{row['arm']}": value for row in rows for key, value in row.items() if key != "arm"}
    write_result(options.name, figures, rows)
    full, lora = rows
    print(
        f"LoRA against full training: {lora['train_seconds'][1] / full['train_seconds'][1]:.2f} x the seconds, "
        f"{lora['peak_mib'] / full['peak_mib']:.2f} x the memory, "
        f"{lora['checkpoint_mib'] / full['checkpoint_mib']:.3f} x the checkpoint"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
