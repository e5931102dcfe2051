"""One process of a collective transfer: `python collective_peer.py send|receive JSON`; speaks JSON lines on stdout.

send:     publishes version 3 and prints its info; on each line of stdin changes the weights, as training does. Dies by
          SIGKILL after its first chunks when told so.
receive:  prints the checksum of what arrived. Sleeps in the middle when told so, until it is killed.
"""

import json
import os
import signal
import sys
import time

import torch

from actors.weights import collective
from actors.weights.backend import Settings
from actors.weights.stream import Source

CHUNK = 4 << 20


def say(**words) -> None:
    print(json.dumps(words), flush=True)


def model(value: float) -> torch.nn.Module:
    """8 tensors, 64 MB: more than the sockets between two processes hold."""
    module = torch.nn.Module()
    for i in range(8):
        module.register_parameter(f"w{i}", torch.nn.Parameter(torch.full((1 << 21,), value + i)))
    return module


def send(timeout_s: float, die: bool) -> None:
    settings = Settings(backend="gloo", folder=None, timeout_s=timeout_s, chunk_bytes=CHUNK)
    publisher = collective.Publisher(settings)
    module = model(1.0)
    info = publisher.publish(Source(module), 3)
    if die:
        publisher._held = {3: Deadly(publisher._held[3])}
    say(info=info)
    for _ in sys.stdin:
        for parameter in module.parameters():
            parameter.data.fill_(-1.0)
        say(trained=True)


class Deadly(list):
    """Kills its process when the third chunk is asked for."""

    def __iter__(self):
        for i, chunk in enumerate(super().__iter__()):
            if i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk


def receive(update: dict, rank: int, stop_after: int | None) -> None:
    sums = {}
    for name, tensor in collective.receive(update, torch.device("cpu"), rank):
        sums[name] = float(tensor.double().sum())
        if len(sums) == stop_after:
            say(stopped=sums)
            time.sleep(600)
    say(received=sums)


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](**json.loads(sys.argv[2]))
