"""What a configuration asks of the cluster, and whether it fits: the same for GPUs, logical GPUs and CPUs only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cures_ray.config import Config
from cures_ray.messages import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """``count`` bundles of ``bundle`` resources; an actor of this role claims ``cpus`` and ``gpus`` of one."""

    name: str
    count: int
    bundle: dict[str, float]
    cpus: float
    gpus: float


def roles(config: Config, gpus_in_cluster: float) -> list[Role]:
    """The placement groups that ``config`` asks for.

    Raises:
        ConfigError: placement.use_gpu = yes in a cluster without GPUs, or a tensor-parallel generator
            colocated with the learner.
    """
    placement, rollout, learner, verifier = config.placement, config.rollout, config.learner, config.verifier
    if placement.use_gpu == "yes" and gpus_in_cluster == 0:
        raise ConfigError("placement.use_gpu = yes, but the cluster has no GPU; use auto or no")
    gpu = placement.use_gpu != "no" and gpus_in_cluster > 0
    tensor_parallel = rollout.tensor_parallel_size
    pins = {
        "learner": placement.learner_resources,
        "generator": placement.generator_resources,
        "verifier": placement.verifier_resources,
    }
    result = [_role("verifier", verifier.num_workers, placement.verifier_cpus, 0)]
    if gpu and placement.colocate:
        if tensor_parallel > 1:
            raise ConfigError("placement.colocate = true needs rollout.tensor_parallel_size = 1: each GPU holds both")
        count = max(learner.num_ranks, rollout.num_generators)
        bundle = {"CPU": placement.generator_cpus + learner.logical_cpus, "GPU": 1.0}
        result += [
            Role(name="learner", count=count, bundle=bundle, cpus=learner.logical_cpus, gpus=0.5),
            Role(name="generator", count=0, bundle=bundle, cpus=placement.generator_cpus, gpus=0.5),
        ]
    else:
        result += [
            _role("learner", learner.num_ranks, learner.logical_cpus, 1 if gpu else 0),
            _role("generator", rollout.num_generators, placement.generator_cpus, tensor_parallel if gpu else 0),
        ]
    return [replace(role, bundle=role.bundle | pins[role.name]) for role in result]


def _role(name: str, count: int, cpus: float, gpus: float) -> Role:
    bundle = {k: v for k, v in (("CPU", cpus), ("GPU", float(gpus))) if v} or {"CPU": 0.001}
    return Role(name=name, count=count, bundle=bundle, cpus=cpus, gpus=gpus)


def wanted_table(wanted: list[Role], nodes: list[dict[str, float]]) -> str:
    """Wanted versus available, one line a role and a node."""
    lines = [f"{'role':<12}{'bundles':>8}{'CPU each':>10}{'GPU each':>10}"]
    for role in wanted:
        if role.count:
            cpu, gpu = role.bundle.get("CPU", 0), role.bundle.get("GPU", 0)
            lines.append(f"{role.name:<12}{role.count:>8}{cpu:>10g}{gpu:>10g}")
    for kind, values in (("wanted", _totals(wanted)), ("available", _sum(nodes))):
        lines.append(f"{kind + ' in all':<20}{values.get('CPU', 0):>10g}{values.get('GPU', 0):>10g}")
    pins = sorted({k for role in wanted for k in role.bundle} - {"CPU", "GPU"})
    for i, node in enumerate(nodes):
        own = "".join(f", {node[k]:g} {k}" for k in pins if k in node)
        lines.append(f"  node {i}: {node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU{own}")
    return "\n".join(lines)


def check_feasible(wanted: list[Role], nodes: list[dict[str, float]], strategy: str = "PACK") -> None:
    """Fit the bundles into the nodes' resources; raise ConfigError with the table when they do not fit."""
    free = [dict(node) for node in nodes]
    for role in wanted:
        used: Counter[int] = Counter()
        for placed in range(role.count):
            spot = choose(role.bundle, free, used, strategy, role.count - placed)
            if spot is None:
                raise ConfigError(
                    f"{role.name}: bundle {role.bundle} x {role.count} ({strategy}) does not fit the cluster\n"
                    + wanted_table(wanted, nodes)
                    + "\nLower rollout.num_generators or learner.num_ranks, or the CPUs per actor "
                    "(placement.generator_cpus, placement.verifier_cpus, learner.cpus_per_rank), or add nodes; on one "
                    "machine, ray.num_cpus=K lets Ray oversubscribe the cores."
                )
            used[spot] += 1
            for resource, amount in role.bundle.items():
                free[spot][resource] -= amount


def choose(
    bundle: dict[str, float],
    free: Sequence[Mapping[str, float]],
    used: Mapping[int, int],
    strategy: str,
    together: int = 1,
) -> int | None:
    """The node for the next bundle of a role; None: no node has room for it.

    Args:
        free: resources of each node.
        used: node -> bundles of this role that it has.
        together: bundles that are still to be placed, this one too; PACK prefers a node for all of them, STRICT_PACK
            takes no other.
    """

    def fits(i: int) -> bool:
        if strategy == "STRICT_PACK" and used:
            return i in used and _times(bundle, free[i]) >= 1
        if strategy == "STRICT_SPREAD" and i in used:
            return False
        return _times(bundle, free[i]) >= (together if strategy == "STRICT_PACK" else 1)

    def order(i: int) -> tuple[int, bool]:
        if strategy.endswith("SPREAD"):
            return used.get(i, 0), False
        return -used.get(i, 0), _times(bundle, free[i]) < together

    return min(filter(fits, range(len(free))), key=order, default=None)


def _times(bundle: dict[str, float], free: Mapping[str, float]) -> float:
    """How often ``bundle`` fits."""
    return min((free.get(k, 0.0) + 1e-9) / v for k, v in bundle.items())


def _totals(wanted: list[Role]) -> dict[str, float]:
    return _sum([{k: v * r.count for k, v in r.bundle.items()} for r in wanted])


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(p.get(k, 0.0) for p in parts) for k in ("CPU", "GPU")}
