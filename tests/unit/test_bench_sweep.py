"""Sweeps with fake cells: resume, failure, timeout, report of the whole."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.harness.arms import ARMS, CONTROLS, HEADLINE, LEARNING_RATES, arm_config, split_arm
from benchmarks.harness.cell import COST_AXES, Spec, code_digest, config_of, full_marks, join_curve
from benchmarks.harness.compare import compare, less_is_better
from benchmarks.harness.convergence import make_specs, parser, write_report
from benchmarks.harness.lr_sweep import make_specs as sweep_specs
from benchmarks.harness.lr_sweep import parser as sweep_parser
from benchmarks.harness.lr_sweep import rate_rows
from benchmarks.harness.names import WORDS, display
from benchmarks.harness.results_file import RESULTS
from benchmarks.harness.sweep import Sweep
from cures_ray.messages import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# A cell that appends its name to a list, then does as its label says.
CELL = """
import json, pathlib, subprocess, sys, time
spec, out = json.load(open(sys.argv[1])), pathlib.Path(sys.argv[2])
with open(out.parent / "started", "a") as f: f.write(spec["label"] + str(spec["seed"]) + "\\n")
if spec["label"] == "dapo": print("boom"); sys.exit(3)
if spec["label"] == "gvm":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out.parent / "child").write_text(str(child.pid)); time.sleep(60)
out.write_text(json.dumps({"status": "done", "spec": spec, "curve": []}))
"""


def specs(*labels: str, seeds: int = 1) -> list[Spec]:
    common = {"engine": "inprocess", "task": "chain", "variant": "T", "budget": 100, "extra": {}, "base": "b"}
    return [Spec(label=label, seed=seed, **common) for seed in range(seeds) for label in labels]


def fake_sweep(folder: Path, **settings) -> Sweep:
    def command(spec: Path, result: Path) -> list[str]:
        return [sys.executable, "-c", CELL, str(spec), str(result)]

    return Sweep(folder, command=command, log=lambda line: None, **settings)


def started(folder: Path) -> list[str]:
    return (folder / "cells" / "started").read_text().split()


def test_a_sweep_runs_only_what_is_not_finished(tmp_path):
    fake_sweep(tmp_path).run(specs("grpo"))
    fake_sweep(tmp_path).run(specs("grpo", "rpp", seeds=2))
    assert started(tmp_path) == ["grpo0", "rpp0", "grpo1", "rpp1"]


def test_a_cell_with_another_spec_is_run_again(tmp_path):
    fake_sweep(tmp_path).run(specs("grpo"))
    changed = Spec(**(asdict(specs("grpo")[0]) | {"budget": 200}))
    sweep = fake_sweep(tmp_path)
    assert sweep.result(changed) is None
    sweep.run([changed])
    assert len(started(tmp_path)) == 2


def test_a_cell_whose_arm_has_another_setting_by_now_is_run_again(tmp_path):
    sweep, one = fake_sweep(tmp_path), specs("grpo")[0]
    sweep.run([one])
    path = next((tmp_path / "cells").glob("*.json"))
    record = json.loads(path.read_text())
    config = config_of(one, tmp_path).model_dump(mode="json")
    for rate, kept in ((config["learner"]["lr"], True), (0.123, False)):
        config["learner"]["lr"] = rate
        path.write_text(json.dumps(record | {"config": config, "code": code_digest()}))
        assert (sweep.result(one) is not None) == kept


def test_a_cell_of_other_code_is_run_again_unless_it_is_asked_for(tmp_path):
    sweep, one = fake_sweep(tmp_path), specs("grpo")[0]
    sweep.run([one])
    path = next((tmp_path / "cells").glob("*.json"))
    config = config_of(one, tmp_path).model_dump(mode="json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config, "code": "another"}))
    assert sweep.result(one) is None
    assert fake_sweep(tmp_path, other_code=True).result(one)["code"] == "another"


def test_a_sweep_takes_rates_for_each_method():
    args = ["--methods", "grpo:1e-3:2e-3,rpp", "--rates", "5e-4", "--seeds", "100"]
    labels = [spec.label for spec in sweep_specs(sweep_parser().parse_args(args))]
    assert labels == ["grpo@learner.lr=1e-3", "grpo@learner.lr=2e-3", "rpp@learner.lr=5e-4"]


def test_a_crash_costs_one_cell_and_is_recorded(tmp_path):
    sweep = fake_sweep(tmp_path)
    cells = specs("grpo", "dapo", "rpp")
    sweep.run(cells)
    assert [sweep.result(s)["status"] for s in cells] == ["done", "failed", "done"]
    failed = sweep.result(cells[1])
    assert failed["why"] == "exit code 3" and failed["log"] == ["boom"]
    fake_sweep(tmp_path).run(cells)
    assert started(tmp_path).count("dapo0") == 1
    fake_sweep(tmp_path, retry_failed=True).run(cells)
    assert started(tmp_path).count("dapo0") == 2


def test_a_cell_over_its_time_is_ended_with_its_children(tmp_path):
    sweep = fake_sweep(tmp_path, timeout_s=2.0)
    sweep.run(specs("gvm"))
    assert sweep.result(specs("gvm")[0])["why"] == "timed out"
    child = int((tmp_path / "cells" / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the cell's child still runs")


def test_a_killed_sweep_continues_where_it_was(tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/unit')\n"
        "from test_bench_sweep import fake_sweep, specs\n"
        f"fake_sweep(Path({str(tmp_path)!r})).run(specs('grpo', 'gvm', 'rpp'))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    child = tmp_path / "cells" / "child"
    for _ in range(200):
        if child.exists() and child.read_text():
            break
        time.sleep(0.1)
    cell_group = os.getpgid(int(child.read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.killpg(cell_group, signal.SIGKILL)
    sweep = fake_sweep(tmp_path)
    assert sweep.result(specs("grpo")[0])["status"] == "done"
    sweep.run(specs("grpo", "rpp"))
    assert started(tmp_path) == ["grpo0", "gvm0", "rpp0"]


def test_no_cell_starts_after_the_time_is_up(tmp_path):
    (tmp_path / "cells").mkdir()
    fake_sweep(tmp_path, until=time.time() - 1).run(specs("grpo"))
    assert not (tmp_path / "cells" / "started").exists()


@pytest.mark.parametrize("label", [*ARMS, *CONTROLS])
def test_every_arm_is_a_valid_configuration(label):
    for task, variant in (("chain", "T"), ("chain", "N"), ("program", "T")):
        config = arm_config(label, task=task, variant=variant, seed=3, budget=25_600, base="b", run_dir="r", extra={})
        assert config.trainer.rollout_budget == 25_600
        assert config.curriculum.method in ("speed", "reinforce_ada") or config.curriculum.rollouts_per_step == 256
        assert config.algo.kl_coef == 0 and config.algo.updates_per_batch == 1


def test_arms_differ_only_in_method_advantage_loss_and_learning_rate():
    """A budget, a batch size or an optimizer that differs between arms would be a thumb on the scale."""
    allowed = {"curriculum", "algo"}
    keys = {key.split(".")[0] for arm in ARMS.values() for key in arm}
    assert keys <= allowed
    assert all("rollouts_per_step" not in key for arm in ARMS.values() for key in arm)


def test_a_label_carries_further_overrides():
    assert split_arm("wide@learner.lr=2e-3@n_max=8") == ("wide", "", {"learner.lr": 2e-3, "curriculum.n_max": 8})
    assert split_arm("random_grpo")[:2] == ("grpo", "coin")
    for bad in ("nonsense", "wide@nonsense=1", "wide@n_max"):
        with pytest.raises(ConfigError):
            split_arm(bad)


def test_specs_are_paired_by_seed_and_need_the_baseline():
    args = parser().parse_args(["--methods", "grpo,wide", "--seeds", "2", "--set", "async_rl.max_staleness=1"])
    cells = make_specs(args, ["grpo", "wide"])
    assert [(c.seed, c.label) for c in cells] == [(0, "grpo"), (0, "wide"), (1, "grpo"), (1, "wide")]
    assert cells[0].base == cells[1].base and cells[0].extra == {"async_rl.max_staleness": 1}
    with pytest.raises(ConfigError, match="baseline"):
        make_specs(args, ["wide"])
    assert "grpo" in HEADLINE


def record(label: str, seed: int, speed: float, failed: bool = False) -> dict:
    spec = asdict(Spec(**(asdict(specs(label)[0]) | {"seed": seed})))
    if failed:
        return {"status": "failed", "spec": spec, "why": "exit code 1", "log": ["boom"]}
    costs = ("trained_tokens", "computed_tokens", "trained_rollouts", "in_flight")
    curve = [
        {
            **dict.fromkeys([*COST_AXES, *costs], 10.0 * i),
            "version": i,
            "greedy": 0.2,
            "sampled": 0.2 + speed * i,
            "by_level": {},
        }
        for i in range(11)
    ]
    return {
        "status": "done",
        "spec": spec,
        "config": {"learner": {"lr": 1e-3}},
        "curve": curve,
        "steps": [{"staleness/mean": 0.5}],
        "plans": [{"batch": 0.0, "reward": 0.5, "mixed_share": 0.5, "distinct_prompts": 32.0}],
        "seconds_by_component": {"curriculum": 1.0, "learner": 9.0, "evaluation": 5.0},
        "accounting": {"planned": 100, "trained": 80, "discarded": {"pilot": 20}, "in_flight": 0},
        "histograms": {"belief_mean": [0.1, 0.5], "n_by_lease": [1, 2], "p_by_lease": [0.1, 0.5]},
    }


def test_the_report_shows_losing_censored_and_failed_runs(tmp_path):
    labels = ["grpo", "wide", "cures", "dapo"]
    records = [record("grpo", s, 0.02) for s in range(3)] + [record("wide", s, 0.04) for s in range(3)]
    records += [record("cures", s, 0.01) for s in range(3)] + [record("dapo", 0, 0.0, failed=True)]
    args = parser().parse_args(["--out", str(tmp_path)])
    write_report(args, labels, records, "cures bench convergence --made-up")
    text = (tmp_path / "table.md").read_text()
    assert "| wide | 2.00 [2.00, 2.00]" in text and "never (< " in text
    assert "| dapo | 0 | 1 |" in text and "--made-up" in text
    assert "0.20" in text  # pilot share of what was planned
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 12 and 'src="http' not in page
    assert (tmp_path / "table.csv").read_text().splitlines()[0].startswith("arm,seeds,failed")


def test_the_learning_rate_is_chosen_by_area_and_losers_are_kept():
    records = [record(f"grpo@learner.lr={rate}", s, v) for rate, v in (("1e-3", 0.03), ("6e-4", 0.02)) for s in (7, 8)]
    rows = rate_rows([*records, record("grpo@learner.lr=3e-3", 7, 0, failed=True)])
    assert [(r["lr"], r["best"]) for r in rows] == [(1e-3, True), (6e-4, False), (None, False)]


def test_a_rate_without_all_its_seeds_is_never_chosen():
    records = [record("grpo@learner.lr=6e-4", s, 0.02) for s in (7, 8)] + [record("grpo@learner.lr=1e-3", 7, 0.03)]
    assert [r["lr"] for r in rate_rows(records) if r["best"]] == [6e-4]


def test_costs_of_the_full_system_are_read_from_its_log():
    line = {
        "step": 1,
        "rollout/tokens_per_s": 10.0,
        "time/step_s": 2.0,
        "accounting/planned": 64,
        "accounting/in_flight": 0,
        "accounting/trained": 32,
        "learner/flops": 5.0,
        "learner/trained_tokens": 7.0,
        "learner/computed_tokens": 9.0,
        "learner/updates": 1.0,
    }
    idle = {"learner/updates": 0.0, "learner/skipped": 1.0}
    marks = full_marks([line, line | {"step": 2, "accounting/planned": 128} | idle])
    curve = join_curve(marks, [(0, {"eval/greedy_accuracy": 0.1}), (2, {"eval/greedy_accuracy": 0.4})])
    assert curve[0]["rollouts"] == 0 and curve[0]["sampled"] == 0.1
    last = curve[1]
    assert (last["rollouts"], last["generated_tokens"], last["learner_flops"]) == (128, 40.0, 10.0)
    assert last["optimizer_steps"] == 1 and last["seconds"] == 4.0


def test_compare_finds_regressions_beyond_the_spread():
    old = {"verdicts_per_s": [90, 100, 110], "sync_seconds": 2.0, "gone": 1.0, "x/censored": 1}
    worse = {"verdicts_per_s": [70, 80, 85], "sync_seconds": 2.5, "x/censored": 3}
    assert [c.verdict for c in compare(old, worse, 0.1)] == ["gone", "worse", "worse"]
    near = {"verdicts_per_s": [85, 95, 105], "sync_seconds": 2.1, "gone": 1.0}
    assert {c.verdict for c in compare(old, near, 0.1)} == {"same"}
    assert less_is_better("sync_seconds") and not less_is_better("wide/speedup/seconds/best")


def test_compare_exits_with_one_on_a_regression(tmp_path, capsys):
    for name, value in (("old", [1.0, 2.0, 3.0]), ("new", [0.1, 0.2, 0.3])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"figures": {"wide/speedup/rollouts/best": value}}))
    assert cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    assert cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0
    assert "worse" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        cli.main(["compare", str(tmp_path / "missing.json"), str(tmp_path / "old.json")])


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("grpo", "GRPO"),
        ("random_grpo", "GRPO, rewards by coin"),
        ("grpo@prompts_per_step=64@learner.lr=1.4e-3", "GRPO, 64 × 4"),
        (
            "cures_wide@prompts_per_step=1024@rollouts_per_step=1024@learner.warmup_steps=2",
            "predictor default, 1024 × 1",
        ),
        ("cures_wide@target_ess_fraction=0.75", "predictor default, target_ess_fraction 0.75"),
    ],
)
def test_tables_and_pictures_show_names_in_words(label, shown):
    assert display(label) == shown
    assert set(WORDS) == set(ARMS)


@pytest.mark.parametrize("task", ["chain", "program"])
def test_every_arm_runs_at_the_rate_that_its_committed_sweep_chose(task):
    figures = json.loads((RESULTS / f"lr_sweep_{task}_T.json").read_text())["figures"]
    chosen = {name.removesuffix("/best_lr"): rate for name, rate in figures.items()}
    rates = LEARNING_RATES[task, "T"]
    assert {arm: rates.get(arm, rates["*"]) for arm in chosen} == chosen
