"""Placement groups: one per role, the same code for GPUs, logical GPUs and CPUs only.

What cannot be placed fails with a table of wanted versus available, before any actor starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    """First-fit the bundles into the nodes' resources; raise ConfigError with the table when they do not fit."""
    free = [dict(node) for node in nodes]
    for role in wanted:
        used: set[int] = set()
        for _ in range(role.count):
            spot = _fit(role.bundle, free, used, strategy)
            if spot is None:
                raise ConfigError(
                    f"{role.name}: bundle {role.bundle} x {role.count} ({strategy}) does not fit the cluster\n"
                    + wanted_table(wanted, nodes)
                    + "\nLower rollout.num_generators or learner.num_ranks, or the CPUs per actor "
                    "(placement.generator_cpus, placement.verifier_cpus, learner.cpus_per_rank), or add nodes; on one "
                    "machine, ray.num_cpus=K lets Ray oversubscribe the cores."
                )
            used.add(spot)


def _fit(bundle: dict[str, float], free: list[dict[str, float]], used: set[int], strategy: str) -> int | None:
    for i, node in enumerate(free):
        if strategy == "STRICT_PACK" and used and i not in used:
            continue
        if strategy == "STRICT_SPREAD" and i in used:
            continue
        if all(node.get(k, 0.0) + 1e-9 >= v for k, v in bundle.items()):
            for k, v in bundle.items():
                node[k] = node.get(k, 0.0) - v
            return i
    return None


class Placement:
    """The live placement groups of a run."""

    def __init__(self, config: Config) -> None:
        """Create every group and wait for it, at most ``placement.timeout_s`` in all.

        Raises:
            ConfigError: a group cannot be placed; the message holds the table of wanted versus available.
        """
        self.roles = {r.name: r for r in roles(config, ray.cluster_resources().get("GPU", 0.0))}
        self._groups: dict[str, PlacementGroup] = {}
        nodes = live_nodes()
        strategy = config.placement.strategy
        check_feasible(list(self.roles.values()), nodes, strategy)
        for role in self.roles.values():
            if role.count:
                bundles = [role.bundle] * role.count
                self._groups[role.name] = placement_group(bundles, strategy=strategy, name=f"cures-{role.name}")
        for name, group in self._groups.items():
            if not group.wait(config.placement.timeout_s / len(self._groups)):
                table = wanted_table(list(self.roles.values()), nodes)
                self.remove()
                raise ConfigError(
                    f"{name}: not placed within {config.placement.timeout_s:.0f} s; other jobs may hold the "
                    f"resources\n{table}"
                )

    def options(self, role: str, index: int) -> dict[str, object]:
        """Ray options for actor ``index`` of ``role``. A colocated generator lives in the learner's bundles."""
        spec = self.roles[role]
        group = self._groups.get(role) or self._groups["learner"]
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index % group.bundle_count)
        return {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": strategy}

    def nodes(self) -> dict[str, list[str]]:
        """The Ray node id of each bundle, by role. Colocated generators lie where the learner does."""
        found = {}
        for role in self.roles:
            group = self._groups.get(role) or self._groups["learner"]
            found[role] = list(placement_group_table(group)["bundles_to_node_id"].values())
        return found

    def remove(self) -> None:
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()


def live_nodes() -> list[dict[str, float]]:
    return [dict(n["Resources"]) for n in ray.nodes() if n["Alive"]]


def _totals(wanted: list[Role]) -> dict[str, float]:
    return _sum([{k: v * r.count for k, v in r.bundle.items()} for r in wanted])


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(p.get(k, 0.0) for p in parts) for k in ("CPU", "GPU")}
