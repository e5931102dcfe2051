"""The in-process engine: the real driver, ledger, assembly and losses over a tiny model. Keeps the harness alive."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.analysis import by_arm
from benchmarks.harness.cell import Spec, config_of, run_cell
from benchmarks.harness.convergence import parser, write_report
from benchmarks.harness.sweep import Sweep
from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.engine import ExactAccuracy, RowCache, make_curriculum, run_in_process
from benchmarks.inprocess.judges import chain, program
from benchmarks.inprocess.local_learner import LocalLearner
from benchmarks.inprocess.oracle_sigma import MeasuredMoments, install
from benchmarks.inprocess.sampler import Request, Sampler, _streams, _uniforms
from cures_ray.messages import Outcome, PromptRow
from cures_ray.run.preflight import prepare_inputs
from cures_ray.synthetic.base_model import BOX, BaseModelSpec, prepare
from cures_ray.synthetic.tasks import TASKS, generate, solve_chain, to_row
from cures_ray.verify.mathematics import verify_math

TINY = {"prompts": 96, "eval_prompts": 48, "sft_steps": 250, "sft_batch": 24, "hidden": 48, "layers": 2, "heads": 4}
SMALL_BATCH = {"curriculum.rollouts_per_step": 64, "curriculum.prompts_per_step": 8}
WIDE_BATCH = {"curriculum.rollouts_per_step": 64, "curriculum.prompts_per_step": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """Two tiny base models of the chain task that know the form of an answer and little else."""
    folder = tmp_path_factory.mktemp("bases")
    for seed in (0, 1):
        spec = BaseModelSpec(task="chain", variant="T", seed=seed, **TINY)
        prepare(folder / f"chain-T-{seed}", spec, log=lambda line: None)
    return folder


def spec(bases: Path, label: str, seed: int = 0, budget: int = 256, **extra) -> Spec:
    batch = WIDE_BATCH if label.startswith(("wide", "random_wide")) else SMALL_BATCH
    return Spec(
        label=label,
        seed=seed,
        engine="inprocess",
        task="chain",
        variant="T",
        budget=budget,
        extra=batch | {"eval.interval": 2, "learner.lr": 3e-3} | extra,
        base=str(bases / f"chain-T-{seed}"),
    )


def sampler_of(bases: Path) -> tuple[Sampler, RowCache]:
    inputs = prepare_inputs(config_of(spec(bases, "grpo"), Path("unused")), claim_run_dir=False, test_verifier=False)
    from cures_ray.learning.policy import load_model

    return Sampler(load_model(inputs.config), inputs.tokenizer, 1.0, 12), RowCache(inputs.train)


def request(row: PromptRow, n: int, seed: int = 5, greedy: bool = False) -> Request:
    return Request(row.token_ids, n, seed, greedy)


def test_two_methods_on_two_seeds_keep_the_harness_alive(bases, tmp_path):
    began = time.process_time()
    records = [run_cell(spec(bases, label, seed), tmp_path) for seed in (0, 1) for label in ("grpo", "wide")]
    arms_found = by_arm(records)
    assert set(arms_found) == {"grpo", "wide"} and all(len(runs) == 2 for runs in arms_found.values())
    for record in records:
        account, end = record["accounting"], record["curve"][-1]
        assert account["planned"] == account["trained"] + sum(account["discarded"].values()) == 256
        updates = sum(step["learner/grad_norm"] > 0 for step in record["steps"])  # no mixed group: no update
        assert (end["rollouts"], end["optimizer_steps"]) == (256, updates) and 2 <= updates <= 4
        assert end["generated_tokens"] > 256 and end["learner_flops"] > 0 and end["seconds"] > 0
        assert record["curve"][0]["rollouts"] == 0
        json.dumps(record)
    for seed in (0, 1):  # paired: the same start, the same evaluation
        starts = {arms_found[label][seed]["curve"][0]["sampled"] for label in arms_found}
        assert len(starts) == 1
    assert (
        arms_found["wide"][0]["plans"][0]["distinct_prompts"]
        > 4 * arms_found["grpo"][0]["plans"][0]["distinct_prompts"]
    )
    write_report(parser().parse_args(["--out", str(tmp_path)]), ["grpo", "wide"], records, "a test")
    assert (tmp_path / "report.html").exists()
    assert time.process_time() - began < 40


def test_a_cell_runs_in_a_process_of_its_own(bases, tmp_path):
    one = spec(bases, "grpo", budget=64)
    sweep = Sweep(tmp_path, log=lambda line: None, timeout_s=120)
    sweep.run([one])
    record = sweep.result(one)
    assert record is not None and record["status"] == "done", record
    assert record["spec"] == asdict(one) and record["accounting"]["planned"] == 64


def test_a_run_can_be_repeated_exactly(bases, tmp_path):
    first, second = (run_cell(spec(bases, "wide_cures", budget=192), tmp_path)["curve"] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_uniform_through_the_curriculum_is_grpo(bases, tmp_path):
    plain = run_cell(spec(bases, "grpo"), tmp_path)
    through = run_cell(spec(bases, "uniform_curriculum"), tmp_path)
    assert [p["sampled"] for p in plain["curve"]] == [p["sampled"] for p in through["curve"]]
    assert [p["reward"] for p in plain["plans"]] == [p["reward"] for p in through["plans"]]


@pytest.mark.parametrize("label", ["random_grpo", "random_wide"])
def test_random_rewards_gain_nothing(bases, tmp_path, label):
    record = run_cell(spec(bases, label, budget=512), tmp_path)
    rewards = [p["reward"] for p in record["plans"]]
    assert abs(float(np.mean(rewards)) - 0.5) < 0.07  # 512 coins: three standard deviations
    assert record["curve"][-1]["sampled"] - record["curve"][0]["sampled"] < 0.03


def test_the_sigma_oracle_measures_what_the_policy_does(bases):
    config = config_of(spec(bases, "sigma_last_layer"), Path("unused"))
    inputs = prepare_inputs(config, claim_run_dir=False, test_verifier=False)
    sampler, rows = sampler_of(bases)
    measured = MeasuredMoments(LocalLearner(config, Costs()), sampler, chain, rows.all)
    curriculum = make_curriculum(config, inputs)
    install(curriculum, measured)
    index = np.arange(12)
    first, second = curriculum.pool.belief.moments(index), curriculum.pool.belief.moments(index)
    assert measured.calls == 2
    assert first.m_minus.shape == (12,)
    assert np.isfinite(first.m_minus).all()  # a base model that knows little fails on every prompt now and then
    assert (first.m_minus != second.m_minus).any()  # fresh rollouts
    assert np.corrcoef(first.m_minus, second.m_minus)[0, 1] > 0.8  # of the same prompts
    with pytest.raises(ValueError, match="last_layer"):
        install(make_curriculum(config_of(spec(bases, "sigma_bernoulli"), Path("unused")), inputs), measured)


def test_the_sigma_oracle_runs_as_an_arm(bases, tmp_path):
    record = run_cell(spec(bases, "oracle_sigma", budget=128), tmp_path)
    assert record["accounting"]["trained"] == 128


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_staleness_is_what_the_driver_makes_it(bases, eta):
    config = config_of(spec(bases, "grpo", budget=384, **{"async_rl.max_staleness": eta}), Path("unused"))
    inputs = prepare_inputs(config, claim_run_dir=False, test_verifier=False)
    run = run_in_process(config, inputs, "chain")
    lags = [step["staleness/max"] for step in run.steps]
    assert lags == [min(eta, i) for i in range(6)]
    assert run.accounting.trained == 384
    assert run.steps[0]["learner/logprob_diff"] < 1e-5  # learner and generator have the same weights


def test_a_sampled_rollout_does_not_depend_on_its_batch(bases):
    sampler, rows = sampler_of(bases)
    alone = sampler.sample([request(rows.row(0), 3)])[0]
    among = sampler.sample([request(rows.row(i), 4, seed=i) for i in range(1, 9)] + [request(rows.row(0), 3)])[-1]
    for (a, score_a, *_), (b, score_b, *_) in zip(alone, among, strict=True):
        assert a.tolist() == b.tolist() and np.allclose(score_a, score_b, atol=1e-4)


@pytest.mark.parametrize("size", ["small", "large"])
def test_what_is_sampled_is_that_of_one_token_after_the_other_without_a_cache(bases, size, monkeypatch):
    """Common prefix, batches by length, rollouts that leave the batch: none of them changes a token."""
    if size == "large":
        monkeypatch.setattr("benchmarks.inprocess.sampler.LARGE", 0)
        monkeypatch.setattr("benchmarks.inprocess.sampler.LEAST_PREFIX", 1)
    sampler, rows = sampler_of(bases)
    requests = [
        Request(rows.row(i).token_ids[: 10 - 2 * (i % 4)], 2 + i % 3, seed=i, greedy=i % 5 == 0) for i in range(24)
    ]
    assert (len(sampler._batches(requests)) > 1) == (size == "large")
    groups = sampler.sample(requests)
    assert len({len(ids) for group in groups for ids, *_ in group}) > 2  # some stop early
    for asked, group in zip(requests, groups, strict=True):
        streams = _streams(asked.seed, asked.n)
        for j, (ids, scores, *_) in enumerate(group):
            assert scores == pytest.approx(sampler.token_logprobs([asked.prompt], [ids])[0], abs=1e-4)
            tokens = list(asked.prompt)
            for t, token in enumerate(ids):
                logits = sampler.model(torch.as_tensor([tokens])).logits[0, -1]
                cumulative = torch.softmax(logits, -1).cumsum(-1).numpy()
                u = float(_uniforms(streams[j : j + 1], t)[0])
                expected = int(logits.argmax()) if asked.greedy else int(np.searchsorted(cumulative, u))
                near = np.abs(cumulative[max(int(token) - 1, 0) : int(token) + 1] - u).min() < 1e-5
                assert token == expected or (near and not asked.greedy)  # rounding at the very border
                tokens.append(int(token))


def test_greedy_answers_are_the_most_likely_ones(bases):
    sampler, rows = sampler_of(bases)
    greedy, other = (sampler.sample([request(rows.row(0), 1, seed=s, greedy=True)])[0][0] for s in (1, 2))
    assert greedy[0].tolist() == other[0].tolist()


def test_the_exact_accuracy_is_what_sampling_measures(bases):
    sampler, rows = sampler_of(bases)
    exact = ExactAccuracy(sampler, rows, "chain")().mean()
    groups = sampler.sample([request(row, 16, seed=i) for i, row in enumerate(rows.all)])
    rewards = [chain(text, row) for group, row in zip(groups, rows.all, strict=True) for *_, text in group]
    error = max(np.std(rewards), 0.02) / len(rewards) ** 0.5
    assert abs(exact - np.mean(rewards)) < 4 * error


def test_frequencies_of_sampled_tokens_are_their_probabilities(bases):
    sampler, rows = sampler_of(bases)
    group = sampler.sample([request(rows.row(1), 1000)])[0]
    second = [(int(ids[1]), float(score[1])) for ids, score, *_ in group if len(ids) > 1 and ids[0] == group[0][0][0]]
    token, score = max(second, key=lambda pair: pair[1])
    share = np.mean([t == token for t, _ in second])
    assert abs(share - np.exp(score)) < 0.08


def chain_completions(problem, rng: np.random.Generator) -> list[str]:
    """Right, wrong and broken answers such as the model writes."""
    right = solve_chain(problem, None, rng)
    body = right.removeprefix(BOX).removesuffix("}")
    changed = f"{(int(body) + 1):0{len(body)}d}"
    return [
        right,
        BOX + changed + "}",
        BOX + body.lstrip("0") + "}",
        BOX + "00" + body + "}",
        BOX + body,
        body,
        "",
        BOX + "}",
        BOX + body + "}" + BOX + changed + "}",
        BOX + changed + "}" + BOX + body + "}",
        BOX + body[:-2] + "}",
        BOX + body + "a}",
    ]


def row_of(problem, task: str) -> PromptRow:
    columns = to_row(problem, task)
    return PromptRow(prompt_id="0" * 16, text="", token_ids=np.zeros(1, np.int32), answer=columns["answer"], row={})


def test_the_chain_judge_gives_the_verdicts_of_the_real_verifier():
    rng = np.random.default_rng(0)
    for problem in generate("chain", seed=3, count=40):
        row = row_of(problem, "chain")
        for completion in chain_completions(problem, rng):
            verdict = verify_math(completion, problem.answer)
            assert verdict.outcome is not Outcome.FAULT
            assert chain(completion, row) == float(verdict.outcome is Outcome.CORRECT), (completion, problem.answer)


def test_the_chain_judge_agrees_on_what_the_model_writes(bases):
    sampler, rows = sampler_of(bases)
    groups = sampler.sample([request(row, 4, seed=i) for i, row in enumerate(rows.all)])
    for group, row in zip(groups, rows.all, strict=True):
        for *_, text in group:
            assert chain(text, row) == float(verify_math(text, row.answer).outcome is Outcome.CORRECT), text


def test_the_program_judge_knows_right_from_wrong():
    rng = np.random.default_rng(1)
    skill = TASKS["program"].skill(np.random.default_rng(2), "T")
    for problem in generate("program", seed=3, count=30):
        row = row_of(problem, "program")
        right = TASKS["program"].solve(problem, None, rng)
        assert program(right, row) == 1.0
        taught = TASKS["program"].solve(problem, skill, rng)
        assert program(taught, row) == float(taught == right)
        for broken in (right.removesuffix("]\n```"), right.replace("return", "retrun"), "", "[1,2]"):
            assert program(broken, row) == 0.0
        assert program(right.replace("[", "[0+").replace("+0]", "]"), row) == 1.0
