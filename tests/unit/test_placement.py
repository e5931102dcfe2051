from collections import Counter

import pytest

from actors.cluster.places import Node, OwnPlaces
from actors.cluster.roles import Role, check_feasible, choose, roles
from cures_ray.config import Config
from cures_ray.messages import ConfigError


def config(**sections) -> Config:
    return Config.model_validate(sections)


def test_without_gpus_every_role_asks_for_cpus_only():
    wanted = roles(config(rollout={"num_generators": 2}), gpus_in_cluster=0)
    assert {r.name: r.count for r in wanted} == {"verifier": 1, "learner": 1, "generator": 2}
    assert all("GPU" not in r.bundle for r in wanted)


def test_with_gpus_a_rank_gets_one_and_a_generator_its_tensor_parallel_size():
    wanted = {r.name: r for r in roles(config(rollout={"tensor_parallel_size": 4}, learner={"num_ranks": 4}), 8)}
    assert wanted["learner"].bundle["GPU"] == 1 and wanted["learner"].count == 4
    assert wanted["generator"].bundle["GPU"] == 4 and wanted["generator"].count == 1


def test_colocated_generators_share_the_learners_bundles():
    wanted = {r.name: r for r in roles(config(placement={"colocate": True}, learner={"num_ranks": 8}), 8)}
    assert wanted["learner"].count == 8 and wanted["generator"].count == 0
    assert wanted["learner"].gpus + wanted["generator"].gpus <= wanted["learner"].bundle["GPU"]


def test_what_does_not_fit_fails_with_a_table_of_wanted_and_available():
    wanted = roles(config(rollout={"num_generators": 8}, learner={"num_ranks": 8}), gpus_in_cluster=8)
    with pytest.raises(ConfigError) as caught:
        check_feasible(wanted, [{"CPU": 64, "GPU": 8}])
    assert "wanted in all" in str(caught.value) and "available in all" in str(caught.value)
    assert "16" in str(caught.value) and "num_generators" in str(caught.value)


def test_a_bundle_must_fit_one_node_even_when_the_cluster_is_large_enough():
    wanted = roles(config(rollout={"tensor_parallel_size": 8}), gpus_in_cluster=9)
    with pytest.raises(ConfigError, match="generator"):
        check_feasible(wanted, [{"CPU": 16, "GPU": 5}, {"CPU": 16, "GPU": 4}])
    check_feasible(wanted, [{"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 8}])


def test_strict_strategies_are_respected():
    wanted = roles(config(rollout={"num_generators": 2}), gpus_in_cluster=0)
    check_feasible(wanted, [{"CPU": 4}, {"CPU": 4}], "STRICT_SPREAD")
    with pytest.raises(ConfigError):
        check_feasible(wanted, [{"CPU": 8}], "STRICT_SPREAD")
    with pytest.raises(ConfigError):
        check_feasible(wanted, [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}, {"CPU": 1}], "STRICT_PACK")


def test_gpus_that_are_demanded_but_absent_are_an_error():
    with pytest.raises(ConfigError, match="no GPU"):
        roles(config(placement={"use_gpu": "yes"}), gpus_in_cluster=0)


def test_strict_pack_takes_a_node_that_holds_all_bundles():
    wanted = [r for r in roles(config(rollout={"num_generators": 2}), gpus_in_cluster=0) if r.name == "generator"]
    check_feasible(wanted, [{"CPU": 1}, {"CPU": 2}], "STRICT_PACK")


NODES = [{"CPU": 1.0}, {"CPU": 3.0}, {"CPU": 2.0}]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("PACK", [1, 1, 1, 0, 2, 2, None]),
        ("SPREAD", [0, 1, 2, 1, 2, 1, None]),
        ("STRICT_PACK", [1, 1, 1, None]),
        ("STRICT_SPREAD", [0, 1, 2, None]),
    ],
)
def test_each_strategy_chooses_its_nodes(strategy, expected):
    free, used, chosen = [dict(node) for node in NODES], Counter(), []
    for together in (3, 2, 1, 1, 1, 1, 1):
        chosen.append(choose({"CPU": 1.0}, free, used, strategy, together))
        if chosen[-1] is None:
            break
        used[chosen[-1]] += 1
        free[chosen[-1]]["CPU"] -= 1
    assert chosen == expected


class Cluster:
    """Nodes of so many CPUs, some draining or dead, as Ray tells of them."""

    def __init__(self, **cpus: float) -> None:
        self.cpus, self.draining, self.asked = cpus, {}, []

    def look(self):
        return {n: Node(free={"CPU": c}, leaves_in=self.draining.get(n)) for n, c in self.cpus.items()}

    def reserve(self, bundle, node):
        self.cpus[node] -= bundle["CPU"]
        return (bundle, node)

    def release(self, group):
        bundle, node = group
        if node in self.cpus:
            self.cpus[node] += bundle["CPU"]

    def places(self, strategy: str = "PACK") -> OwnPlaces:
        role = Role(name="generator", count=1, bundle={"CPU": 1.0}, cpus=1, gpus=0)
        return OwnPlaces(role, strategy, look=self.look, reserve=self.reserve, release=self.release)


def test_a_place_is_kept_while_its_node_stays_and_taken_elsewhere_when_it_drains_or_dies():
    cluster = Cluster(a=1, b=1, c=1)
    places = cluster.places()
    assert places.take("g") and places.take("g") and places.node_ids() == ["a"]
    cluster.draining["a"] = 20.0
    assert places.survey() == ({"g": 20.0}, True) and not places.stays("g")
    assert places.take("g") and places.node_ids() == ["b"] and cluster.cpus["a"] == 1
    del cluster.cpus["b"]
    assert not places.stays("g") and places.survey() == ({}, True)
    assert places.take("g") and places.node_ids() == ["c"]
    assert places.take("h") is None, "the only free node is draining"


def test_a_node_that_fails_its_check_is_not_chosen_again():
    cluster = Cluster(a=0, b=2, c=1)
    places = cluster.places()

    def check(node):
        cluster.asked.append(node)
        if node == "b":
            raise ConfigError("checkpoint.dir is not the same folder there")

    places.check = check
    with pytest.raises(ConfigError):
        places.take("g")
    assert places.take("g") and places.node_ids() == ["c"] and cluster.asked == ["b", "c"]
    assert places.take("h") is None and cluster.asked == ["b", "c"]
