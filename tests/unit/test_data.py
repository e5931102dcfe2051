import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cures_ray.config import DataConfig, ModelConfig
from cures_ray.data.table import check_disjoint, load_prompts, load_tokenizer
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def jsonl(tmp_path, rows, name="train.jsonl"):
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(tokenizer, source, which="train", **keys):
    return load_prompts(DataConfig(**{which: source, **keys}), tokenizer, which)


def refusal(tokenizer, source, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, source, **keys)
    return str(caught.value)


ROWS = [{"prompt": f"{a}+{a}=", "answer": str(2 * a), "level": a % 3} for a in range(6)]


def test_jsonl_and_parquet_give_the_same_rows(tmp_path, tokenizer):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    ours, theirs = load(tokenizer, jsonl(tmp_path, ROWS)), load(tokenizer, str(tmp_path / "train.parquet"))
    assert (ours.ids == theirs.ids).all() and ours.ids.dtype == np.uint64
    assert ours.levels.tolist() == [0, 1, 2, 0, 1, 2]
    row = ours.row(5)
    assert (row.text, row.answer, row.row) == ("<|user|>5+5=<|assistant|>", "10", {"level": 2})
    assert row.prompt_id == f"{int(ours.ids[5]):016x}" and row.token_ids.dtype == np.int32
    assert tokenizer.decode(row.token_ids) == row.text
    assert ours.token_counts[5] == len(row.token_ids)


def test_a_huggingface_folder_is_read_by_split(tmp_path, tokenizer):
    import datasets

    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert len(load(tokenizer, str(tmp_path / "saved"))) == 6
    assert len(load(tokenizer, f"{tmp_path / 'saved'}:test")) == 2
    assert "found train, test" in refusal(tokenizer, f"{tmp_path / 'saved'}:dev")


def test_a_folder_in_hub_layout_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub", ROWS)
    assert len(load(tokenizer, str(tmp_path / "hub"))) == 6


def test_columns_of_the_common_trainers_are_understood(tmp_path, tokenizer):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "2+3="}],
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"index": 7},
    }
    loaded = load(tokenizer, jsonl(tmp_path, [row])).row(0)
    assert loaded.answer == "5"
    assert loaded.row == {"data_source": "openai/gsm8k", "extra_info": {"index": 7}}
    nested = load(tokenizer, jsonl(tmp_path, [row]), answer_key="extra_info.index").row(0)
    assert nested.answer == "7"


def test_the_last_box_of_a_worked_solution_is_the_gold(tmp_path, tokenizer):
    rows = [{"problem": "p", "answer": "first \\boxed{1}, so \\[\\boxed{\\frac{1}{2}} \\text{cm}\\]"}]
    assert load(tokenizer, jsonl(tmp_path, rows)).row(0).answer == "\\frac{1}{2}"
    rows = [{"question": "p", "solution": "it is \\framebox{204} minutes"}]
    assert load(tokenizer, jsonl(tmp_path, rows)).row(0).answer == "204"


def test_ids_depend_on_content_and_not_on_position(tmp_path, tokenizer):
    forward, backward = load(tokenizer, jsonl(tmp_path, ROWS)), load(tokenizer, jsonl(tmp_path, ROWS[::-1], "b.jsonl"))
    assert forward.ids.tolist() == backward.ids.tolist()[::-1]
    assert len(set(forward.ids.tolist())) == 6


def test_duplicates_are_merged_and_long_prompts_dropped_and_both_counted(tmp_path, tokenizer):
    rows = [*ROWS, ROWS[0], {**ROWS[1], "answer": "other"}, {"prompt": "x" * 50, "answer": "1"}]
    table = load(tokenizer, jsonl(tmp_path, rows), max_prompt_tokens=20)
    report = table.report
    assert (report.read, report.merged, report.conflicting, report.dropped_too_long, report.kept) == (9, 2, 1, 1, 6)
    assert len(table) == 6 and table.row(1).answer == "2"
    assert "2 duplicates merged" in str(report) and "1 longer" in str(report)


def test_the_evaluation_set_is_cut_to_its_limit(tmp_path, tokenizer):
    table = load(tokenizer, jsonl(tmp_path, ROWS), which="eval", max_eval_prompts=4)
    assert len(table) == 4 and table.report.left_out == 2


def test_a_system_prompt_is_put_in_front_unless_the_chat_has_one(tmp_path, tokenizer):
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "1"}]
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "1"}]
    table = load(tokenizer, jsonl(tmp_path, rows), system_prompt="be brief")
    assert table.row(0).text == "<|system|>be brief<|user|>1<|assistant|>"
    table = load(tokenizer, jsonl(tmp_path, [{"prompt": chat, "answer": "1"}]), system_prompt="be brief")
    assert table.row(0).text == "<|system|>own<|user|>1<|assistant|>"


def test_bad_files_are_refused_with_their_place(tmp_path, tokenizer):
    assert "line 2 is not JSON" in refusal(tokenizer, jsonl(tmp_path, [ROWS[0], '{"prompt": ', ROWS[1]]))
    assert "line 2: an object expected, found list" in refusal(tokenizer, jsonl(tmp_path, [ROWS[0], "[1]"]))
    assert "does not exist" in refusal(tokenizer, str(tmp_path / "none.jsonl"))
    assert "empty" in refusal(tokenizer, jsonl(tmp_path, []))
    assert "empty" in refusal(tokenizer, jsonl(tmp_path, [""]))
    (tmp_path / "data.txt").write_text("a,b")
    assert ".jsonl, .parquet, .csv or .tsv" in refusal(tokenizer, str(tmp_path / "data.txt"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    assert "Parquet" in refusal(tokenizer, str(tmp_path / "bad.parquet"))


def test_missing_columns_are_named_with_those_found(tmp_path, tokenizer):
    message = refusal(tokenizer, jsonl(tmp_path, [{"text": "a", "label": "b"}]))
    assert "found: text, label" in message and "data.prompt_key" in message
    assert "data.answer_key" in refusal(tokenizer, jsonl(tmp_path, [{"prompt": "a", "label": "b"}]))
    assert "'typo'" in refusal(tokenizer, jsonl(tmp_path, ROWS), prompt_key="typo")
    assert "row 2: answer has no answer" in refusal(tokenizer, jsonl(tmp_path, [ROWS[0], {"prompt": "a"}]))
    assert "row 1: the prompt must be" in refusal(tokenizer, jsonl(tmp_path, [{"prompt": 3, "answer": "1"}]))


def test_nothing_left_after_dropping_is_an_error_with_the_shortest_length(tmp_path, tokenizer):
    assert "shortest has 6" in refusal(tokenizer, jsonl(tmp_path, ROWS), max_prompt_tokens=3)


def test_held_out_prompts_must_not_be_training_prompts(tmp_path, tokenizer):
    train = load(tokenizer, jsonl(tmp_path, ROWS))
    check_disjoint(train, load(tokenizer, jsonl(tmp_path, [{"prompt": "9+9=", "answer": "18"}], "e.jsonl"), "eval"))
    with pytest.raises(ConfigError, match="1 of 2 prompts"):
        rows = [{**ROWS[3], "answer": "another gold"}, {"prompt": "9+9=", "answer": "18"}]
        check_disjoint(train, load(tokenizer, jsonl(tmp_path, rows, "e.jsonl"), "eval"))


def test_without_a_chat_template_strings_pass_and_chats_are_refused(tmp_path):
    plain = build_tokenizer()
    plain.chat_template = None
    assert load(plain, jsonl(tmp_path, ROWS)).row(1).text == "1+1="
    chat = [{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}]
    assert "no chat template" in refusal(plain, jsonl(tmp_path, chat))


def test_a_saved_tokenizer_comes_back_and_bad_model_paths_are_explained(tmp_path):
    from cures_ray.synthetic.base_model import BaseModelSpec, build_model

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    build_model(tokenizer, BaseModelSpec(hidden=32, layers=1, heads=1)).config.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path / "model")))
    text = "<|user|>07*03-05=<|assistant|>\\boxed{070803}"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.pad_token_id is not None and loaded.eos_token_id is not None
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))
