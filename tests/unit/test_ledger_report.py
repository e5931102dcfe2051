"""`cures ledger`: a run's journal read back, also while it is written."""

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from fakes import small_config
from test_ledger import CONFIGS, settlement, take

from cures_ray.data.table import curriculum_columns, load_prompts
from cures_ray.ledger.journal import read
from cures_ray.ledger.lease_log import COLUMNS
from cures_ray.ledger.ledger import Ledger, generations, journal_path
from cures_ray.ledger.picture import draw_ledger
from cures_ray.ledger.prompts import read_prompts, write_prompts
from cures_ray.ledger.read import current, open_run
from cures_ray.ledger.replay import replay
from cures_ray.ledger.report import main
from cures_ray.ledger.tables import bars, quantiles, some
from cures_ray.messages import CommitReport, ConfigError, Discard
from cures_ray.run.folder import claim


class Tokenizer:
    chat_template = None

    def __call__(self, texts, **_):
        return {"input_ids": [[0] * len(text.split()) for text in texts]}


def begin(folder, **sections) -> Ledger:
    """A run folder with 64 prompts and an open ledger."""
    data = folder / "train.jsonl"
    folder.mkdir()
    rows = [{"prompt": f"question {i}", "answer": str(i), "level": i % 4} for i in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "async_rl": {"max_staleness": 1},
        "trainer": {"steps": 50},
        "data": {"train": str(data)},
        "model": {"path": str(folder / "no-model")},
    }
    config = small_config(**base | sections)
    claim(folder, config).begin()
    table = load_prompts(config.data, Tokenizer())
    ids, levels, features = curriculum_columns(config, table)
    write_prompts(folder / "ledger", ids, levels, features, table.columns["text"])
    return Ledger(folder / "ledger", config, ids, levels, features)


def work(ledger: Ledger, steps: int, drawn: dict | None = None) -> None:
    """Batches up to ``steps``: rewards by level, some leases given back; ``drawn``: batch -> prompt -> n of round 0."""
    rng = np.random.default_rng(0)
    for step in range(ledger.curriculum.committed, steps):
        while ledger.plan(step) is None:
            leases = take(ledger, "g0", step)
            for lease in leases:
                if drawn is not None and lease.round == 0:
                    drawn.setdefault(lease.batch, {})[lease.prompt_index] = lease.n
            ledger.give_back([(x.lease_id, x.attempt) for x in leases[:2]], Discard.LOST)
            leases = leases[2:] + take(ledger, "g1", step)
            for i in rng.permutation(len(leases)):
                right = rng.random(leases[i].n) < (0.05, 0.4, 0.6, 0.95)[leases[i].prompt_index % 4]
                ledger.settle(settlement(leases[i], right))
        trained = {e.lease.lease_id: int(e.keep.sum()) for e in ledger.plan(step).entries}
        ledger.commit(CommitReport(batch=step, trained=trained, discarded={}))


def damage(run, record: int) -> int:
    """Flip a bit of a record; the offset of that record."""
    path = journal_path(run / "ledger", max(generations(run / "ledger")))
    offset = [end for end, _ in read(path)][record - 1]
    data = bytearray(path.read_bytes())
    data[offset + 20] ^= 1
    path.write_bytes(data)
    return offset


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SEVERAL_ROUNDS = {
    "gvm": {"curriculum": {"method": "gvm", "pilot_rollouts": 2}},
    "dapo": {"curriculum": {"method": "dapo"}},
}


def with_snapshots(sections: dict, every: int) -> dict:
    curriculum = sections.get("curriculum", {}) | {"snapshot_every": every}
    return {**sections, "curriculum": curriculum}


def test_the_report_shows_steps_allocation_prompts_and_writes_picture_csv_and_json(tmp_path, capsys):
    ledger = begin(tmp_path / "run")
    work(ledger, 5)
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([str(run), "--top", "3", "--csv", str(out), "--json", str(out / "all.json")]) == 0
    text = capsys.readouterr().out
    assert ledger.curriculum.accounting.line() in text
    belief = ledger.curriculum.pool.belief
    hardest = min(np.flatnonzero(belief.visits), key=lambda i: belief.mean([i])[0])
    name = f"{int(ledger.curriculum.prompt_ids[hardest]):016x}"
    assert name in text and f"question {hardest}" in text
    assert (run / "ledger.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "all.json").read_text())
    assert len(report["steps"]) == 5 and report["hardest"][0]["prompt"] == name and report["problem"] is None
    assert report["accounting"]["planned"] == ledger.curriculum.accounting.planned
    with (out / "prompts.csv").open() as file:
        prompts = list(csv.DictReader(file))
    assert sum(int(p["visits"]) for p in prompts) == belief.visits.sum()
    with (out / "groups.csv").open() as file:
        assert sum(int(g["n"]) for g in csv.DictReader(file)) == 5 * 32


def test_a_live_run_is_read_up_to_its_last_whole_record_and_its_files_stay_as_they_are(tmp_path, capsys):
    ledger = begin(tmp_path / "run")
    work(ledger, 3)
    take(ledger, "g0", 3)
    expected = ledger.curriculum.accounting.line()
    for path, torn in (("history.jsonl", b'{"batch": 3, "pla'), ("journal-000000.log", b'0badc0de ["settle",1')):
        with (tmp_path / "run/ledger" / path).open("ab") as file:
            file.write(torn)
    before = contents(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert expected in out and "batches in progress: 3, 4" in out and "3 of 50 steps" in out
    assert main([str(tmp_path / "run"), "--replay", "tau=0.05"]) == 0
    assert contents(tmp_path / "run") == before


def test_a_run_without_a_committed_batch_has_a_report(tmp_path, capsys):
    ledger = begin(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0 and "no batch is committed yet" in capsys.readouterr().out
    assert main([str(tmp_path / "run"), "--replay", "tau=1"]) == 0 and "nothing to replay" in capsys.readouterr().out
    ledger.close()


def test_a_damaged_journal_is_named_with_its_offset_and_the_history_is_still_shown(tmp_path, capsys):
    work(begin(tmp_path / "run"), 6)
    offset = damage(tmp_path / "run", 40)
    with pytest.raises(ConfigError, match=f"run/ledger/journal-000000.log is damaged at byte {offset}"):
        main([str(tmp_path / "run"), "--json", str(tmp_path / "r.json")])
    assert "Beliefs and draws by step" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["steps"]) == 6 and str(offset) in report["problem"]
    with pytest.raises(ConfigError, match=f"damaged at byte {offset}"):
        main([str(tmp_path / "run"), "--replay", "tau=0.05"])
    assert "batches 0 to" in capsys.readouterr().out, "what came before the damage is answered"


def test_a_replay_goes_on_with_the_next_snapshot_behind_a_damaged_journal(tmp_path):
    work(begin(tmp_path / "run", **with_snapshots({}, 4)), 6)
    path = journal_path(tmp_path / "run/ledger", 0)
    data = bytearray(path.read_bytes())
    data[[end for end, _ in read(path)][3] + 20] ^= 1
    path.write_bytes(data)
    result = replay(open_run(tmp_path / "run"), [["tau=0.05"]])
    assert result.problems and result.actual[0].batch == 0 and result.actual[-1].batch == 5
    assert result.agrees == result.compared == 2


def test_a_damaged_snapshot_is_named_and_the_history_is_still_shown(tmp_path, capsys):
    work(begin(tmp_path / "run", **with_snapshots({}, 2)), 4)
    (tmp_path / "run/ledger/snapshot-000002/state.safetensors").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"run/ledger/snapshot-000002/state.safetensors is damaged"):
        main([str(tmp_path / "run"), "--no-plot"])
    assert "Beliefs and draws by step" in capsys.readouterr().out


def test_a_journal_of_another_configuration_is_refused_with_the_record(tmp_path):
    work(begin(tmp_path / "run"), 4)
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["config"]["curriculum"]["prompts_per_step"] = 4
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    _, problem = current(open_run(tmp_path / "run"))
    assert "cannot be applied" in problem and "another configuration" in problem


@pytest.mark.parametrize("prior", ["default", "predictor"])
def test_a_data_file_that_was_regenerated_or_removed_since_changes_nothing_that_is_shown(prior, tmp_path, capsys):
    work(begin(tmp_path / "run", **(CONFIGS[prior] if prior == "predictor" else {})), 3)
    shown = []
    for words in ([], ["--prompt", "question 3"], ["--replay", "n_max=8"]):
        assert main([str(tmp_path / "run"), "--no-plot", *words]) == 0
        shown.append(capsys.readouterr().out)
    assert "question 3" in shown[1] and "question 30" in shown[1]
    data = tmp_path / "run/train.jsonl"
    rows = [{"prompt": f"another {i}", "answer": "0", "level": 9} for i in range(64)]
    for text in ("".join(json.dumps(row) + "\n" for row in rows), None):
        data.write_text(text) if text else data.unlink()
        for words, before in zip(([], ["--prompt", "question 3"], ["--replay", "n_max=8"]), shown, strict=True):
            assert main([str(tmp_path / "run"), "--no-plot", *words]) == 0
            assert capsys.readouterr().out == before


def test_prompts_are_found_by_text_and_by_id(tmp_path, capsys):
    ledger = begin(tmp_path / "run")
    work(ledger, 2)
    assert main([str(tmp_path / "run"), "--prompt", "QUESTION 17"]) == 0
    out = capsys.readouterr().out
    name = f"{int(ledger.curriculum.prompt_ids[17]):016x}"
    assert "1 prompts" in out and name in out and "question 17" in out
    assert main([str(tmp_path / "run"), "--prompt", name[:12]]) == 0 and name in capsys.readouterr().out


def test_stored_texts_leave_out_marks_and_what_all_begin_with(tmp_path):
    system = "<|im_start|>system\nYou are a helpful solver of problems. " + "Reason step by step. " * 40
    texts = pa.chunked_array([[f"{system}<|im_end|>\n<|im_start|>user\nproblem\n {i}" for i in range(30)]])
    write_prompts(tmp_path, np.arange(30), None, None, texts)
    shown = read_prompts(tmp_path).shown["text"].to_pylist()
    assert shown[7].endswith("user problem 7") and len(shown[7]) < 60 and "<|" not in shown[7]


def test_lost_or_other_prompts_are_refused(tmp_path):
    work(begin(tmp_path / "run"), 1)
    write_prompts(tmp_path / "run/ledger", np.arange(64))
    with pytest.raises(ConfigError, match="not the prompts of the journal"):
        main([str(tmp_path / "run")])
    (tmp_path / "run/ledger/prompts/state.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"prompts/state\.safetensors is missing"):
        main([str(tmp_path / "run")])


def test_a_folder_that_is_no_run_or_has_no_ledger_yet_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.json; pass the run's checkpoint\.dir"):
        main([str(tmp_path / "absent")])
    claim(tmp_path / "new", small_config(model={"path": "m"}, data={"train": "d"})).begin()
    with pytest.raises(ConfigError, match="has no ledger yet"):
        main([str(tmp_path / "new")])
    (tmp_path / "new/run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        main([str(tmp_path / "new")])


def test_a_picture_is_drawn_of_any_history(tmp_path):
    work(begin(tmp_path / "run", curriculum={"method": "mopps"}), 2)
    history = open_run(tmp_path / "run").history
    for number, lines in enumerate(([], history[:1], history)):
        target = draw_ledger(lines, tmp_path / f"{number}.png", "title")
        assert target.read_bytes().startswith(b"\x89PNG")


def test_quantiles_and_bars_describe_a_histogram():
    assert quantiles([0, 0, 10, 0]) == pytest.approx([0.525, 0.625, 0.725])
    assert quantiles([5, 0, 0, 5], (0.5, 0.75)) == pytest.approx([0.25, 0.875])
    values = np.random.default_rng(0).beta(2, 5, 100_000)
    counts, _ = np.histogram(values, 20, (0, 1))
    assert quantiles(counts) == pytest.approx(np.quantile(values, (0.1, 0.5, 0.9)), abs=0.01)
    assert np.isnan(quantiles([0, 0])).all()
    assert bars([0, 1, 1000]) == " ▁█" and bars([]) == ""
    assert some(range(100), 5) == [0, 25, 50, 74, 99]


def life(run, number: int, capsys) -> dict:
    assert main([str(run), "--lease", str(number)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_a_leases_whole_life_is_one_line_from_its_plan_to_its_end(tmp_path, capsys):
    run = tmp_path / "run"
    ledger = begin(run, **with_snapshots({}, 2))
    first = ledger.lease("g0", 1, 0, call=0)[0]
    new = life(run, first.lease_id, capsys)
    assert (new["state"], new["batch"], new["n"], new["prompt"]) == ("leased", 0, first.n, first.prompt_id)
    assert new["attempts"] == [{"worker": "g0", "version": 0, "ended": ""}] and "question" in new["text"]
    ledger.give_back([(first.lease_id, 0)], Discard.LOST)
    again = next(x for x in take(ledger, "g1", 0) if x.lease_id == first.lease_id)
    rewards = np.array([1.0, *[0.0] * (first.n - 1)], np.float32)
    fault = np.arange(first.n) == 1
    ledger.settle(
        settlement(again, rewards, fault=fault, generate_seconds=np.array([1.5]), verify_seconds=np.array([0.25]))
    )
    assert life(run, first.lease_id, capsys)["state"] == "settled"
    for lease_id, attempt in ledger.curriculum.leased_keys():
        ledger.settle(settlement(ledger.curriculum.leased(lease_id, attempt)))
    work(ledger, 1)
    done = life(run, first.lease_id, capsys)
    assert done["state"] == "committed" and done["attempt"] == 1
    ends = [(a["worker"], a["ended"]) for a in done["attempts"]]
    assert ends == [("g0", "lost"), ("g1", "settled")]
    assert (done["generate_s"], done["verify_s"]) == (1.5, 0.25) and done["rewards"][:3] == [1.0, None, 0.0]
    assert done["trained"] == first.n - 1 and done["discarded"] == {"verifier_fault": 1}
    work(ledger, 9)
    assert life(run, first.lease_id, capsys) == done, "its journal is gone, its life is kept"
    with pytest.raises(ConfigError, match=r"has no lease 100000: \d+ are planned"):
        main([str(run), "--lease", "100000"])


def test_a_ledger_that_comes_back_has_the_same_lease_log_and_every_lease_ends_in_it_once(tmp_path):
    run = tmp_path / "run"
    ledger = begin(run, **with_snapshots({}, 3))
    work(ledger, 8)
    logs = sorted((run / "ledger").glob("leases-*.jsonl"))
    before = [path.read_bytes() for path in logs]
    with logs[-1].open("ab") as file:
        file.write(b"[99")
    Ledger(run / "ledger", ledger.config, *read_prompts(run / "ledger").columns)
    assert [path.read_bytes() for path in logs] == before and len(before) == 3
    lines = [json.loads(line) for text in before for line in text.splitlines()]
    rows = [dict(zip(COLUMNS, line, strict=True)) for line in lines if line[0] != "lease"]
    assert sorted(row["lease"] for row in rows) == list(range(len(rows)))
    assert sum(row["trained"] for row in rows) == ledger.curriculum.accounting.trained
    assert all(row["trained"] + sum(row["discarded"].values()) == row["n"] for row in rows)
