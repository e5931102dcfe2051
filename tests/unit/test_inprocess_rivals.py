"""SPO's drift and the permuted control on the in-process engine; the protocol's cells and tables."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import protocol
from benchmarks.harness.cell import config_of
from benchmarks.harness.paired import holm, mean_accuracy, paired
from benchmarks.harness.real_task import REAL_TASK
from benchmarks.inprocess.controls import permuted
from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.drift import DriftMeter
from benchmarks.inprocess.engine import make_curriculum
from benchmarks.inprocess.sampler import Sampler
from cures_ray.messages import Lease, PromptRow

VOCABULARY, LENGTH = 11, 5


class Letters:
    """A tokenizer of numbers."""

    eos_token_id, pad_token_id = 1, 0

    def batch_decode(self, ids, skip_special_tokens=True):
        return [" ".join(map(str, line)) for line in ids]


def model(seed: int = 0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **shape))


def row(i: int) -> PromptRow:
    return PromptRow(prompt_id=str(i), text="", token_ids=np.arange(2, 5 + i % 2, dtype=np.int32), answer="")


def lease(index: int, number: int, weight: float = 1.0) -> Lease:
    return Lease(
        lease_id=number, attempt=0, prompt_index=index, prompt_id=str(index), n=1, batch=0, round=0, weight=weight,
        alpha=1.0, beta=1.0, seed=number,
    )  # fmt: skip


class Pool:
    def __init__(self) -> None:
        self.drift: dict[int, float] = {}
        self.pool = self  # a curriculum has a pool

    def note_drift(self, index, drift) -> None:
        self.drift |= dict(zip(index.tolist(), drift.tolist(), strict=True))


def sampled(sampler: Sampler, index: int) -> list:
    """One response whose log-probabilities are those of the policy now."""
    answer = np.array([5, 6, 7, 8][: 2 + index], np.int32)
    return [(answer, sampler.token_logprobs([row(index).token_ids], [answer])[0], True, "")]


def test_drift_is_the_change_of_log_probabilities_on_the_last_response_and_is_charged():
    sampler, costs, pool = Sampler(model(), Letters(), 1.0, LENGTH), Costs(), Pool()
    meter = DriftMeter(sampler, [row(0), row(1)], costs)
    meter.measure(pool, [lease(0, 1), lease(1, 2), lease(0, 9, weight=0.0)])
    assert pool.drift == {0: 0.0, 1: 0.0} and costs.prompt_tokens == 0  # first responses, nothing to compare
    first = {i: sampled(sampler, i) for i in (0, 1)}
    meter.record(1, first[0])
    meter.record(2, first[1])
    meter.measure(pool, [lease(0, 3)])
    assert pool.drift[0] == pytest.approx(0.0, abs=1e-6)  # the same policy
    charged = costs.prompt_tokens
    assert charged == len(row(0).token_ids) + 2
    sampler.load(model(1))
    meter.measure(pool, [lease(0, 4), lease(1, 5)])
    for i in (0, 1):
        ids, then, *_ = first[i][0]
        now = sampler.token_logprobs([row(i).token_ids], [ids])[0]
        assert pool.drift[i] == pytest.approx(np.abs(then - now).mean()) and pool.drift[i] > 0.001
    assert costs.prompt_tokens == charged + 5 + 3 + len(row(1).token_ids) and costs.generation_flops > 0


def test_permuted_features_are_those_of_other_prompts_and_the_levels_go_along():
    levels, features = np.arange(50), np.arange(100.0).reshape(50, 2)
    own_levels, own_features = permuted(3, 50, levels, features)
    assert sorted(own_levels) == list(range(50)) and np.mean(own_levels == levels) < 0.2
    assert (own_features[:, 0] == 2 * own_levels).all()
    again = permuted(3, 50, levels, features)
    assert (again[0] == own_levels).all() and (permuted(4, 50, levels, features)[0] != own_levels).any()
    assert permuted(3, 50, None, None) == (None, None)


# -- protocol -------------------------------------------------------------------------------------------------------


def cells(*words: str) -> list:
    return protocol.make_specs(protocol.parser().parse_args([*words, "--out", "o"]))


@pytest.mark.parametrize("words", [["a"], ["a", "--arms", "6", "--seeds", "10"], ["b"], ["c", "--seeds", "2"]])
def test_every_cell_of_the_protocol_is_a_configuration(words):
    specs = cells(*words)
    assert len({spec.name for spec in specs}) == len(specs)
    for one in {(spec.label, spec.task): spec for spec in specs}.values():
        config = config_of(one, Path("run"))
        assert config.trainer.rollout_budget == one.budget and config.async_rl.max_staleness == 0


def test_part_a_has_four_arms_here_and_six_on_a_gpu_at_a_quarter_of_the_batch():
    here = cells("a")
    assert [spec.label for spec in here[:4]] == list(protocol.FOUR) and len(here) == 6 * 4
    assert len(cells("a", "--arms", "6", "--seeds", "10")) == 60
    shapes = {
        spec.label: (c.prompts_per_step, c.rollouts_per_step)
        for spec in here
        for c in [config_of(spec, Path("run")).curriculum]
    }
    assert shapes.pop(protocol.GRPO) == (16, 64)
    assert set(shapes.values()) == {(64, 64)}
    assert {spec.task for spec in here} == {REAL_TASK} and len({spec.base for spec in here}) == 1


def test_the_seeds_of_the_parts_are_their_own():
    found = [set(protocol.seeds_of(None, part)) for part in "abc"]
    assert not (found[0] & found[1] or found[1] & found[2] or found[0] & found[2])
    assert not set().union(*found) & {100, 101}
    assert protocol.seeds_of("7,9", "a") == [7, 9]


def test_tuned_rates_go_to_their_arms_and_the_default_lends_its_own():
    rates = {"default": 1e-3, "grpo@prompts_per_step=64": 5e-4}
    assert protocol.rated("default_permuted", rates) == "default_permuted@learner.lr=0.001"
    assert protocol.rated(protocol.GRPO, rates) == "grpo@prompts_per_step=64@learner.lr=0.0005"
    assert protocol.rated("rpp_single", rates) == "rpp_single"


def test_mean_accuracy_is_the_area_over_the_budget():
    curve = [{"rollouts": x, "greedy": y} for x, y in ((0, 0.0), (100, 0.5), (200, 0.5))]
    assert mean_accuracy(curve, "greedy", 200) == pytest.approx(0.375)
    assert mean_accuracy(curve, "greedy", 100) == pytest.approx(0.25)
    assert mean_accuracy(curve, "greedy", 150) == pytest.approx((25 + 25) / 150)
    assert mean_accuracy(curve, "greedy", 400) == pytest.approx((75 + 100) / 400)  # a run that ended early


def test_paired_differences_have_students_interval_and_power():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.5, 0.2, 10), np.zeros(10)
    test = paired(one, two)
    from scipy import stats

    assert test.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert (test.low, test.high) == pytest.approx(stats.t.interval(0.95, 9, one.mean(), one.std(ddof=1) / np.sqrt(10)))
    found = np.mean([paired(rng.normal(test.detectable, test.sd, 10), two).p < 0.05 for _ in range(800)])
    assert 0.74 < found < 0.86
    assert paired(one, two).seeds_for(test.detectable) == 10
    with pytest.raises(ValueError, match="two seeds"):
        paired(one[:1], two[:1])


def test_holm_is_the_step_down_rule():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def record(arm: str, seed: int, height: float) -> dict:
    curve = [
        {"rollouts": 1024.0 * i, "tokens": 1.0 + i, "learner_flops": 1.0 + i, "seconds": 1.0 + i, "optimizer_steps": i,
         "generated_tokens": i, "greedy": 0.2 + height * i / 20, "sampled": 0.1 + height * i / 20}
        for i in range(21)
    ]  # fmt: skip
    spec = {"label": arm, "seed": seed, "task": "chain", "variant": "T", "budget": 20480, "levels": []}
    return {"status": "done", "spec": spec, "curve": curve, "config": {"learner": {"lr": 1e-3}}}


def test_the_report_has_the_family_of_tests_and_names_what_is_underpowered():
    rng = np.random.default_rng(0)
    records = [
        record(arm, seed, height + rng.normal(0, spread))
        for seed in range(4)
        for arm, height, spread in ((protocol.GRPO, 0.3, 0.001), (protocol.SPO, 0.5, 0.3), ("default", 0.5, 0.001))
    ]
    text = protocol.report("b", records, "a test")
    lines = [line for line in text.splitlines() if line.startswith("| default −")]
    assert len(lines) == 4
    assert all("underpowered" in line for line in lines if "spo_nopilot" in line)
    assert not any("underpowered" in line for line in lines if "grpo" in line)
    assert "`spo_nopilot`: Beta" in text


def test_the_curriculum_of_the_permuted_control_sees_other_levels(monkeypatch):
    seen = {}

    class Spy:
        def __init__(self, config, ids, levels, features):
            seen.update(levels=levels, features=features)

    levels, features = np.arange(20), np.arange(40.0).reshape(20, 2)
    monkeypatch.setattr("benchmarks.inprocess.engine.Curriculum", Spy)
    monkeypatch.setattr(
        "benchmarks.inprocess.engine.curriculum_columns", lambda config, table: (np.arange(20), levels, features)
    )
    config = config_of(cells("b", "--seeds", "60,61")[0], Path("run"))
    inputs = argparse.Namespace(train=None)
    make_curriculum(config, inputs, permute=True)
    assert (seen["levels"] != levels).any() and (seen["features"][:, 0] == 2 * seen["levels"]).all()
    make_curriculum(config, inputs)
    assert (seen["levels"] == levels).all()
