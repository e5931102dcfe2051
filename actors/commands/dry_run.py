"""``cures train --dry-run``: the resolved configuration, the derived batch, placement and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from actors.cluster.placement import Role, check_feasible, live_nodes, roles, wanted_table
from cures_ray.config import Config
from cures_ray.messages import ConfigError
from cures_ray.run.preflight import prepare_inputs


def dry_run(config: Config, *, with_inputs: bool = True) -> Iterator[str]:
    """Everything a run would check, section by section; nothing is started and no file is written. Placement comes
    last: a plan for a larger machine can be read on a small one.

    Raises:
        ConfigError: as a real run would.
    """
    yield "# configuration\n" + yaml.safe_dump(config.model_dump(), sort_keys=False).rstrip()
    yield "\n# batch\n" + "\n".join(f"{name:<32}{value}" for name, value in batch_table(config))
    if with_inputs:
        yield "\n# data\n" + "\n".join(prepare_inputs(config, claim_run_dir=False).notes)
        yield "\n# memory\n" + memory_report(config)
    yield "\n# placement\n" + placement_report(config)


def batch_table(config: Config) -> list[tuple[str, str]]:
    """Quantities that follow from the configuration."""
    c, le = config.curriculum, config.learner
    length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = c.rollouts_per_step * length
    per_rank = -(-tokens // (le.num_ranks * le.max_tokens_per_rank))
    return [
        ("prompts per step (m)", str(c.prompts_per_step)),
        ("rollouts per step (N)", str(c.rollouts_per_step)),
        ("mean rollouts per prompt", f"{c.rollouts_per_step / c.prompts_per_step:g}, within {c.n_min}..{c.n_max}"),
        ("tokens per step, at most", f"{tokens:,}"),
        ("micro-batches per rank, at most", str(per_rank)),
        ("batches in flight, at most", str(config.async_rl.max_staleness + 1)),
        ("rollouts of the run", f"{config.trainer.steps * c.rollouts_per_step:,} (pilots, screens, retries beside)"),
    ]


def placement_report(config: Config) -> str:
    """Wanted against the cluster when one is connected, else against what the configuration would start."""
    import ray

    if ray.is_initialized():
        nodes = live_nodes()
        wanted = roles(config, sum(n.get("GPU", 0) for n in nodes))
        check_feasible(wanted, nodes, config.placement.strategy)
        return wanted_table(wanted, nodes) + "\nfits"
    if config.ray.address:
        wanted = roles(config, 1 if config.placement.use_gpu != "no" else 0)
        return _table_without_cluster(wanted) + f"\n(the cluster {config.ray.address} is asked at the start)"
    import os

    node = {"CPU": float(config.ray.num_cpus or os.cpu_count() or 1), "GPU": float(_local_gpus(config))}
    wanted = roles(config, node["GPU"])
    if config.placement.use_gpu == "auto" and not node["GPU"] and config.learner.dtype == "bfloat16":
        hint = "ray.num_gpus=K plans for a machine with K GPUs"
        print(f"\nplacement.use_gpu = auto found no GPU here; this is the layout on CPUs ({hint})")
    check_feasible(wanted, [node], config.placement.strategy)
    return wanted_table(wanted, [node]) + "\nfits"


def _table_without_cluster(wanted: list[Role]) -> str:
    return wanted_table(wanted, []).split("available in all")[0].rstrip()


def _local_gpus(config: Config) -> int:
    if config.ray.num_gpus is not None:
        return config.ray.num_gpus
    import torch

    return torch.cuda.device_count()


def memory_report(config: Config) -> str:
    """Parameters and the learner's and generators' steady memory, in GiB a rank; activations come on top."""
    parameters = count_parameters(config)
    le = config.learner
    width = 2 if le.dtype == "bfloat16" else 4
    shard = {stage: 1 / le.num_ranks for stage in range(4)}
    weights = width * (shard[3] if le.zero_stage >= 3 else 1)
    gradients = 4 * (shard[2] if le.zero_stage >= 2 else 1)
    optimizer = (8 + (4 if width == 2 else 0)) * (shard[1] if le.zero_stage >= 1 else 1)
    learner = parameters * (weights + gradients + optimizer) / 2**30
    generator = parameters * width / config.rollout.tensor_parallel_size / 2**30
    return (
        f"{parameters / 1e6:,.1f} M parameters; learner {learner:.2f} GiB a rank (weights, gradients, Adam; "
        f"ZeRO {le.zero_stage}) + activations; generator {generator:.2f} GiB weights a device + KV cache"
    )


def count_parameters(config: Config) -> int:
    """From the model's configuration alone, on the meta device.

    Raises:
        ConfigError: the model configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        description: Any = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.model.path}: its configuration cannot be read: {error}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(description)
    return sum(p.numel() for p in model.parameters())
