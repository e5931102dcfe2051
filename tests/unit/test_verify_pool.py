"""The pool of verifier processes: hostile items end by their deadline, the next item is judged rightly."""

import threading
import time

import numpy as np
import psutil
import pytest

from cures_ray.config import Config, VerifierConfig
from cures_ray.messages import ConfigError, Outcome, PromptRow
from cures_ray.verify.pool import VerifyItem, VerifyPool, hard_deadline
from cures_ray.verify.self_test import self_test

TIMEOUT_S = 0.5
START_S = 60.0  # of a process, on a busy machine


def item(completion: str, answer: str = "3", **row: object) -> VerifyItem:
    prompt = PromptRow(prompt_id="0" * 16, text="prompt", token_ids=np.zeros(1, np.int32), answer=answer, row=row)
    return VerifyItem(prompt=prompt, completion=completion)


@pytest.fixture(scope="module")
def pool():
    with VerifyPool(VerifierConfig(timeout_s=TIMEOUT_S)) as one:
        one.prewarm()
        yield one


def test_verdicts_come_in_order_with_their_times(pool):
    items = [item(f"\\boxed{{{i}}}", str(i % 2)) for i in range(6)]
    verdicts = pool.verify(items, timeout_s=5.0)
    assert [v.outcome for v in verdicts] == [Outcome.CORRECT] * 2 + [Outcome.INCORRECT] * 4
    assert all(0 < v.seconds < 5 for v in verdicts)
    assert pool.verify([]) == []


HOSTILE = {
    "9^9^9^9": "9^{9^{9^{9}}}",
    "factorial": "1000000!",
    "500 parentheses": "(" * 499 + "x" + ")" * 499,
    "tower of logarithms": r"\log_{10}(" * 40 + "10^{10^{10}}" + ")" * 40,
    "a power of a sum": "(x+1)^{100000} - x",
    "1 MB": "x+" * 500_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_ends_by_the_deadline_and_the_next_is_judged_rightly(name, pool):
    pool.verify([item("")], timeout_s=START_S)  # a fresh process is not the item's time
    hostile, after = item("\\boxed{" + HOSTILE[name] + "}", r"\sqrt{2}"), item(r"\boxed{\frac{6}{2}}")
    bad, good = pool.verify([hostile, after], timeout_s=TIMEOUT_S)
    assert bad.outcome in (Outcome.FAULT, Outcome.INCORRECT) and bad.detail
    assert bad.seconds < hard_deadline(TIMEOUT_S) + 1.0
    assert good.outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "completion", ["", "\x00", "\ud800\\boxed{\udfff}", "\\boxed{" * 50_000, "}" * 50_000, "\n\r\u2028"]
)
def test_weird_text_is_incorrect(completion, pool):
    verdicts = pool.verify([item(completion), item(r"\boxed{3}")], timeout_s=5.0)
    assert [v.outcome for v in verdicts] == [Outcome.INCORRECT, Outcome.CORRECT]


def test_mathematics_has_a_limit_of_processor_time_however_long_the_deadline():
    slow = r"\boxed{\int_0^1 \int_0^1 \sin(x^{y^x}) \cos(y^{x^{y}}) dx dy}"
    with VerifyPool(VerifierConfig(timeout_s=60.0)) as pool:
        verdict, after = pool.verify([item(slow), item(r"\boxed{3}")])
    assert verdict.is_fault and verdict.detail == "no verdict within 2 s of processor time"
    assert after.outcome is Outcome.CORRECT


def test_an_unparsable_gold_is_a_fault(pool):
    (verdict,) = pool.verify([item(r"\boxed{1}", r"\frac{")], timeout_s=5.0)
    assert verdict.is_fault and verdict.detail.startswith("unparsable gold")


USER = """
import os, time

def verify(completion, answer, level=0):
    print("a user function may print", flush=True)
    if completion == "die":
        os._exit(7)
    if completion == "hang":
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "memory":
        return len(bytes(10 ** 10))
    if completion == "pid":
        time.sleep(0.3)
        open(answer, "a").write(f"{os.getpid()} ")
        return 1.0
    return level
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    return VerifierConfig(fn=f"{tmp_path / 'mine.py'}:verify", timeout_s=TIMEOUT_S, max_rss_mb=512)


def test_death_timeout_and_lack_of_memory_are_faults_with_the_reason(user):
    with VerifyPool(user) as pool:
        items = [item(c, level=np.float64(0.7)) for c in ("die", "hang", "sleep", "memory", "fine")]
        died, hung, slept, memory, fine = pool.verify(items)
    assert died.is_fault and "status 7" in died.detail
    assert hung.is_fault and "was killed" in hung.detail and hung.seconds < hard_deadline(TIMEOUT_S) + 1
    assert slept.is_fault and "verifier.timeout_s" in slept.detail
    assert memory.is_fault and "memory" in memory.detail.lower()
    assert (fine.outcome, fine.reward) == (Outcome.CORRECT, 0.7)


def test_processes_work_side_by_side_for_several_callers(user, tmp_path):
    with VerifyPool(user.model_copy(update={"processes_per_worker": 2, "timeout_s": 5.0})) as pool:
        pool.prewarm()
        done: list[bool] = []
        file = str(tmp_path / "pids")
        callers = [
            threading.Thread(target=lambda: done.extend(v.reward == 1.0 for v in pool.verify([item("pid", file)] * 2)))
            for _ in range(2)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
    assert done == [True] * 4
    assert len(set((tmp_path / "pids").read_text().split())) == 2


FOREIGN = """
import os, pathlib, subprocess, sys, threading, time

def everywhere(text):
    written = 0
    for descriptor in range(3, 64):
        try:
            written += os.write(descriptor, text) > 0
        except OSError:
            pass
    return written

def note(answer, text):
    with open(answer, "a") as file:
        file.write(f"{text} ")

def verify(completion, answer, level):
    if completion == "write":
        note(answer, everywhere(b'["0", 0, "correct", 1.0, "", 0.0, false]\\n' * 3))
    if completion == "torn":
        note(answer, everywhere(b"no line"))
    if completion == "late":
        threading.Timer(0.3, lambda: note(answer, everywhere(b'["0", 0, "correct", 1.0, "", 0.0, false]\\n'))).start()
    if completion == "print":
        print("x" * 100_000)
        print("x" * 100_000, file=sys.stderr)
        os.write(1, b"raw")
        note(answer, "printed")
    if completion == "fork" and (pid := os.fork()) != 0:
        note(answer, pid)  # both go on from here
    if completion == "daemon":
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        note(answer, process.pid)
        while True:
            time.sleep(1)
    if completion == "orphan":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                note(answer, os.getpid())
                time.sleep(1000)
            os._exit(0)
        time.sleep(0.5)
    return level
"""


@pytest.fixture
def foreign(tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    return VerifierConfig(fn=f"{tmp_path / 'foreign.py'}:verify", timeout_s=3.0)


def runs(pid: int) -> bool:
    """Whether it still runs after the moment that dying takes."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # whose parent, here, may never look
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.02)
    return True


def mixed(what: str, file: str, count: int = 40) -> list[VerifyItem]:
    """Every fifth item does ``what``; the rewards alternate, so that a shift by one is seen."""
    return [item(what if i % 5 == 2 else "", file, level=i % 2) for i in range(count)]


@pytest.mark.parametrize("what", ["write", "torn"])
def test_who_writes_to_foreign_descriptors_gets_a_fault_and_shifts_nothing(what, foreign, tmp_path):
    file = tmp_path / "notes"
    with VerifyPool(foreign) as pool:
        verdicts = pool.verify(mixed(what, str(file))) + pool.verify([item("", str(file), level=1)])
    notes = file.read_text().split()  # "1": a descriptor was hit; an item that is repeated may find none
    assert notes.count("1") >= 8, "the fault happened in every fifth item"
    for i, verdict in enumerate(verdicts[:40]):
        if i % 5 == 2:
            assert verdict.is_fault and "descriptors that it did not open" in verdict.detail
        else:
            assert (verdict.outcome, verdict.reward) == ((Outcome.INCORRECT, Outcome.CORRECT)[i % 2], float(i % 2))
    assert verdicts[40].outcome is Outcome.CORRECT


def test_bytes_that_come_after_the_verdict_reach_no_other_item(foreign, tmp_path):
    file = tmp_path / "notes"
    with VerifyPool(foreign) as pool:
        assert pool.verify([item("late", str(file), level=0)])[0].outcome is Outcome.INCORRECT
        deadline = time.monotonic() + 10
        while not (file.exists() and file.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        rewards = [v.reward for v in pool.verify([item("", str(file), level=i % 2) for i in range(20)])]
    assert file.read_text().split() == ["1"]  # it happened
    assert rewards == [float(i % 2) for i in range(20)]


@pytest.mark.parametrize("what", ["fork", "print"])
def test_forking_and_printing_change_no_verdict(what, foreign, tmp_path):
    file = tmp_path / "notes"
    with VerifyPool(foreign) as pool:
        verdicts = pool.verify(mixed(what, str(file)))
    notes = file.read_text().split()
    assert len(notes) == 8  # it happened
    assert [v.reward for v in verdicts] == [float(i % 2) for i in range(40)]
    assert not any(v.is_fault for v in verdicts)
    if what == "fork":
        assert not any(runs(int(pid)) for pid in notes)


@pytest.mark.parametrize("what", ["daemon", "orphan"])
def test_what_a_function_starts_in_a_session_of_its_own_ends_with_it(what, foreign, tmp_path):
    file = tmp_path / "notes"
    with VerifyPool(foreign.model_copy(update={"timeout_s": 1.5})) as pool:
        verdicts = pool.verify([item(what, str(file), level=1), item("", str(file), level=1)])
        if what == "daemon":  # it hangs, and is killed with its descendants at once
            assert verdicts[0].is_fault
            assert not runs(int(file.read_text()))
    assert verdicts[1].outcome is Outcome.CORRECT
    (pid,) = file.read_text().split()  # it happened
    assert not runs(int(pid))


def test_a_nursery_that_dies_is_replaced():
    with VerifyPool(VerifierConfig(timeout_s=5.0)) as pool:
        pool.prewarm()
        process = pool._nursery._process
        assert process is not None
        process.kill()
        process.wait()
        first, second = pool.verify([item(r"\boxed{3}"), item(r"\boxed{4}")])
        assert first.is_fault or first.outcome is Outcome.CORRECT
        assert second.is_fault or second.outcome is Outcome.INCORRECT
        third, fourth = pool.verify([item(r"\boxed{3}"), item(r"\boxed{4}")])
        assert (third.outcome, fourth.outcome) == (Outcome.CORRECT, Outcome.INCORRECT)
        assert pool._nursery._process is not process  # it happened


def test_the_pool_spends_little_on_an_item():
    """One message for many items: the parent's processor time an item, here with a loose bound for busy machines."""
    items = [item("step by step, " * 60 + rf"\boxed{{{i % 7}}}", str(i % 3)) for i in range(2048)]
    with VerifyPool(VerifierConfig(timeout_s=5.0)) as pool:
        pool.verify(items[:64])
        began = time.process_time()
        verdicts = pool.verify(items)
        spent = (time.process_time() - began) / len(items)
    assert [v.outcome is Outcome.CORRECT for v in verdicts] == [i % 7 == i % 3 for i in range(2048)]
    assert spent < 0.4e-3


BATCH = """
import asyncio

def verify_batch(prompts, completions, answers, rows, level):
    assert len(prompts) == len(completions) == len(answers) == len(rows) == len(level)
    if "short" in completions:
        return [1.0]
    return [c == a and row["level"] == x for c, a, row, x in zip(completions, answers, rows, level)]

async def waits(completion, answer):
    await asyncio.sleep(10 if completion == "hang" else 0.5)
    if completion == "raise":
        raise KeyError("x")
    return completion == answer
"""


def test_a_batch_function_judges_a_message_in_one_call(tmp_path):
    (tmp_path / "batch.py").write_text(BATCH)
    with VerifyPool(VerifierConfig(fn=f"{tmp_path / 'batch.py'}:verify_batch")) as pool:
        verdicts = pool.verify([item(str(i % 2), "1", level=i) for i in range(100)])
        assert [v.reward for v in verdicts] == [float(i % 2) for i in range(100)]
        short = pool.verify([item("short", "1", level=0), item("1", "1", level=0)])
        assert all(v.is_fault and "returned 1 rewards for 2 completions" in v.detail for v in short)


def test_asynchronous_functions_wait_together(tmp_path):
    (tmp_path / "batch.py").write_text(BATCH)
    with VerifyPool(VerifierConfig(fn=f"{tmp_path / 'batch.py'}:waits", timeout_s=3.0)) as pool:
        pool.prewarm()
        began = time.monotonic()
        completions = ["hang" if i == 3 else "raise" if i == 4 else str(i % 2) for i in range(40)]
        verdicts = pool.verify([item(c, "1") for c in completions])
        assert time.monotonic() - began < 10  # one after the other: 20 s
    assert "verifier.timeout_s" in verdicts[3].detail and "KeyError" in verdicts[4].detail
    assert [v.reward for i, v in enumerate(verdicts) if i not in (3, 4)] == [
        float(i % 2) for i in range(40) if i not in (3, 4)
    ]


def test_closing_ends_what_is_in_work_as_faults(user):
    pool = VerifyPool(user.model_copy(update={"timeout_s": 60.0}))
    pool.prewarm()
    verdicts: list = []
    caller = threading.Thread(target=lambda: verdicts.extend(pool.verify([item("hang"), item("hang")])))
    caller.start()
    time.sleep(0.3)
    pool.close()
    caller.join(20)
    assert [v.is_fault for v in verdicts] == [True, True]
    assert pool.verify([item("fine")])[0].is_fault


def test_the_self_test_passes_the_built_in_verifiers():
    self_test(Config(), item("", r"\frac{1}{2}").prompt)
    self_test(Config(verifier=VerifierConfig(fn="code")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def verify(completion): return 2.0", r"outside verifier.reward_range = \[0, 1\]"),
        ("def verify(completion, difficulty): return 1.0", "missing 1 required.*difficulty.*other columns: level"),
        ("def verify(completion): raise OSError('judge is down')", "judge is down"),
        ("def other(completion): return 1.0", "functions there: other"),
        ("import no_such_module", "cannot be imported"),
    ],
)
def test_the_self_test_stops_a_run_with_a_broken_function(tmp_path, source, message):
    (tmp_path / "broken.py").write_text(source)
    config = Config(verifier=VerifierConfig(fn=f"{tmp_path / 'broken.py'}:verify"))
    with pytest.raises(ConfigError, match=message):
        self_test(config, item("", "3", level=1).prompt)


def test_the_self_test_stops_a_run_whose_golds_cannot_be_read():
    with pytest.raises(ConfigError, match=r"unparsable gold.*Check verifier.fn and data.answer_key"):
        self_test(Config(), item("", r"\frac{").prompt)


def test_a_memory_limit_that_is_too_small_is_an_error_not_a_fault():
    with VerifyPool(VerifierConfig(max_rss_mb=128)) as pool, pytest.raises(ConfigError, match="max_rss_mb = 128"):
        pool.verify([item(r"\boxed{x+x}", "2x")])
