"""Faults are counted by reason, shown with examples, and stop a run when they are many."""

from cures_ray.loop.faults import EXAMPLES, MAX_REASONS, MIN_VERDICTS, WINDOW, FaultLog, fault_reason


def test_a_reason_leaves_out_what_is_particular_to_an_item():
    assert fault_reason("verify raised KeyError: 'x' [mine.py:3 in verify]") == "verify raised KeyError"
    assert fault_reason("verify raised ValueError [mine.py:3 in verify]") == "verify raised ValueError"
    assert fault_reason("unparsable gold ...'1': it is empty") == "unparsable gold"
    assert fault_reason("no verdict within 7.5 s, the verifier process was killed") == "no verdict within n s"
    assert fault_reason("the verifier process died (signal 9)") == "the verifier process died"


def test_only_the_first_examples_of_a_reason_are_new():
    log = FaultLog(0.5)
    new = log.add([f"verify raised KeyError: {i}" for i in range(10)] + [None])
    assert len(new) == EXAMPLES and new[0] == "no verdict (fault 1): verify raised KeyError: 0"
    assert log.add(["verify raised OSError: judge"]) == ["no verdict (fault 11): verify raised OSError: judge"]
    assert log.summary() == ["10 x verify raised KeyError: 0", "1 x verify raised OSError: judge"]
    assert log.metrics() == {"verifier/fault_share": 11 / 12, "verifier/faults": 11.0}


def test_a_run_stops_only_when_the_share_of_recent_faults_is_too_large():
    log = FaultLog(0.25)
    log.add(["verify raised KeyError: 'x'"] * (MIN_VERDICTS - 1))
    assert log.problem() is None  # too few to judge
    log.add([None] * 3 * MIN_VERDICTS)
    assert log.problem() is None  # just under a quarter
    log.add(["verify raised KeyError: 'x'"] * 20)
    problem = log.problem()
    assert problem is not None and "verifier.max_fault_share = 0.25" in problem and "KeyError: 'x'" in problem
    log.add([None] * WINDOW)
    assert log.problem() is None and log.share == 0.0


def test_reasons_without_end_stay_bounded():
    log = FaultLog(1.0)
    log.add(["x" * i for i in range(1, 3 * MAX_REASONS)])
    assert len(log.reasons) <= MAX_REASONS + 1 and log.problem() is None
