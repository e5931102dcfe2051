"""``cures train --dry-run``: the resolved configuration, the derived batch, placement and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from actors.cluster.placement import live_nodes
from actors.cluster.roles import Role, check_feasible, roles, wanted_table
from actors.commands.memory import memory_report
from cures_ray.config import Config
from cures_ray.run.dry_checks import check_inputs, check_writable
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
        check_writable(Path(config.checkpoint.dir))
        inputs = prepare_inputs(config, claim_run_dir=False)
        yield "\n# data\n" + "\n".join([*inputs.notes, *check_inputs(inputs)])
        yield "\n# rollouts\n" + "\n".join(f"{n:<32}{v}" for n, v in rollout_table(config, len(inputs.train)))
        yield "\n# memory\n" + memory_report(config, float(inputs.train.token_counts.mean()))
    yield "\n# placement\n" + placement_report(config)


def batch_table(config: Config) -> list[tuple[str, str]]:
    """Quantities that follow from the configuration."""
    c, le = config.curriculum, config.learner
    length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = c.rollouts_per_step * length
    per_rank = -(-tokens // (le.num_ranks * le.max_tokens_per_rank))
    least, most = c.bounds
    within = f"at least {least}" if most is None else f"within {least}..{most}"
    return [
        ("prompts per step (m)", str(c.prompts_per_step)),
        ("rollouts per step (N)", str(c.rollouts_per_step)),
        ("mean rollouts per prompt", f"{c.rollouts_per_step / c.prompts_per_step:g}, {within}"),
        ("tokens per step, at most", f"{tokens:,}"),
        ("micro-batches per rank, at most", str(per_rank)),
        ("batches in flight, at most", str(config.async_rl.max_staleness + 1)),
    ]


def rollout_table(config: Config, prompts: int) -> list[tuple[str, str]]:
    """What the run will generate from ``prompts`` training prompts, pilots first."""
    c, steps = config.curriculum, config.trainer.steps
    pilots, how = 0, "none"
    if c.method == "cures" and c.belief == "reset":
        switches, subsets = -(-steps // c.subset_steps), min(c.subsets, prompts)
        sizes = [(prompts * (k + 1)) // subsets - (prompts * k) // subsets for k in range(subsets)]
        pilots = c.pilot_rollouts * sum(sizes[k % subsets] for k in range(switches))
        how = f"{c.pilot_rollouts} of each of about {prompts // subsets:,} prompts, at {switches} starts of a subset"
    elif c.method == "cures" and c.pilot_rollouts:
        pilots, how = c.pilot_rollouts * prompts, f"{c.pilot_rollouts} of each of {prompts:,} prompts, once"
    elif c.method == "gvm":
        pilots, how = (
            steps * c.pilot_rollouts * c.prompts_per_step,
            f"{c.pilot_rollouts} of each draw",
        )
    planned = steps * c.rollouts_per_step
    more = {"dapo": ", and rounds until enough prompts are mixed"}
    more |= dict.fromkeys(("speed", "reinforce_ada"), " at most: fewer where a prompt needs no further round")
    rows = [
        ("pilots of the run", f"{pilots:,} ({how})"),
        ("rollouts that train", f"{planned:,} ({steps} steps x {c.rollouts_per_step:,})"),
        ("rollouts of the run", f"{planned + pilots:,}" + more.get(c.method, "")),
    ]
    if config.trainer.rollout_budget:
        rows.append(("trainer.rollout_budget ends it", f"at {config.trainer.rollout_budget:,}"))
    return rows


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
    node = {key: float("inf") for role in wanted for key in role.bundle} | node  # custom ones: the cluster is asked
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
