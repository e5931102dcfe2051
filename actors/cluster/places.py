"""Where generators live: a placement group each, so that every one comes and goes alone.

A group is pinned to one node that is alive and stays. Ray would move the group of a dead node wherever it fits, or
keep it waiting without a word; here the fleet chooses a node, or learns that there is none.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray._private.state import state  # Ray tells of draining nodes, and of what is free on each, nowhere else
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.roles import Role, choose

RESERVE_S = 10.0  # for a group on a node that has room
Options = dict[str, Any]  # of a Ray actor


class Places(Protocol):
    def take(self, name: str) -> Options | None:
        """How to start generator ``name``: in its own place while that stays, else in a new one. None: there is no
        room. Blocks.

        Raises:
            ConfigError: the node cannot reach the run's files. It is not chosen again.
        """
        ...

    def stays(self, name: str) -> bool:
        """Whether its node is alive and not draining. Blocks."""
        ...

    def survey(self) -> tuple[dict[str, float], bool]:
        """Seconds that are left to each generator on a draining node, inf without a deadline; and whether there is
        room for a further generator. Blocks."""
        ...

    def free(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node. ``free``: resources that nobody holds; ``leaves_in``: seconds until it goes, None: it stays."""

    free: dict[str, float]
    leaves_in: float | None = None


def living_nodes() -> dict[str, Node]:
    """By Ray's node id."""
    free, draining = state.available_resources_per_node(), state.get_draining_nodes()
    now = time.time()

    def leaves_in(node_id: str) -> float | None:
        if node_id not in draining:
            return None
        return draining[node_id] / 1000 - now if draining[node_id] else math.inf

    return {
        n["NodeID"]: Node(free=free.get(n["NodeID"], {}), leaves_in=leaves_in(n["NodeID"]))
        for n in ray.nodes()
        if n["Alive"]
    }


def reserve(bundle: dict[str, float], node_id: str) -> PlacementGroup | None:
    """A group of one bundle on that very node; None when it has no room after all."""
    pin = [{"ray.io/node-id": node_id}]
    name = f"cures-generator-{uuid.uuid4().hex[:8]}"  # Ray wants each name once
    group = placement_group([bundle], strategy="STRICT_PACK", name=name, bundle_label_selector=pin)
    if group.wait(RESERVE_S):
        return group
    remove_placement_group(group)
    return None


class OwnPlaces:
    """Places of generators that share nothing with the learner."""

    def __init__(
        self,
        role: Role,
        strategy: str,
        *,
        look: Callable[[], dict[str, Node]] = living_nodes,
        reserve: Callable[[dict[str, float], str], Any] = reserve,
        release: Callable[[Any], None] = remove_placement_group,
    ) -> None:
        self.role, self.strategy = role, strategy
        self._look, self._reserve, self._release = look, reserve, release
        self.check: Callable[[str], None] | None = None  # of a node that was not used yet; raises ConfigError
        self._held: dict[str, tuple[str, Any]] = {}  # generator -> node, group
        self._known: set[str] = set()  # nodes that were checked
        self._refused: set[str] = set()
        self._lock = threading.Lock()  # one choice at a time

    def take(self, name: str, together: int = 1) -> Options | None:
        """``together``: generators that are started along with it, itself too."""
        with self._lock:
            nodes = self._look()
            if name in self._held and not _stays(nodes, self._held[name][0]):
                self.free(name)
            if name not in self._held:
                node_id = self._choice(nodes, together)
                if node_id is None:
                    return None
                self._check(node_id)
                group = self._reserve(self.role.bundle, node_id)
                if group is None:
                    return None
                self._held[name] = node_id, group
            strategy = PlacementGroupSchedulingStrategy(self._held[name][1], placement_group_bundle_index=0)
            return {"num_cpus": self.role.cpus, "num_gpus": self.role.gpus, "scheduling_strategy": strategy}

    def _choice(self, nodes: dict[str, Node], together: int) -> str | None:
        names = sorted(name for name, node in nodes.items() if node.leaves_in is None and name not in self._refused)
        used = Counter(names.index(node) for node, _ in self._held.values() if node in names)
        spot = choose(self.role.bundle, [nodes[name].free for name in names], used, self.strategy, together)
        return None if spot is None else names[spot]

    def _check(self, node_id: str) -> None:
        if self.check is not None and node_id not in self._known:
            try:
                self.check(node_id)
            except Exception:
                self._refused.add(node_id)
                raise
        self._known.add(node_id)

    def stays(self, name: str) -> bool:
        return name in self._held and _stays(self._look(), self._held[name][0])

    def survey(self) -> tuple[dict[str, float], bool]:
        nodes = self._look()
        left = {name: nodes[node].leaves_in for name, (node, _) in dict(self._held).items() if node in nodes}
        leaving = {name: seconds for name, seconds in left.items() if seconds is not None}
        return leaving, self._choice(nodes, 1) is not None

    def free(self, name: str) -> None:
        if name in self._held:
            self._release(self._held.pop(name)[1])

    def node_ids(self) -> list[str]:
        return [node for node, _ in self._held.values()]

    def remove(self) -> None:
        for name in list(self._held):
            self.free(name)


def _stays(nodes: dict[str, Node], node_id: str) -> bool:
    return node_id in nodes and nodes[node_id].leaves_in is None
