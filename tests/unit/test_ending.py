"""The last lines of `cures train` say what was measured, and no more."""

from pathlib import Path

from actors.commands.ending import ending
from cures_ray.messages import Accounting
from cures_ray.run.summary import RunSummary


def evaluation(version: int, accuracy: float) -> tuple[int, dict[str, float]]:
    return version, {"eval/greedy_accuracy": accuracy, "eval/greedy_accuracy/level_1": accuracy}


def text(*evaluations, interrupted_at=None) -> str:
    summary = RunSummary(
        accounting=Accounting(),
        evaluations=list(evaluations),
        run_dir=Path("RUN"),
        steps=40,
        interrupted_at=interrupted_at,
    )
    assert "evaluations" in summary.as_json()
    return ending(summary)


def test_a_whole_run_shows_before_after_and_gain():
    lines = text(evaluation(0, 0.25), evaluation(40, 0.5)).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["all", "0.250", "0.500", "+0.250"],
        ["level", "1", "0.250", "0.500", "+0.250"],
    ]
    assert "interrupted" not in "\n".join(lines)


def test_the_best_constant_answer_stands_beside_before_and_after():
    constants = {"eval/best_constant_accuracy": 0.125, "eval/best_constant_accuracy/level_1": 0.5}
    (_, before), (_, after) = evaluation(0, 0.25), evaluation(40, 0.5)
    lines = text((0, before | constants), (40, after | constants)).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["constant", "0.125", "0.500"]


def test_a_run_that_was_interrupted_before_its_second_evaluation_claims_no_gain():
    out = text(evaluation(0, 0.25), interrupted_at=7)
    assert "interrupted after 7 of 40 steps" in out and "the same command continues" in out
    assert "held-out accuracy 0.250 after step 0; measured once, so no gain is known" in out
    assert "+0.000" not in out and "before" not in out


def test_an_interrupted_run_says_which_step_its_last_figure_belongs_to():
    out = text(evaluation(0, 0.25), evaluation(5, 0.3), interrupted_at=7)
    assert "+0.050" in out and "as measured after step 5; steps 6 to 7 are not in it" in out


def test_a_single_evaluation_is_no_before_and_after_in_the_summary_either():
    once = RunSummary(accounting=Accounting(), evaluations=[evaluation(0, 0.25)]).as_json()
    assert once["held_out_accuracy_before"] == 0.25 and once["held_out_accuracy_after"] is None
    last = RunSummary(accounting=Accounting(), evaluations=[evaluation(40, 0.25)]).as_json()
    assert last["held_out_accuracy_before"] is None and last["held_out_accuracy_after"] == 0.25
    assert "no held-out evaluation was made" in text()
