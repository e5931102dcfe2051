"""The virtual-time benchmark, small: the clock is fair, and a slow control plane is seen."""

import asyncio
import json
import time

import pytest

from benchmarks.micro.virtual_time import main, simulate
from benchmarks.micro.virtual_world import Clock, run_in_virtual_time

FREE = {"driver_call_s": 0.0, "actor_call_s": 0.0}


def test_waiting_costs_no_real_time_and_work_elsewhere_no_virtual_time():
    clock = Clock()

    async def wait() -> None:
        began = clock.now()
        await asyncio.sleep(1000.0)
        assert clock.now() - began == pytest.approx(1000.0, abs=0.5)
        with clock.elsewhere():
            end = time.thread_time() + 0.05
            while time.thread_time() < end:
                pass
        assert clock.busy < 0.04
        clock.charge(2.0)
        assert clock.busy == pytest.approx(2.0, abs=0.04)

    began = time.monotonic()
    run_in_virtual_time(clock, wait())
    assert time.monotonic() - began < 10.0


def test_few_generators_reach_the_ideal_and_the_same_ones_behind_a_slow_driver_do_not():
    fast = simulate(2, 20.0, FREE, prompts=2048)
    assert fast["share"] > 0.9 and fast["driver_busy"] < 0.5 and fast["steps"] >= 2
    slow = simulate(2, 20.0, {"driver_call_s": 3.0, "actor_call_s": 0.0}, prompts=2048)
    assert slow["share"] < 0.8 * fast["share"] and slow["driver_busy"] > 0.9
    ledger = simulate(2, 20.0, {"driver_call_s": 0.0, "actor_call_s": 1.0}, prompts=2048)
    assert ledger["ledger_busy"] > 0.9 and ledger["ledger_wait_p99_s"] > 1.0


def test_groups_travel_as_one_lease():
    cell = simulate(1, 20.0, FREE, group=8, prompts=2048)
    assert cell["rollouts_a_prompt"] == 8 and cell["share"] > 0.6
    assert cell["steps"] >= 2, "assembling and committing batches is part of what is measured"


def test_a_result_names_its_cells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.micro.virtual_time.ray_cost", lambda: FREE)
    assert main(["--cell", "1,10,1", "--repeats", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "virtual_time.json").read_text())
    assert result["figures"]["share_1_generators_10_s_n1"] > 0 and len(result["rows"]) == 1
    assert "goal" in capsys.readouterr().out
