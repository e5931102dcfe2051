"""`cures ledger --replay`: what else a run would have drawn."""

import json

import numpy as np
import pytest
from test_ledger import CONFIGS
from test_ledger_report import SEVERAL_ROUNDS, begin, with_snapshots, work

from cures_ray.ledger.ledger import generations
from cures_ray.ledger.read import open_run
from cures_ray.ledger.replay import both_outcomes, replay
from cures_ray.ledger.report import main
from cures_ray.messages import ConfigError


@pytest.mark.parametrize("name", CONFIGS | SEVERAL_ROUNDS)
def test_the_same_configuration_draws_the_same_prompts_and_rollouts_in_every_batch(name, tmp_path):
    drawn: dict = {}
    ledger = begin(tmp_path / "run", **with_snapshots((CONFIGS | SEVERAL_ROUNDS)[name], 4))
    work(ledger, 6, drawn)
    result = replay(open_run(tmp_path / "run"), [["prompts_per_step=8"], ["snapshot_every=7"]])
    assert generations(tmp_path / "run/ledger") == [0, 1] and len(result.actual) == len(drawn) >= 6
    assert (result.agrees, result.problems) == (result.compared, []) and result.compared == 6
    for side in (result.actual, *result.others):
        again = {d.batch: dict(zip(d.index.tolist(), d.n.tolist(), strict=True)) for d in side}
        assert again == drawn
    assert result.totals(result.others[0])["overlap"] == 1.0


def test_a_lower_tau_lowers_the_ess_and_draws_prompts_nearer_to_one_half(tmp_path):
    work(begin(tmp_path / "run"), 12)
    result = replay(open_run(tmp_path / "run"), [["tau=0.01"], ["tau=10"], ["target_ess_fraction=0.1"]])
    low, high, steered = (result.totals(drawn) for drawn in result.others)
    own = result.totals(result.actual)
    assert low["ess"] < own["ess"] < high["ess"] and high["ess"] > 63
    assert low["tau"] == pytest.approx(0.01) and high["tau"] == pytest.approx(10)
    assert low["mixed_posterior"] > high["mixed_posterior"]
    assert steered["ess"] < own["ess"]
    assert low["rollouts"] == high["rollouts"] == own["rollouts"]


def test_other_methods_and_n_are_answered_from_the_same_beliefs(tmp_path):
    work(begin(tmp_path / "run"), 6)
    words = [
        ["method=mopps", "rollouts_per_step=64"],
        ["method=uniform"],
        ["method=uniform", "draw=epoch"],
        ["method=dapo"],
    ]
    result = replay(open_run(tmp_path / "run"), words)
    mopps, uniform, epoch, _ = result.others
    assert all(d.n.sum() == 64 for d in mopps) and all(d.n.sum() == 32 for d in uniform)
    assert all(np.isnan(d.tau) for d in mopps)
    assert len(np.unique(np.concatenate([d.index for d in epoch]))) == 8 * len(epoch), "an epoch repeats no prompt"
    assert any("only round 0" in note for note in result.notes)


def test_a_replay_leaves_the_original_course_as_it_was(tmp_path):
    work(begin(tmp_path / "run"), 6)
    run = open_run(tmp_path / "run")
    plain, asked = (
        replay(run, words) for words in ([], [["tau=0.01"], ["method=mopps"], ["method=gvm", "pilot_rollouts=2"]])
    )
    for one, other in zip(plain.actual, asked.actual, strict=True):
        assert np.array_equal(one.index, other.index) and np.array_equal(one.n, other.n)


def test_a_fixed_tau_gives_way_to_a_target_ess(tmp_path):
    curriculum = {"tau": 0.2}
    work(begin(tmp_path / "run", curriculum=curriculum), 4)
    result = replay(open_run(tmp_path / "run"), [["target_ess_fraction=0.2"]])
    assert all(d.tau == pytest.approx(0.2) for d in result.actual)
    assert any("tau = 0.2 is dropped" in note for note in result.notes)
    assert result.others[0][-1].tau != pytest.approx(0.2)


def test_only_the_kept_generations_are_answered_and_the_report_says_from_where_on(tmp_path, capsys):
    work(begin(tmp_path / "run", **with_snapshots({}, 3)), 11)
    assert main([str(tmp_path / "run"), "--replay", "tau=0.05"]) == 0
    out = capsys.readouterr().out
    assert "batches 6 to 11" in out and "snapshot_every" in out and "5 of 5 committed ones agree" in out


def test_a_history_that_the_journal_does_not_reproduce_is_told(tmp_path):
    work(begin(tmp_path / "run"), 4)
    path = tmp_path / "run/ledger/history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["n"][0] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = replay(open_run(tmp_path / "run"), [["tau=0.05"]])
    assert (result.agrees, result.compared) == (3, 4) and "not exact" in result.problems[0]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tua=0.05"], r"did you mean curriculum\.tau\?"),
        (["learning_rate=1"], r"learner\.lr"),
        (["tau"], r"write section\.key=value"),
        (["tau=-1"], r"curriculum\.tau = -1"),
        (["method=moops"], r"curriculum\.method"),
        (["prompts_per_step=1000"], "1000 x 2 = 2000 rollouts is more than rollouts_per_step = 32"),
        (["learner.lr=0.1"], "does not change what is drawn"),
        (["discount=0.5"], "shapes the beliefs"),
        (["sigma=last_layer"], "gradient statistics"),
        (["tau=1e-9"], r"curriculum\.tau = 1e-09"),
    ],
)
def test_overrides_that_cannot_be_answered_are_explained(words, hint, tmp_path):
    work(begin(tmp_path / "run"), 2)
    with pytest.raises(ConfigError, match=hint) as caught:
        main([str(tmp_path / "run"), "--replay", *words])
    assert "--replay" in str(caught.value) or "override" in str(caught.value)


def test_a_group_is_useful_with_the_probability_that_simulation_finds():
    rng = np.random.default_rng(0)
    alpha, beta, n = np.array([1.0, 3.0, 0.5]), np.array([1.0, 9.0, 4.0]), np.array([4, 8, 1])
    right = rng.binomial(n, rng.beta(alpha, beta, (400_000, 3)))
    assert both_outcomes(alpha, beta, n) == pytest.approx(((right > 0) & (right < n)).mean(0), abs=3e-3)
