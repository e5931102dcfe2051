"""The collective road with real processes over gloo: nccl runs the same code on another device.

Rendezvous, engines of one and of two workers, a replaced generator, a receiver and a sender that die in the middle, an
engine of which a worker never comes: each ends within its deadline, and only where it happened.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.weights import collective
from actors.weights.backend import Node

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
PEER = Path(__file__).with_name("collective_peer.py")
EXPECTED = {f"w{i}": (1.0 + i) * (1 << 21) for i in range(8)}
DEADLINE = 8.0  # seconds a wait of these transfers may last
STARTING = 30.0  # seconds to import torch on a busy machine


class Peer:
    def __init__(self, what: str, **arguments) -> None:
        command = [sys.executable, str(PEER), what, json.dumps(arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {}

    def error(self) -> str:
        """What it ended with; its process must end within the deadline."""
        _, text = self.process.communicate(timeout=DEADLINE + STARTING)
        assert self.process.returncode == 1, text
        return text.strip().splitlines()[-1]


@pytest.fixture
def peers():
    started = []

    def start(what: str, **arguments) -> Peer:
        started.append(Peer(what, **arguments))
        return started[-1]

    yield start
    for peer in started:
        peer.process.kill()
        peer.process.communicate()


def generator(start, info: dict, workers: int = 1, version: int = 3, stop_after=None, come: int | None = None):
    """An engine that asks for ``version``; ``come``: how many of its workers do."""
    update = collective.update_info(info, version, Node(workers=workers)) | {"version": version}
    ranks = range(workers if come is None else come)
    return [start("receive", update=update, rank=r, stop_after=stop_after) for r in ranks]


def test_engines_of_one_and_two_workers_receive_the_published_version_while_the_learner_trains_on(peers):
    learner = peers("send", timeout_s=DEADLINE, die=False)
    info = learner.hear()["info"]
    assert [p.hear()["received"] for p in generator(peers, info)] == [EXPECTED]
    learner.process.stdin.write("\n")
    learner.process.stdin.flush()
    assert learner.hear() == {"trained": True}  # the weights in its memory are others now
    both = generator(peers, info, workers=2) + generator(peers, info)  # at the same time; the last is a late one
    assert [p.hear()["received"] for p in both] == [EXPECTED] * 3


def test_a_receiver_that_dies_in_the_middle_takes_nobody_along_and_its_replacement_receives(peers):
    info = peers("send", timeout_s=DEADLINE, die=False).hear()["info"]
    (victim,) = generator(peers, info, stop_after=2)
    assert set(victim.hear()["stopped"]) == {"w0", "w1"}  # it was in the middle
    (beside,) = generator(peers, info)
    victim.process.send_signal(signal.SIGKILL)
    assert victim.process.wait(timeout=10) == -signal.SIGKILL
    assert beside.hear()["received"] == EXPECTED
    (replacement,) = generator(peers, info)
    assert replacement.hear()["received"] == EXPECTED


def test_a_sender_that_dies_in_the_middle_ends_the_transfer_within_the_deadline(peers):
    learner = peers("send", timeout_s=DEADLINE, die=True)
    began = time.monotonic()
    (receiver,) = generator(peers, learner.hear()["info"])
    assert "Error" in receiver.error()
    assert time.monotonic() - began < DEADLINE + STARTING
    assert learner.process.wait(timeout=10) == -signal.SIGKILL


def test_a_worker_that_never_comes_ends_its_engines_transfer_and_no_other(peers):
    info = peers("send", timeout_s=DEADLINE, die=False).hear()["info"]
    (alone,) = generator(peers, info, workers=2, come=1)
    (other,) = generator(peers, info)
    assert other.hear()["received"] == EXPECTED
    assert "Error" in alone.error()


def test_a_version_that_is_gone_is_refused_by_name(peers):
    info = peers("send", timeout_s=DEADLINE, die=False).hear()["info"]
    (late,) = generator(peers, info, version=2)
    assert late.error() == "ValueError: the learner cannot send these weights: version 2 is gone, the newest is 3"


def test_a_learner_that_is_gone_is_noticed_within_the_deadline(peers):
    learner = peers("send", timeout_s=2.0, die=False)
    info = learner.hear()["info"]
    learner.process.kill()
    learner.process.wait(timeout=10)
    (receiver,) = generator(peers, info)
    assert "Error" in receiver.error()
