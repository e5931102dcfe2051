import json

import numpy as np
import pytest
from fakes import FakeFleet, FakeVerifier, Prompts

from cures_ray.loop.evaluate import Evaluator
from cures_ray.loop.ports import WorkerLost
from cures_ray.loop.sample_log import SampleLog
from cures_ray.messages import RunError
from cures_ray.run.metric_table import metric_of


def ready(fleet: FakeFleet):
    for generator in fleet.members.values():
        generator.version = 3
    return fleet.generators


async def test_greedy_and_sampled_accuracy_are_reported_by_level():
    prompts = Prompts(40)
    metrics = await Evaluator(prompts, FakeVerifier(), samples_per_prompt=50)(3, ready(FakeFleet(prompts)))
    assert metrics["eval/version"] == 3
    assert metrics["eval/sampled_accuracy"] == pytest.approx(prompts.accuracy.mean(), abs=0.05)
    by_level = [metrics[f"eval/sampled_accuracy/level_{k}"] for k in range(4)]
    expected = [prompts.accuracy[prompts.levels == k].mean() for k in range(4)]
    assert np.allclose(by_level, expected, atol=0.1)


async def test_the_draws_are_the_same_at_every_version():
    prompts = Prompts(20)
    evaluator = Evaluator(prompts, FakeVerifier(), samples_per_prompt=4)
    generators = ready(FakeFleet(prompts))
    first, second = await evaluator(1, generators), await evaluator(2, generators)
    assert {**first, "eval/version": 0} == {**second, "eval/version": 0}
    assert [version for version, _ in evaluator.history] == [1, 2]


async def test_a_fault_is_not_solved_and_is_counted():
    prompts = Prompts(20)
    prompts.accuracy[:] = 1.0
    verifier = FakeVerifier(fault_every=5)
    metrics = await Evaluator(prompts, verifier, samples_per_prompt=1)(0, ready(FakeFleet(prompts)))
    assert metrics["eval/sampled_accuracy"] == pytest.approx(0.8)
    assert metrics["eval/greedy_faults"] == 4


async def test_intervals_lengths_and_the_versions_that_answered_are_reported_with_levels_of_any_type():
    prompts = Prompts(40)
    prompts.levels = np.array([f"Level {k % 3}" for k in range(40)])
    metrics = await Evaluator(prompts, FakeVerifier(), samples_per_prompt=2)(3, ready(FakeFleet(prompts)))
    assert metrics["eval/greedy_low"] < metrics["eval/greedy_accuracy"] < metrics["eval/greedy_high"]
    assert metrics["eval/version_min"] == metrics["eval/version_max"] == 3
    assert metrics["eval/completion_tokens"] > 0 and 0 <= metrics["eval/truncated"] <= 1
    assert {key.rpartition("_")[2] for key in metrics if "greedy_accuracy/" in key} == {"Level 0", "Level 1", "Level 2"}
    assert all(metric_of(key) for key in metrics)


async def test_a_prompt_of_a_lost_generator_goes_to_another():
    prompts = Prompts(10)
    fleet = FakeFleet(prompts, 2)
    fleet.members["g0"].die_after = 0
    metrics = await Evaluator(prompts, FakeVerifier())(0, ready(fleet))
    assert metrics["eval/greedy_faults"] == 0


async def test_an_evaluation_without_any_generator_ends_with_an_error(monkeypatch):
    monkeypatch.setattr("cures_ray.loop.evaluate.RETRIES", 1)
    with pytest.raises(RunError, match="could not be generated"):
        await Evaluator(Prompts(3), FakeVerifier())(0, lambda: [])


async def test_the_first_greedy_answers_are_written_for_people(tmp_path):
    prompts = Prompts(10)

    calls = []

    async def fetch(payload):
        calls.append(payload)
        if len(calls) == 1:
            raise WorkerLost("gone")
        return payload

    samples = SampleLog(tmp_path / "samples.jsonl", 3, fetch)
    evaluator = Evaluator(prompts, FakeVerifier(), samples_per_prompt=2, samples=samples)
    generators = ready(FakeFleet(prompts))
    await evaluator(0, generators)
    await evaluator(4, generators)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == [4, 4, 4]  # a lost payload costs its lines only
    later = [line for line in lines if line["version"] == 4]
    assert {line["prompt_id"] for line in later} == {prompts.row(i).prompt_id for i in range(3)}
    assert all(line["outcome"] in ("correct", "incorrect") and isinstance(line["completion"], str) for line in later)


async def test_the_best_constant_answer_stands_beside_every_accuracy():
    prompts = Prompts(8)
    evaluator = Evaluator(prompts, FakeVerifier(), constants={"best_constant_accuracy": 0.25})
    for version in (1, 2):
        metrics = await evaluator(version, ready(FakeFleet(prompts)))
        assert metrics["eval/best_constant_accuracy"] == 0.25
