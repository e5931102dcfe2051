"""The live placement groups of a run: one for the learner, one for the verifiers, one for each generator.

What cannot be placed fails with a table of wanted versus available, before any actor starts.
"""

from __future__ import annotations

import time

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.places import Options, OwnPlaces
from actors.cluster.roles import check_feasible, roles, wanted_table
from cures_ray.config import Config
from cures_ray.messages import ConfigError

RETRY_S = 0.5


class Placement:
    """Places of every role. ``generators``: theirs, which change while the run goes on."""

    def __init__(self, config: Config) -> None:
        """Place all, waiting at most ``placement.timeout_s``.

        Raises:
            ConfigError: a role cannot be placed; the message holds the table of wanted versus available.
        """
        self.config = config
        self.roles = {r.name: r for r in roles(config, ray.cluster_resources().get("GPU", 0.0))}
        self._groups: dict[str, PlacementGroup] = {}
        strategy = config.placement.strategy
        check_feasible(list(self.roles.values()), live_nodes(), strategy)
        deadline = time.monotonic() + config.placement.timeout_s
        fixed = [r for r in self.roles.values() if r.count and r.name != "generator"]
        for role in fixed:
            self._groups[role.name] = placement_group([role.bundle] * role.count, strategy, f"cures-{role.name}")
        self.generators = self._generators()
        try:
            for role in fixed:
                if not self._groups[role.name].wait(max(deadline - time.monotonic(), 0.1)):
                    raise self._not_placed(role.name)
            self._place_generators(deadline)
        except BaseException:
            self.remove()
            raise

    def _generators(self) -> OwnPlaces | SharedPlaces:
        own = self.roles["generator"]
        return OwnPlaces(own, self.config.placement.strategy) if own.count else SharedPlaces(self)

    def _place_generators(self, deadline: float) -> None:
        count = self.config.rollout.num_generators
        for i in range(count):
            while self.generators.take(f"generator-{i}", together=count - i) is None:
                if time.monotonic() > deadline:
                    raise self._not_placed("generator")
                time.sleep(RETRY_S)

    def _not_placed(self, role: str) -> ConfigError:
        return ConfigError(
            f"{role}: not placed within {self.config.placement.timeout_s:.0f} s; other jobs may hold the "
            f"resources\n{wanted_table(list(self.roles.values()), live_nodes())}"
        )

    def options(self, role: str, index: int) -> Options:
        """Ray options for actor ``index`` of ``role``. A colocated generator lives in the learner's bundles."""
        spec = self.roles[role]
        group = self._groups.get(role) or self._groups["learner"]
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index % group.bundle_count)
        return {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "scheduling_strategy": strategy}

    def nodes(self) -> dict[str, list[str]]:
        """The Ray node ids of each role."""
        return {role: self.node_ids(role) for role in self._groups} | {"generator": self.generators.node_ids()}

    def node_ids(self, role: str) -> list[str]:
        return list(placement_group_table(self._groups[role])["bundles_to_node_id"].values())

    def remove(self) -> None:
        self.generators.remove()
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()


class SharedPlaces:
    """Places of colocated generators: the learner's. None comes or goes."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def take(self, name: str, together: int = 1) -> Options | None:
        return self._placement.options("generator", int(name.rsplit("-", 1)[1]))

    def stays(self, name: str) -> bool:
        return True

    def survey(self) -> tuple[dict[str, float], bool]:
        return {}, False

    def free(self, name: str) -> None:
        """It stays the learner's."""

    def node_ids(self) -> list[str]:
        return self._placement.node_ids("learner")

    def remove(self) -> None:
        """It goes with the learner's."""


def live_nodes() -> list[dict[str, float]]:
    return [dict(n["Resources"]) for n in ray.nodes() if n["Alive"]]
