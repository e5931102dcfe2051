"""What gradient statistics cost a learner step: two real learner ranks, one with and one without, alternating.

    python -m benchmarks.micro.gradient_stats [--repeats 7]

Both ranks (DeepSpeed ZeRO 1 on Ray, one thread each) get the same batches, one rank at a time; the first
two steps of each warm up. The overhead is a ratio of CPU seconds of the two processes, which other load on a
shared machine disturbs less than wall seconds; those are in the rows. ``share`` is the CPU time of the
statistics calls by themselves over that of a step without them: the same cost without the noise of a
difference. Writes benchmarks/results/gradient_stats.json.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config, RayConfig
from cures_ray.loop.chunks import pack
from cures_ray.messages import LeaseChunk, Rollout, TrainingBatch, TrainingGroup

MAX_TOKENS = 4096  # of a micro-batch
BAR = 0.05  # of a learner step, on a model of 5 M parameters
ERROR_BAR = 1e-4  # relative, against per-sample autograd

# name, vocabulary, width, layers, rollouts a step
CASES = [("5M_v64", 64, 256, 6, 32), ("5M_v2048", 2048, 256, 5, 32), ("2M_v64", 64, 192, 4, 256)]


def write_model(folder: Path, vocabulary: int, width: int, layers: int) -> int:
    """A random Qwen2 with tied embeddings; returns its parameter count."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def lease(lease_id: int, n: int) -> LeaseChunk:
    one = np.ones(1, np.int64)
    return LeaseChunk(lease_id=lease_id * one, attempt=0 * one, prompt_index=0 * one, n=n * one, seed=0 * one)


def make_batch(step: int, vocabulary: int, rollouts: int, each: int = 8, tokens: int = 50) -> TrainingBatch:
    """``rollouts`` completions of about ``tokens`` tokens after prompts of 20, in groups of ``each``."""
    rng = np.random.default_rng(step)
    groups = []
    for lease_id in range(rollouts // each):
        lengths = rng.integers(tokens * 3 // 5, tokens * 7 // 5 + 1, each)
        members = tuple(
            Rollout(
                token_ids=rng.integers(0, vocabulary, n).astype(np.int32),
                logprobs=np.full(n, -np.log(vocabulary), np.float32),
                finish_reason="stop",
                min_version=step,
                max_version=step,
                text="",
            )
            for n in lengths
        )
        prompt = rng.integers(0, vocabulary, 20).astype(np.int32)
        _, payload = pack(lease(lease_id, each), [prompt], [members], "benchmark", [0.0])
        groups.append(
            TrainingGroup(
                lease_id=lease_id,
                payload=payload,
                place=0,
                rollout_index=np.arange(each, dtype=np.int32),
                rewards=(rng.random(each) < 0.5).astype(np.float32),
                advantages=rng.normal(size=each).astype(np.float32),
                weights=np.full(each, 1 / rollouts / (1.4 * tokens), np.float32),
                prompt_tokens=20,
                completion_tokens=lengths.astype(np.int32),
            )
        )
    return TrainingBatch(step=step, groups=tuple(groups))


async def measure(case: tuple[str, int, int, int, int], folder: Path, repeats: int) -> dict[str, Any]:
    """One case; each figure is [low, median, high] over the steps, overheads over pairs of steps."""
    from actors.learner import LearnerGroup

    name, vocabulary, width, layers, rollouts = case
    parameters = write_model(folder / name, vocabulary, width, layers)
    groups = {}
    for sigma in ("bernoulli", "last_layer"):
        config = Config.model_validate(
            {
                "model": {"path": str(folder / name)},
                "curriculum": {"allocation": "sigma", "sigma": sigma},
                "learner": {"dtype": "float32", "max_tokens_per_rank": MAX_TOKENS},
            }
        )
        groups[sigma] = LearnerGroup(config, [{"num_cpus": 0.5}])
        await groups[sigma].start(folder / "shm", "shm", [np.arange(8)])
    seconds: dict[str, list[float]] = {sigma: [] for sigma in groups}
    cpu: dict[str, list[float]] = {sigma: [] for sigma in groups}
    flops = 0.0
    for step in range(repeats + 2):
        batch = make_batch(step, vocabulary, rollouts)
        order = list(groups) if step % 2 else list(groups)[::-1]
        for sigma in order:
            began = await _cpu_seconds(groups[sigma])
            report = await groups[sigma].train(batch)
            used = await _cpu_seconds(groups[sigma]) - began
            flops = report.metrics["flops"]
            if step >= 2:
                seconds[sigma].append(report.metrics["seconds"])
                cpu[sigma].append(used)
    for group in groups.values():
        group.stop()
    plain, full = (np.array(seconds[sigma]) for sigma in groups)
    alone = np.array(statistics_cpu_seconds(case, repeats))
    cpu_plain, cpu_full = (np.array(cpu[sigma]) for sigma in groups)
    return {
        "case": name,
        "parameters": parameters,
        "vocabulary": vocabulary,
        "rollouts": rollouts,
        "step_seconds": _spread(plain),
        "step_seconds_with_statistics": _spread(full),
        "cpu_seconds": _spread(cpu_plain),
        "cpu_seconds_with_statistics": _spread(cpu_full),
        "share": _spread(alone / np.median(cpu_plain)),
        "overhead": _spread(cpu_full / cpu_plain - 1),
        "overhead_wall": _spread(full / plain - 1),
        "gflops_per_second": flops / float(np.median(plain)) / 1e9,
    }


def statistics_cpu_seconds(case: tuple[str, int, int, int, int], repeats: int) -> list[float]:
    """CPU seconds of the statistics calls of one step by themselves: residuals, Gram matrices, class sums."""
    import torch

    from cures_ray.learning.gradient_norms import LastLayerStatistics
    from cures_ray.learning.packing import collate, make_row, plan_step

    _, vocabulary, width, _, rollouts = case
    torch.set_num_threads(1)
    batch = make_batch(0, vocabulary, rollouts)
    settings = {
        "curriculum": {"allocation": "sigma", "sigma": "last_layer"},
        "learner": {"max_tokens_per_rank": MAX_TOKENS},
    }
    plan = plan_step(batch, 1, Config.model_validate(settings))[0]
    rows = [[make_row(batch.groups[g], batch.groups[g].payload, slot) for g, slot in rollouts] for rollouts in plan]
    work = []
    for members in rows:
        m = collate(members)
        probs = torch.softmax(torch.randn(len(m.target), vocabulary), 1)
        tensors = (torch.randn(len(m.target), width), probs, torch.as_tensor(m.target), torch.as_tensor(m.row))
        work.append((*tensors, m.lease_ids, m.correct))
    used = []
    for _ in range(repeats + 2):
        began, statistics = time.process_time(), LastLayerStatistics()
        for hidden, probs, target, row, leases, plus in work:
            statistics.add(hidden, statistics.residual(probs, target, width), row, leases, plus)
        statistics.result()
        used.append(time.process_time() - began)
    return used[2:]


def autograd_error(case: tuple[str, int, int, int, int], rollouts: int = 16, tokens: int = 40) -> float:
    """Largest relative error of the statistics of one lease against float64 autograd, rollout by rollout, on a random
    output layer of the case's size. That of the dot product is relative to the product of the two norms."""
    import torch

    from cures_ray.learning.gradient_norms import LastLayerStatistics

    _, vocabulary, width, _, _ = case
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    hidden = torch.randn(rollouts, tokens, width, generator=generator)
    target = torch.randint(0, vocabulary, (rollouts, tokens), generator=generator)
    statistics, flat = LastLayerStatistics(), hidden.reshape(-1, width)
    residual = statistics.residual(torch.softmax(flat @ weight.T, 1), target.reshape(-1), width)
    row = torch.arange(rollouts).repeat_interleave(tokens)
    plus = [i % 3 == 0 for i in range(rollouts)]
    statistics.add(flat, residual, row, [0] * rollouts, plus)
    (found,) = statistics.result()
    exact = weight.double().requires_grad_()
    sums, squares = [torch.zeros_like(exact) for _ in range(2)], [0.0, 0.0]
    for h, t, is_plus in zip(hidden.double(), target, plus, strict=True):
        logprob = torch.log_softmax(h @ exact.T, 1).gather(1, t[:, None]).sum()
        (score,) = torch.autograd.grad(logprob, exact)
        sums[is_plus] += score
        squares[is_plus] += float((score**2).sum())
    minus_sq, plus_sq = (float((s.detach() ** 2).sum()) for s in sums)
    errors = [
        abs(found.sum_sq_minus / squares[0] - 1),
        abs(found.sum_sq_plus / squares[1] - 1),
        abs(found.sq_sum_minus / minus_sq - 1),
        abs(found.sq_sum_plus / plus_sq - 1),
        abs(found.dot - float((sums[0] * sums[1]).sum())) / (minus_sq * plus_sq) ** 0.5,
    ]
    return max(errors)


async def _cpu_seconds(group: Any) -> float:
    """CPU seconds that the group's first rank has used."""
    return await group.ranks[0].__ray_call__.remote(lambda _: time.process_time())


def _spread(values: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in (values.min(), np.median(values), values.max())]


def main(arguments: list[str] | None = None) -> int:
    from actors.cluster.connect import own_ray
    from benchmarks.harness.results_file import write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each, at least 5")
    options = parser.parse_args(arguments)
    rows = []
    with own_ray(Config(ray=RayConfig(num_cpus=2))), tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            rows.append(asyncio.run(measure(case, Path(folder), max(5, options.repeats))))
            rows[-1]["autograd_error"] = autograd_error(case)
            print(rows[-1], flush=True)
    figures: dict[str, Any] = {f"overhead_{r['case']}": r["overhead"] for r in rows}
    figures |= {f"share_{r['case']}": r["share"] for r in rows}
    figures |= {f"step_seconds_{r['case']}": r["step_seconds"] for r in rows}
    figures |= {f"autograd_error_{r['case']}": r["autograd_error"] for r in rows}
    write_result("gradient_stats", figures, rows)
    worst = max(max(r["overhead"][1], r["share"][1]) for r in rows if r["parameters"] > 4e6)
    error = max(r["autograd_error"] for r in rows)
    print(f"statistics cost {worst:.1%} of a learner step at 5 M parameters (bar: {BAR:.0%})")
    print(f"largest relative error against per-sample autograd {error:.1e} (bar: {ERROR_BAR:g})")
    return 0 if worst <= BAR and error <= ERROR_BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
