"""Public data sets in the Hub's formats; the rows are made by hand, with the columns and types of the originals."""

import json

import pytest

from cures_ray.config import DataConfig
from cures_ray.data.presets import EVAL_SETS, eval_settings
from cures_ray.data.table import load_prompts
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
