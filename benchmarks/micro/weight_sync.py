"""What a weight sync costs: ``cures bench weight-sync [--repeats 7]``.

For a 2 M and a 30 M model (Qwen3, tied embeddings, float32), one vLLM engine in a Ray actor is kept busy with
batches of 256 rollouts of up to 64 tokens. Batches without a sync alternate with batches that receive new weights
while they are generated. Reported: medians of the seconds to publish (write the file into /dev/shm), paused, and
in the whole ``update_weights``, of which the rest is the canary; and the share of a step that only generates,
which bounds the share of a real step from above.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.cluster.connect import own_ray
from actors.generator import GeneratorActor
from actors.weights import shm
from actors.weights.backend import Settings
from actors.weights.shm import shm_folder
from actors.weights.stream import Source
from benchmarks.harness.results_file import spread, write_result
from cures_ray.config import Config, RayConfig
from cures_ray.messages import LeaseChunk, PromptRow, SyncReport, WeightUpdate
from cures_ray.synthetic.base_model import BaseModelSpec, build_model, build_tokenizer

SIZES = {"2M": BaseModelSpec(hidden=256, layers=2, heads=8), "30M": BaseModelSpec(hidden=576, layers=7, heads=9)}
LEASES, ROLLOUTS, NEW_TOKENS, CANARY_PROMPTS = 32, 8, 64, 4


class RandomPrompts:
    """A prompt table of 32 random tokens a row."""

    def rows(self, index: np.ndarray, *, tokenize: bool = True) -> list[PromptRow]:
        tokens = [np.random.default_rng(i).integers(10, 400, 32).astype(np.int32) for i in index.tolist()]
        return [PromptRow(prompt_id="0" * 16, text="", token_ids=ids, answer="") for ids in tokens]


class Bench:
    """One engine, and a model standing in for the learner's."""

    def __init__(self, folder: Path, spec: BaseModelSpec) -> None:
        tokenizer = build_tokenizer()
        self.model = build_model(tokenizer, spec).eval()
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = Config.model_validate(
            {
                "data": {"max_prompt_tokens": 48},
                "rollout": {"max_new_tokens": NEW_TOKENS, "max_concurrent_rollouts": LEASES * ROLLOUTS},
                "learner": {"dtype": "float32"},
                "placement": {"use_gpu": "no"},
            }
        )
        self.shm, self.version = shm_folder(folder), 0
        self.rng = np.random.default_rng(0)
        actor: Any = ray.remote(GeneratorActor).options(num_cpus=1, max_concurrency=1000)
        self.generator = actor.remote("generator-0", config, str(folder), {"train": RandomPrompts()})
        self.start_seconds = ray.get(self.generator.start.remote())
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def prompt(self) -> np.ndarray:
        return self.rng.integers(10, 400, 32).astype(np.int32)

    def submit(self) -> Any:
        leases = LeaseChunk(
            lease_id=np.arange(LEASES),
            attempt=np.zeros(LEASES, np.int32),
            prompt_index=np.arange(LEASES),
            n=np.full(LEASES, ROLLOUTS),
            seed=np.arange(LEASES),
        )
        return self.generator.generate.options(num_returns=2).remote(leases)[0]

    def step(self, sync: bool) -> tuple[float, int, float, SyncReport | None]:
        """Seconds and tokens of one batch; with ``sync``, the seconds to publish and the generator's report."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.001)
        sequences = tuple(self.prompt() for _ in range(CANARY_PROMPTS))
        logprobs = tuple(self.logprobs(ids) for ids in sequences)
        began = time.perf_counter()
        pending = self.submit()
        publish, report = 0.0, None
        if sync:
            self.version += 1
            start = time.perf_counter()
            info = shm.Publisher(Settings(backend="shm", folder=self.shm)).publish(Source(self.model), self.version)
            publish = time.perf_counter() - start
            update = WeightUpdate(
                version=self.version,
                info=info,
                canary_token_ids=sequences,
                canary_logprobs=logprobs,
            )
            report = ray.get(self.generator.update_weights.remote(update))
        tokens = int(ray.get(pending).completion_tokens.sum())
        return time.perf_counter() - began, tokens, publish, report

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        row = torch.as_tensor(ids, dtype=torch.long)[None]
        with torch.no_grad():
            scores = torch.log_softmax(self.model(row).logits[0, :-1], -1)
        return scores.gather(1, row[0, 1:, None])[:, 0].numpy()


def measure(name: str, spec: BaseModelSpec, repeats: int) -> list[dict[str, Any]]:
    """One row a batch, the first pair (warm-up) left out."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), spec)
        rows = []
        for repeat in range(repeats + 1):
            for sync in (False, True):
                seconds, tokens, publish, report = bench.step(sync)
                row = {"model": name, "parameters": bench.parameters, "start_s": round(bench.start_seconds, 1)}
                row |= {"sync": sync, "step_s": round(seconds, 3), "tokens_per_s": round(tokens / seconds)}
                if report is not None:
                    row |= {"publish_s": round(publish, 4), "paused_s": round(report.seconds_paused, 4)}
                    row |= {"canary_s": round(report.seconds - report.seconds_paused, 4)}
                    row |= {"total_s": round(publish + report.seconds, 4)}
                    row |= {"canary_max_error_nats": report.canary_max_error}
                if repeat:
                    rows.append(row)
        ray.kill(bench.generator)
        for path in bench.shm.iterdir():
            path.unlink()
        bench.shm.rmdir()
    return rows


def summarize(name: str, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """[low, median, high] over one model's batches."""
    synced, plain = [r for r in rows if r["sync"]], [r for r in rows if not r["sync"]]
    figures = {f"{name}_{key}": spread([r[key] for r in synced]) for key in ("publish_s", "paused_s", "canary_s")}
    figures[f"{name}_total_s"] = spread([r["total_s"] for r in synced])
    figures[f"{name}_canary_max_error_nats"] = spread([r["canary_max_error_nats"] for r in synced])
    figures[f"{name}_generation_step_s"] = spread([r["step_s"] for r in plain])
    figures[f"{name}_step_with_sync_s"] = spread([r["step_s"] for r in synced])
    figures[f"{name}_tokens_per_s"] = spread([r["tokens_per_s"] for r in plain])
    pairs = [(s["total_s"], p["step_s"]) for s, p in zip(synced, plain, strict=True)]
    figures[f"{name}_sync_cost_share_of_step"] = spread([total / (step + total) for total, step in pairs])
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured pairs of batches per model, 5 or more")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args(argv)
    with own_ray(Config(ray=RayConfig(num_cpus=2))):
        rows = [row for name in args.sizes for row in measure(name, SIZES[name], args.repeats)]
    figures: dict[str, list[float]] = {}
    for name in args.sizes:
        figures |= summarize(name, [r for r in rows if r["model"] == name])
    path = write_result("weight_sync", figures, rows)
    for figure, (low, median, high) in figures.items():
        print(f"{figure:36} {median:.4g}  [{low:.4g}, {high:.4g}]")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
