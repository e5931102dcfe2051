import json

import numpy as np
import pytest

from cures_ray.data.features import prompt_features
from cures_ray.synthetic.tasks import BOX, CODE_CLOSE, CODE_OPEN, KEYS, TASKS, apply, generate, rotate, to_row


def success(task: str, variant: str, seed: int = 0, samples: int = 8) -> np.ndarray:
    """Accuracy of the partly wrong tables themselves, per problem."""
    spec, rng = TASKS[task], np.random.default_rng([seed, 17])
    skill = spec.skill(rng, variant)
    problems = generate(task, seed=seed, count=300)
    return np.array(
        [np.mean([spec.solve(p, skill, rng) == spec.solve(p, None, rng) for _ in range(samples)]) for p in problems]
    )


def test_a_chain_is_evaluated_from_left_to_right_modulo_13():
    for problem in generate("chain", seed=3, count=200):
        expression = problem.text.rstrip(".").rstrip("=")
        value = int(expression[:2])
        values = [value]
        for i in range(2, len(expression), 3):
            value = apply(expression[i], value, int(expression[i + 1 : i + 3]))
            values.append(value)
        assert problem.answer == "".join(f"{v:02d}" for v in values)
        assert problem.level == len(values) - 1 and 0 <= max(values) < 13
        assert not problem.answer.startswith("00")


def test_a_program_agrees_with_its_examples_and_hidden_tests():
    rng = np.random.default_rng(0)
    for problem in generate("program", seed=3, count=100):
        code = TASKS["program"].solve(problem, None, rng)
        scope: dict = {}
        exec(code.removeprefix("```python\n").removesuffix("\n```"), scope)  # our own text, not a model's
        tests = json.loads(problem.answer)
        assert [scope["f"](*arguments) for arguments in tests["inputs"]] == tests["outputs"]
        parts = problem.text.split("=")[1].rstrip(".").split(";")
        shown = [[int(part[i : i + 3]) for i in range(0, len(part), 3)] for part in parts]
        assert [list(column) for column in zip(*(scope["f"](x) for x in (0, 1, 2)), strict=True)] == shown
        assert len(shown) == problem.level


@pytest.mark.parametrize("task", list(TASKS))
def test_the_gold_completion_is_found_from_the_prompt(task):
    for problem in generate(task, seed=5, count=200):
        solved = TASKS[task].solve(problem, None, np.random.default_rng(0))
        assert TASKS[task].gold(f"<|user|>{problem.text}<|assistant|>", problem.answer) == solved


@pytest.mark.parametrize("task", list(TASKS))
def test_problems_are_distinct_reproducible_and_balanced_over_the_levels(task):
    problems = generate(task, seed=1, count=240)
    assert problems == generate(task, seed=1, count=240) != generate(task, seed=2, count=240)
    assert len({p.text for p in problems}) == 240
    shares = [sum(p.level == level for p in problems) for level in TASKS[task].levels]
    assert min(shares) > 0.6 * 240 / len(TASKS[task].levels)
    held_out = generate(task, seed=1, count=60, exclude={p.text for p in problems})
    assert not {p.text for p in held_out} & {p.text for p in problems}


def test_levels_are_a_parameter_and_impossible_wishes_are_refused():
    assert {p.level for p in generate("chain", seed=0, count=40, levels=(2, 5, 5))} == {2, 5}
    with pytest.raises(ValueError, match="do not hold"):
        generate("chain", seed=0, count=500, levels=(1,))
    with pytest.raises(ValueError, match="levels 1 to 6"):
        generate("chain", seed=0, count=1, levels=(7,))
    with pytest.raises(ValueError, match="there are chain, chain_opaque, program"):
        generate("sums", seed=0, count=1)


@pytest.mark.parametrize("variant", ["N", "T"])
@pytest.mark.parametrize("task", list(TASKS))
def test_partly_wrong_tables_make_prompts_that_differ_widely_in_difficulty(task, variant):
    for seed in range(2):
        accuracy = success(task, variant, seed)
        assert 0.2 <= accuracy.mean() <= 0.4
        assert (accuracy < 0.2).mean() > 0.35 and (accuracy > 0.8).mean() > 0.08


def test_a_misconception_is_shared_in_variant_t_and_not_in_variant_n():
    spec = TASKS["chain"]
    for variant, shared in (("T", True), ("N", False)):
        entries = spec.skill(np.random.default_rng(0), variant).entries
        shifts = {(wrong - apply("*", a, 5)) % 13 for a in range(13) for _, wrong in [entries["*", a, 5]]}
        assert (len(shifts) == 1) is shared and 0 not in shifts


@pytest.mark.parametrize("task", list(TASKS))
def test_a_derivation_ends_in_what_the_verifier_reads(task):
    rng = np.random.default_rng(0)
    problem = generate(task, seed=0, count=1)[0]
    completion = TASKS[task].solve(problem, None, rng)
    if task != "program":
        assert completion == BOX + problem.answer + "}"
    else:
        assert completion.startswith(CODE_OPEN) and completion.endswith(CODE_CLOSE)
    row = to_row(problem, task)
    assert row["prompt"] == [{"role": "user", "content": problem.text}] and row["level"] == problem.level


def test_the_mathematical_verifier_tells_every_one_digit_mistake():
    from math_verify import parse, verify

    for problem in generate("chain", seed=4, count=12):
        gold = parse(BOX + problem.answer + "}")
        assert verify(gold, parse(BOX + problem.answer + "}"))
        digits = problem.answer
        for i in range(len(digits)):
            other = digits[:i] + str((int(digits[i]) + 1) % 10) + digits[i + 1 :]
            assert not verify(gold, parse(BOX + other + "}"))
        assert not verify(gold, parse(BOX + digits[:-2] + "}"))


def test_an_opaque_chain_hides_from_a_linear_model_of_its_text_what_a_plain_chain_shows():
    for problem in generate("chain_opaque", seed=3, count=100):
        key, written = KEYS.index(problem.text[0]), problem.text[3:-1]
        steps = [(rotate(written[i], -key), int(written[i + 1 : i + 3])) for i in range(0, len(written), 3)]
        assert (int(problem.text[1:3]), *steps) == problem.facts  # the text and its key say which chain it is
    skill = {task: linear_skill(task) for task in ("chain", "chain_opaque")}
    assert skill["chain"] > 0.3 and skill["chain_opaque"] < 0.05


def linear_skill(task: str) -> float:
    """Share of the variance of held-out success that ridge regression on the text's features explains."""
    spec, rng = TASKS[task], np.random.default_rng([0, 17])
    table = spec.skill(rng, "T")
    problems = generate(task, seed=0, count=3000, levels=(3,))
    success = np.array(
        [np.mean([spec.solve(p, table, rng) == spec.solve(p, None, rng) for _ in range(4)]) for p in problems]
    )
    x = np.concatenate([np.ones((3000, 1)), prompt_features([p.text for p in problems])], 1)
    train, test = slice(0, 2000), slice(2000, 3000)
    weights = np.linalg.solve(x[train].T @ x[train] + 0.3 * np.eye(x.shape[1]), x[train].T @ success[train])
    return float(1 - np.mean((x[test] @ weights - success[test]) ** 2) / success[test].var())
