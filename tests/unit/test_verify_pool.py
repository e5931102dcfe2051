"""The pool of verifier processes: hostile items end by their deadline, the next item is judged rightly."""

import threading
import time

import numpy as np
import pytest

from cures_ray.config import Config, VerifierConfig
from cures_ray.messages import ConfigError, Outcome, PromptRow
from cures_ray.verify.pool import VerifyItem, VerifyPool, hard_deadline, self_test

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
        ("def verify(completion): return 2.0", r"rewards are numbers in \[0, 1\]"),
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
