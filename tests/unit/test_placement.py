import pytest

from actors.cluster.placement import check_feasible, roles
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
