"""Three Ray nodes on this machine, and more that come and go while a run trains: real placement, engines, faults.

Every test asserts that its faults happened.
"""

import time
from collections import Counter

import numpy as np
import psutil
import pytest
import ray
from clusters import head_node
from test_full_run import records, small_run
from test_system_faults import interrupt, noted, notes_of, play, steps_of, trained, trained_steps
from worker_nodes import WorkerNode

from actors.cluster.adapters import answer
from actors.cluster.launch import train
from actors.cluster.placement import Placement
from benchmarks.harness.faults import record_fault, seconds_lost
from cures_ray.config import Config
from cures_ray.loop.ports import WorkerLost
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import main as prepare

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]
ROOM_GIB = 0.7  # that a node's actors may take before Ray kills one


@pytest.fixture(scope="module")
def cluster():
    """The head, with the resource "first"; a node with an "engine"; one whose memory Ray finds nearly full."""
    used = psutil.virtual_memory()
    limit = (used.total - used.available + ROOM_GIB * 2**30) / used.total
    nodes: list[WorkerNode] = []
    settings = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}  # a lost node is found in seconds
    with head_node(cpus=4, system_config=settings) as head:

        def add(resources: dict, **env: str) -> WorkerNode:
            nodes.append(WorkerNode(head.address, 2, resources, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="600", **env))
            return nodes[-1]

        monitor = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
        add.engine, add.full = add({"engine": 1}), add({"full": 1}, **monitor)
        for node in (add.engine, add.full):
            node.joined()
        try:
            yield add
        finally:
            for node in nodes:
                node.end()


def placed(**sections) -> dict[str, list[str]]:
    """Ray node ids by role."""
    sections = {"ray": {}, **sections}
    sections["placement"] = {"use_gpu": "no", "timeout_s": 20.0, "verifier_cpus": 0.1, **sections.get("placement", {})}
    placement = Placement(Config.model_validate(sections))
    try:
        return placement.nodes()
    finally:
        placement.remove()


def test_each_strategy_and_pin_holds_on_three_nodes(cluster):
    where = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    assert len(where) == 3
    three, cpus = {"num_generators": 3}, {"cpus_per_rank": 0.5}
    spread = placed(rollout=three, learner={"num_ranks": 3, **cpus}, placement={"strategy": "STRICT_SPREAD"})
    assert Counter(spread["generator"]) == Counter(spread["learner"]) == Counter(list(where))
    assert Counter(placed(rollout=three, placement={"strategy": "SPREAD"})["generator"]) == Counter(list(where))
    for strategy in ("PACK", "STRICT_PACK"):
        packed = placed(rollout={"num_generators": 2}, placement={"strategy": strategy})
        assert len(packed["generator"]) == 2 and len(set(packed["generator"])) == 1, strategy
    with pytest.raises(ConfigError, match=r"generator: .*x 4 \(STRICT_SPREAD\) does not fit"):
        placed(rollout={"num_generators": 4}, placement={"strategy": "STRICT_SPREAD"})
    with pytest.raises(ConfigError, match=r"generator: .*x 5 \(STRICT_PACK\) does not fit"):
        placed(rollout={"num_generators": 5}, placement={"strategy": "STRICT_PACK", "generator_cpus": 1.0})
    pinned = placed(
        rollout={"num_generators": 1},
        learner={"num_ranks": 2, **cpus},
        placement={"strategy": "SPREAD", "learner_resources": {"first": 1}, "generator_resources": {"engine": 1}},
    )
    assert all("first" in where[node] for node in pinned["learner"]) and len(pinned["learner"]) == 2
    assert pinned["generator"] == [cluster.engine.id]


class Hungry:
    def eat(self, gib: float) -> int:
        held = []
        for _ in range(int(gib * 10)):
            held.append(np.ones((1 << 30) // 10, np.uint8))
            time.sleep(0.05)
        return len(held)


async def test_an_actor_that_ray_kills_for_memory_is_a_lost_worker(cluster):
    actor = ray.remote(Hungry).options(num_cpus=0.1, resources={"full": 1}).remote()
    with pytest.raises(WorkerLost, match="OutOfMemoryError") as caught:
        await answer(actor.eat.remote(ROOM_GIB + 4), "generator-0", 60.0)
    assert isinstance(caught.value.__cause__, ray.exceptions.OutOfMemoryError)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert (
        prepare(["--out", str(folder), "--seed", "0", "--prompts", "64", "--eval-prompts", "8", "--sft-steps", "5"])
        == 0
    )
    return folder


def test_generators_join_leave_and_are_lost_with_their_nodes_while_the_run_trains(cluster, base, tmp_path):
    """One run: a node appears and a generator joins; that node is lost with a spare one at hand, then the spare one
    too with none at hand; the last generator's node is given notice, and it works on until another has joined."""
    run_dir, nodes = tmp_path / "run", {}

    def add(name: str) -> str:
        nodes[name] = cluster({"engine": 1}).joined()
        return f"{name} joined"

    story = play(
        run_dir,
        (trained(2), lambda: add("second")),
        (noted("generator-1 joined after", 2), lambda: add("spare")),
        (noted("generator-1 joined after", 3), lambda: nodes["second"].lose()),
        (noted("generator generator-1 is back after", 2), lambda: nodes["spare"].lose()),
        (noted("no node had room for it", 2), cluster.engine.preempt),
        (noted("generator generator-0: its node is drained", 2), lambda: add("last")),
        (noted("generator generator-0 left", 2), interrupt),
    )
    config = small_run(
        base,
        run_dir,
        rollout={"num_generators": 1, "max_generators": 2, "health_timeout_s": 30.0},
        placement={
            "learner_resources": {"first": 1},
            "verifier_resources": {"first": 1},
            "generator_resources": {"engine": 1},
            "timeout_s": 6.0,
        },
        eval={"interval": 0},
        checkpoint={"dir": str(run_dir), "interval": 0, "export_final": False},
        trainer={"steps": 10**6},
    )
    summary = train(config)
    notes = notes_of(run_dir)
    assert len(story.done) == 7 and all(story.done), f"not all happened: {story.done}, {notes}"
    steps = [r for r in records(run_dir) if "rollout/reward" in r]
    assert steps_of(run_dir) == list(range(1, summary.interrupted_at + 1)), "every step once"
    assert all(r["weights/canary_max_error"] < 1e-3 and r["staleness/max"] <= 1 for r in steps)
    joins = [n for n in notes if "joined after" in n]
    assert len(joins) == 2 and all("2 generators" in n for n in joins), notes
    assert [n for n in notes if "is back after" in n] and [n for n in notes if "The run goes on with 1 generators" in n]
    assert [n for n in notes if "generator-1 lost" in n]
    summary.accounting.check()
    accounted = summary.accounting.trained + sum(summary.accounting.discarded.values()) + summary.accounting.in_flight
    assert accounted == summary.accounting.planned
    for i, fault, what, order in (
        (2, "a generator's node is lost, another has room", "the generator starts again there; the others work on", 13),
        (3, "a generator's node is lost, none has room", "the run goes on with the others; one joins with a node", 14),
        (
            4,
            "a generator's node is drained",
            "it leaves when another has joined, its leases finished or given back",
            15,
        ),
    ):
        record_fault(fault, what, seconds_lost(trained_steps(records(run_dir)), story.at[i]), order=order)
