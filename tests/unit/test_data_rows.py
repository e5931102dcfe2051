"""Rows come back as they were; CSV; which rows are kept; sets larger than memory."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cures_ray.config import Config, DataConfig
from cures_ray.data.table import load_prompts
from cures_ray.messages import ConfigError
from cures_ray.run.preflight import prepare_inputs
from cures_ray.synthetic.base_model import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tokenizer, source, which="train", **keys):
    return load_prompts(DataConfig(**{which: source, **keys}), tokenizer, which)


def test_an_object_column_does_not_gain_the_keys_of_other_rows(tmp_path, tokenizer):
    extras = [{"a": 1}, {"b": [1, {"c": None}]}, {}, {"a": "text now", "nested": {"d": 1.5}}]
    rows = [{"prompt": f"{i}", "answer": "1", "extra_info": extra} for i, extra in enumerate(extras)]
    table = load(tokenizer, write(tmp_path / "a.jsonl", rows))
    assert [table.row(i).row["extra_info"] for i in range(4)] == extras


def test_parquet_rows_have_no_keys_that_only_other_rows_have(tmp_path, tokenizer):
    extras = [{"a": 1}, {"b": "x"}]
    rows = [{"prompt": f"{i}", "answer": "1", "extra_info": extra} for i, extra in enumerate(extras)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")  # its structs have a and b in every row
    table = load(tokenizer, str(tmp_path / "a.parquet"))
    assert [table.row(i).row["extra_info"] for i in range(2)] == extras


def test_csv_is_read_with_quotes_and_line_breaks_and_integer_levels(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text('prompt,answer,level\n"What is\n1, and ""1""?",007,3\n2+2=,4,1\n')
    table = load(tokenizer, str(tmp_path / "a.csv"))
    assert table.row(0).text == '<|user|>What is\n1, and "1"?<|assistant|>'
    assert (table.row(0).answer, table.levels.tolist()) == ("007", [3, 1])
    (tmp_path / "b.csv").write_text("prompt,answer\n1,2,3\n")
    with pytest.raises(ConfigError, match="line 2 has more fields"):
        load(tokenizer, str(tmp_path / "b.csv"))
    (tmp_path / "c.tsv").write_text("prompt\tanswer\n1,1\t2\n")
    assert load(tokenizer, str(tmp_path / "c.tsv")).row(0).answer == "2"


def test_levels_of_text_are_kept_and_bounded_by_their_number(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}", "answer": "1", "level": f"Level {i}", "kind": "ab"[i % 2]} for i in range(1, 6)]
    source = write(tmp_path / "a.jsonl", rows)
    table = load(tokenizer, source, filter={"level": {"min": 2, "max": 4}, "kind": ["a"]})
    assert table.levels.tolist() == ["Level 2", "Level 4"] and table.report.filtered == 3
    assert "3 left out by data.filter" in str(table.report)
    assert len(load(tokenizer, source, filter={"kind": "b"})) == 3
    assert len(load(tokenizer, source, which="eval", filter={"kind": "b"})) == 5  # of training rows only
    with pytest.raises(ConfigError, match=r"data\.filter\.level"):
        load(tokenizer, source, filter={"level": {"above": 3}})
    with pytest.raises(ConfigError, match="no prompt is left"):
        load(tokenizer, source, filter={"kind": "c"})


def test_the_training_set_is_cut_to_its_limit_by_the_seed(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"prompt": f"{i}", "answer": f"{i}", "level": i} for i in range(50)])
    table = load(tokenizer, source, max_train_prompts=10)
    assert (len(table), table.report.left_out) == (10, 40)
    assert "40 over data.max_train_prompts left out" in str(table.report)
    assert all(table.row(i).answer == str(table.levels[i]) for i in range(10))
    again, other = load(tokenizer, source, max_train_prompts=10), load(tokenizer, source, max_train_prompts=10, seed=1)
    assert (again.ids == table.ids).all() and set(other.ids) != set(table.ids)
    assert set(table.ids) < set(load(tokenizer, source).ids)


LONG = "A train leaves the station at noon and travels ninety miles before it stops at the river."


def test_training_prompts_that_overlap_with_an_evaluation_set_are_dropped_and_named(tmp_path, tokenizer):
    held_out = write(
        tmp_path / "held_out.jsonl", [{"problem": LONG, "answer": "1"}, {"problem": "What is 2+2?", "answer": "4"}]
    )
    rows = [
        "Remember: a TRAIN leaves the station, at noon and travels far.",  # eight words in a row
        "A train leaves the station at dawn and travels ninety kilometres.",  # seven at most
        "what is 2 + 2",  # short: compared whole
        "What is 2+3?",
    ]
    source = write(tmp_path / "a.jsonl", [{"prompt": text, "answer": "1"} for text in rows])
    table = load(tokenizer, source, decontaminate_against=[held_out])
    assert [name for name, _ in table.report.contaminated] == [held_out, held_out]
    assert [text for _, text in table.report.contaminated] == [rows[0], rows[2]]
    assert "2 that overlap with evaluation sets dropped" in str(table.report) and len(table) == 2
    assert len(load(tokenizer, source, decontaminate_against=[held_out], decontaminate_ngram=12)) == 3
    with pytest.raises(ConfigError, match="decontaminate_against"):
        load(tokenizer, source, decontaminate_against=[str(tmp_path / "none.jsonl")])


def test_a_run_leaves_the_list_of_what_was_dropped_for_its_overlap(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    held_out = write(tmp_path / "held_out.jsonl", [{"problem": LONG, "answer": "1"}])
    source = write(tmp_path / "a.jsonl", [{"prompt": LONG, "answer": "1"}, {"prompt": "What is 2+3?", "answer": "5"}])
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path / "model")},
            "data": {"train": source, "decontaminate_against": [held_out]},
            "checkpoint": {"dir": str(tmp_path / "run")},
        }
    )
    inputs = prepare_inputs(config, test_verifier=False)
    inputs.release()
    listed = json.loads((tmp_path / "run" / "decontaminated.jsonl").read_text())
    assert listed == {"evaluation_set": held_out, "prompt": LONG[:80]}
    assert any("1 that overlap with evaluation sets dropped" in note for note in inputs.notes)


def test_the_best_constant_answer_is_the_most_frequent_gold(tmp_path, tokenizer):
    answers = ["No", "No", "No", "Yes", "1", "2"]
    rows = [{"prompt": f"{i}", "answer": a, "level": "leap" if i < 4 else "sum"} for i, a in enumerate(answers)]
    best = load(tokenizer, write(tmp_path / "a.jsonl", rows)).best_constant()
    assert best == {
        "best_constant_accuracy": 0.5,
        "best_constant_accuracy/level_leap": 0.75,
        "best_constant_accuracy/level_sum": 0.5,
    }


MEASURE = """
import json, sys
from pathlib import Path
from cures_ray.config import Config, DataConfig
from cures_ray.data.table import load_prompts
from cures_ray.synthetic.base_model import build_tokenizer
small, large = sys.argv[1:]
tokenizer = build_tokenizer()
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024  # MiB, of this process
load_prompts(DataConfig(train=small), tokenizer)
before = peak()
table = load_prompts(DataConfig(train=large), tokenizer)
print(json.dumps([len(table), peak() - before, len(table.row(len(table) - 1).row["solution"])]))
"""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_set_is_loaded_in_far_less_memory_than_it_takes(tmp_path, suffix):
    """240 MB of worked solutions; what may grow in memory is the index: hashes, lengths, one batch."""
    count, width = 6000, 40_000
    for name, rows in (("small", 10), ("large", count)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            with path.open("w") as file:
                for i in range(rows):
                    file.write(json.dumps({"problem": f"{i}+1=", "answer": str(i + 1), "solution": "x" * width}) + "\n")
        else:
            schema = pa.schema([("problem", pa.string()), ("answer", pa.string()), ("solution", pa.string())])
            with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
                for i in range(0, rows, 500):
                    part = range(i, min(i + 500, rows))
                    columns = [[f"{j}+1=" for j in part], [str(j + 1) for j in part], [f"{j:0{width}d}" for j in part]]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / f"small.{suffix}"), str(tmp_path / f"large.{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, grown_mib, last = json.loads(done.stdout.splitlines()[-1])
    assert (kept, last) == (count, width)
    assert 0 < grown_mib < 140, "a set of 240 MB"
