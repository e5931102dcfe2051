"""Public data sets in the Hub's formats; the rows are made by hand, with the columns and types of the originals."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cures_ray.config import Config, DataConfig
from cures_ray.curriculum.machine import Curriculum
from cures_ray.data.presets import DATA_PRESETS, EVAL_SETS, eval_settings
from cures_ray.data.table import curriculum_columns, load_prompts
from cures_ray.evaluation.scores import JudgedAnswer
from cures_ray.loop.evaluate import Evaluator
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import build_tokenizer

# name -> (a row as the Hub has it, its gold)
EVAL_ROWS = {
    "math500": (
        {
            "problem": "1+1?",
            "solution": "so \\boxed{2}",
            "answer": "2",
            "subject": "Algebra",
            "level": 5,
            "unique_id": "a",
        },
        "2",
    ),
    "gsm8k": ({"question": "Ann has 40 and 2.", "answer": "40+2=<<40+2=42>>42\n#### 42"}, "42"),
    "gaokao2023en": ({"question": "x?", "answer": "$\\frac{1}{2}$", "source": "gk", "id": 1}, "$\\frac{1}{2}$"),
    "minerva": ({"question": "How long?", "answer": "1.6"}, "1.6"),
    "olympiadbench": (
        {"question": "x?", "final_answer": ["$3$"], "is_multiple_answer": False, "subject": "Math"},
        "$3$",
    ),
    "aime24": (
        {"id": 60, "problem": "t?", "solution": "\\boxed{204}", "answer": "204", "url": "u", "year": "2024"},
        "204",
    ),
    "aime25": ({"problem": "b?", "answer": "70", "id": "0"}, "70"),
    "amc23": ({"id": 0, "question": "miles?", "answer": 27.0, "url": "u"}, "27"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", list(EVAL_SETS))
def test_an_evaluation_set_is_read_from_a_local_file_with_the_columns_of_the_hub(tmp_path, tokenizer, name):
    row, gold = EVAL_ROWS[name]
    write(tmp_path / f"{name}.jsonl", [row])
    table = load_prompts(DataConfig().model_copy(update=eval_settings(name, tmp_path)), tokenizer, "eval")
    prompt = row.get("problem") or row["question"]
    assert (table.row(0).text, table.row(0).answer) == (f"<|user|>{prompt}<|assistant|>", gold)


def test_without_a_local_file_the_hub_is_named_and_unknown_names_are_refused(tmp_path):
    assert eval_settings("math500", tmp_path)["eval"] == "HuggingFaceH4/MATH-500:test"
    assert [n for n, preset in EVAL_SETS.items() if preset.samples == 16] == ["aime24", "aime25", "amc23"]
    with pytest.raises(ConfigError, match="there are math500, gsm8k"):
        eval_settings("math501")


WORKED = "We add.\nSo the total is $\\boxed{\\frac{3}{4}}$."
# preset -> rows as the Hub has them, the golds of those that are kept, and their levels
TRAIN_ROWS = {
    "gsm8k": (
        [{"question": "Ann sells 48 and 24.", "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"},
         {"question": "A house costs $1,080.", "answer": "#### 1,080"}],
        ["72", "1080"],
        None,
    ),
    "math": (
        [{"problem": "p", "level": "Level 5", "type": "Algebra", "solution": WORKED},
         {"problem": "q", "level": "Level ?", "type": "Geometry", "solution": "No answer here."},
         {"problem": "r", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{7}"}],
        ["\\frac{3}{4}", "7"],
        ["Level 5", "Level 1"],
    ),
    "numina_math": (
        [{"source": "olympiads", "problem": "Prove it.", "solution": "Q.E.D.",
          "messages": [{"role": "user", "content": "Prove it."}, {"role": "assistant", "content": "Q.E.D."}]},
         {"source": "amc_aime", "problem": "Find it.", "solution": WORKED,
          "messages": [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": WORKED}]}],
        ["\\frac{3}{4}"],
        ["amc_aime"],
    ),
    "numina_math_1_5": (
        [{"problem": "a", "solution": "s", "answer": "proof", "problem_type": "Algebra", "source": "olympiads"},
         {"problem": "b", "solution": "s", "answer": "notfound", "problem_type": "Algebra", "source": "olympiads"},
         {"problem": "c", "solution": "s", "answer": "x=3", "problem_type": "Algebra", "source": "cn_k12"}],
        ["x=3"],
        ["cn_k12"],
    ),
    "dapo_math": (
        [{"data_source": "math_dapo", "prompt": [{"content": "Solve: 1+33", "role": "user"}], "ability": "MATH",
          "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": "9a"}}] * 3,
        ["34"],  # the set repeats each prompt a hundred times
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", list(DATA_PRESETS))
def test_a_training_set_is_read_with_the_columns_of_the_hub(tmp_path, tokenizer, name, suffix):
    rows, golds, levels = TRAIN_ROWS[name]
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        write(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    table = load_prompts(DataConfig(train=str(path), preset=name), tokenizer)
    assert [table.row(i).answer for i in range(len(table))] == golds
    assert (None if table.levels is None else table.levels.tolist()) == levels
    report = table.report
    assert report.read == len(rows) == report.no_gold + report.merged + report.kept
    if name == "dapo_math":
        assert table.row(0).row["extra_info"] == {"index": "9a"} and table.row(0).row["data_source"] == "math_dapo"


def test_levels_of_text_work_as_prior_as_feature_and_in_the_summary_of_an_evaluation(tmp_path, tokenizer):
    rows, _, _ = TRAIN_ROWS["math"]
    table = load_prompts(DataConfig(train=str(write(tmp_path / "m.jsonl", rows)), preset="math"), tokenizer)
    for prior in ("level", "predictor", "mixture"):
        config = Config.model_validate({"curriculum": {"prior_from": prior}})
        assert Curriculum(config, *curriculum_columns(config, table)).lease("g0", 4, 0)
    answers = [[JudgedAnswer(reward=1.0, correct=True)], [JudgedAnswer(reward=0.0, correct=False)]]
    found = Evaluator(table, None)._summaries("greedy", answers)  # type: ignore[arg-type]
    assert found["greedy_accuracy"] == 0.5 and found["greedy_faults"] == 0.0
    assert found["greedy_accuracy/level_Level 5"] == 1.0 and found["greedy_accuracy/level_Level 1"] == 0.0


def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "1", "answer": "1"}])
    with pytest.raises(ConfigError, match="there are gsm8k, math"):
        load_prompts(DataConfig(train=str(path), preset="gsm9k"), tokenizer)


def test_a_key_that_is_set_goes_before_the_preset(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "rewritten": "r", "answer": "#### 1", "short": "2"}])
    config = DataConfig(train=str(path), preset="gsm8k", prompt_key="rewritten", answer_key="short")
    row = load_prompts(config, tokenizer).row(0)
    assert (row.text, row.answer) == ("<|user|>r<|assistant|>", "2")
