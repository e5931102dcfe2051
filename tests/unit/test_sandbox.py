"""Model-written programs in the sandbox: what is right, what is contained, and how it is typed."""

import json
import os
import threading
import time

import psutil
import pytest

from cures_ray.messages import Outcome
from cures_ray.synthetic.tasks import generate
from cures_ray.verify.programs import Sandbox, extract_code, read_tests, same_value, sandbox_report, verify_code

DOUBLE = json.dumps({"entry": "f", "tests": [[[1], 2], [5, 10]]})
STDIN = json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4"]})
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def sandbox():
    box = Sandbox(memory_mb=256)
    yield box
    box.close()


@pytest.fixture(scope="module")
def weak_sandbox():
    """As on a machine without seccomp."""
    box = Sandbox(memory_mb=256, seccomp=False)
    yield box
    box.close()


def program(code: str) -> str:
    return f"Here:\n```python\n{code}\n```"


def judge(completion, gold, box):
    began = time.monotonic()
    verdict = verify_code(completion, gold, box, TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S + 2
    return verdict


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{2*x}",
        "\\boxed{\n x + x }",
        program("def f(x):\n    return 2 * x"),
        program("import math\nf = lambda x: x + math.gcd(x, 0)"),
        program("class Solution:\n    def f(self, x):\n        return x + x"),
        "first ```python\nwrong\n``` then" + program("def f(x): return x << 1"),
        "def f(x):\n    return 2.0 * x",
        program("print('noise')\ndef f(x):\n    print('more')\n    return 2 * x"),
    ],
)
def test_right_programs_are_correct(completion, sandbox):
    assert judge(completion, DOUBLE, sandbox).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "completion",
    [
        program("print(2 * int(input()))"),
        program("import sys\nfor line in sys.stdin:\n    print(2 * int(line), end=' \\n\\n')"),
        program("n = int(input())\nprint(2 * n)\nexit()"),
    ],
)
def test_programs_that_read_and_print_are_judged_by_their_output(completion, sandbox):
    assert judge(completion, STDIN, sandbox).outcome is Outcome.CORRECT
    assert judge(program("print(3)"), STDIN, sandbox).outcome is Outcome.INCORRECT


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (r"\boxed{3*x}", "f(1) = 3"),
        (r"\boxed{x +}", "SyntaxError"),
        ("no program", "no program"),
        ("", "no program"),
        (program("def g(x): return 2 * x"), "defines no 'f'"),
        (program("def f(x): return {2 * x}"), "not JSON serializable"),
        (program("def f(x): return True if x == 1 else 10"), "f(1) = true"),
        (program("import os\nos._exit(0)"), "no result"),
        (r"\boxed{" + "(" * 500 + "x" + ")" * 500 + "}", "nested"),
        ("\\boxed{x\x00}", "null bytes"),
        ("\\boxed{x + \udfff}", "surrogates"),
    ],
)
def test_wrong_programs_are_incorrect_with_the_reason(completion, reason, sandbox):
    verdict = judge(completion, DOUBLE, sandbox)
    assert verdict.outcome is Outcome.INCORRECT and reason in verdict.detail


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading\nwhile True:\n    threading.Thread(target=input).start()",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytes(10 ** 7))",
    "socket": "import _socket\n_socket.socket().connect(('127.0.0.1', 9))",
    "write outside": "open('OUTSIDE', 'w').write('x')",
    "write here": "open('probe', 'w').write('x')",
    "remove": "import os\nos.remove('OUTSIDE')\nraise SystemExit",
    "shell": "import os\nassert os.system('touch OUTSIDE') == 0",
    "read": "open('/etc/passwd').read()",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "output flood": "import os\nwhile True:\n    os.write(3, b'x' * 65536)",
    "crash": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("seccomp", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained_and_incorrect(name, seccomp, sandbox, weak_sandbox, tmp_path):
    os.chmod(tmp_path, 0o777)
    target = tmp_path / "outside"
    if name == "remove":
        target.write_text("kept")
    box = sandbox if seccomp else weak_sandbox
    code = HOSTILE[name].replace("OUTSIDE", str(target))
    assert judge(program(code), DOUBLE, box).outcome is Outcome.INCORRECT
    assert target.exists() == (name == "remove")
    assert judge(r"\boxed{2*x}", DOUBLE, box).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "code", ["while True: pass", "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nwhile True: pass"]
)
def test_an_endless_loop_ends_by_processor_time_or_as_a_fault_on_a_busy_machine(code, sandbox):
    verdict = judge(program(code), DOUBLE, sandbox)
    expected = "processor time"  # of both: used up (incorrect), or not got (fault)
    assert verdict.outcome is not Outcome.CORRECT and expected in verdict.detail
    assert judge(r"\boxed{2*x}", DOUBLE, sandbox).outcome is Outcome.CORRECT


def test_a_program_that_waits_without_end_is_wrong(sandbox):
    waits = "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"
    verdict = judge(program(waits), DOUBLE, sandbox)
    # on a machine so busy that a sleeping program queued for a quarter of the time, a fault
    assert (verdict.outcome is Outcome.INCORRECT and "it waits" in verdict.detail) or "did not get" in verdict.detail


def test_a_program_that_did_not_get_its_processor_time_is_no_verdict(sandbox):
    """Stopped from outside, as a starved machine would."""
    stopped = []

    def stop():
        deadline = time.monotonic() + TIMEOUT_S
        while not stopped and time.monotonic() < deadline:
            for process in psutil.Process(sandbox._process.pid).children():
                process.suspend()
                stopped.append(process.pid)
            time.sleep(0.01)

    sandbox.start()
    thread = threading.Thread(target=stop)
    thread.start()
    verdict = judge(program("def f(x):\n    while True: pass"), DOUBLE, sandbox)
    thread.join()
    assert stopped  # it happened
    assert verdict.is_fault and "did not get its processor time" in verdict.detail
    assert judge(r"\boxed{2*x}", DOUBLE, sandbox).outcome is Outcome.CORRECT


def test_what_goes_to_standard_error_is_not_output(sandbox):
    code = "import sys\nprint('debug', file=sys.stderr)\nsys.stderr.write('more')\nprint(2 * int(input()))"
    assert judge(program(code), STDIN, sandbox).outcome is Outcome.CORRECT
    only = "import sys\nprint(2 * int(input()), file=sys.stderr)"
    assert judge(program(only), STDIN, sandbox).outcome is Outcome.INCORRECT


USUAL = """
import argparse, ast, base64, bisect, calendar, collections, contextlib, copy, csv, dataclasses, datetime, decimal, enum
import fractions, functools, hashlib, heapq, inspect, io, itertools, json, logging, math, operator, os, pathlib, pickle
import pprint, queue, random, re, secrets, shlex, statistics, string, struct, sys, tempfile, textwrap, threading, time
import timeit, types, typing, unicodedata, uuid, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from typing import *
from collections import *
f = lambda x: 2 * x
"""
NUMPY = """
import numpy as np
def f(x):
    a = np.linalg.solve(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([4.0 * x, 1.0]))
    return int(round(np.sort(np.random.default_rng(0).permutation(a))[-1])) + 0 * int(np.median([1, 2, 3]))
"""
SYMPY = """
from sympy import symbols, solve, integrate, Matrix, simplify, sin, cos, factorint, sympify, Eq
def f(x):
    y = symbols("y")
    assert simplify(sin(y) ** 2 + cos(y) ** 2) == 1 and factorint(12) == {2: 2, 3: 1} and sympify("2*y").subs(y, 1) == 2
    assert Matrix([[1, 2], [3, 4]]).det() == -2 and integrate(2 * y, (y, 0, x)) == x ** 2
    return int(solve(Eq(y / 2, x), y)[0])
"""


@pytest.mark.parametrize("code", [USUAL, NUMPY, SYMPY])
def test_the_usual_modules_numpy_and_sympy_import(code, sandbox):
    verdict = judge(program(code), DOUBLE, sandbox)
    assert verdict.outcome is Outcome.CORRECT, verdict.detail


@pytest.mark.parametrize("seccomp", [True, False])
def test_programs_do_not_look_at_files(seccomp, sandbox, weak_sandbox):
    box = sandbox if seccomp else weak_sandbox
    for call in (
        "os.stat('/etc/passwd')",
        "os.lstat('/tmp')",
        "os.access('/etc/passwd', 4) or 1 / 0",
        "os.listdir('/')",
    ):
        code = f"import os\ntry:\n    {call}\n    n = 1\nexcept Exception:\n    n = 0\ndef f(x):\n    return 2 * x + n"
        verdict = judge(program(code), DOUBLE, box)
        if call.startswith("os.listdir") and not seccomp:
            continue  # the weaker wall lets Python look for modules
        assert verdict.outcome is Outcome.CORRECT, call
    # what is open may be looked at: how long standard input is, which open(0) asks
    reads = program("print(2 * int(open(0).read()))")
    assert judge(reads, STDIN, box).outcome is Outcome.CORRECT


def test_a_program_cannot_find_the_expected_outputs(sandbox):
    gold = json.dumps({"entry": "f", "tests": [[[1], "the-secret"]]})
    wanted = "''.join(reversed('terces-eht'))"
    code = f"import gc\ndef f(x):\n    return [o for o in map(repr, gc.get_objects()) if {wanted} in o]"
    assert judge(program(code), gold, sandbox).detail == "test 0: f(1) = []"


@pytest.mark.parametrize(
    "gold", ["", "4", "[]", '{"tests": []}', '{"tests": [[1, 2]]}', '{"inputs": ["1"], "outputs": []}']
)
def test_an_unparsable_gold_is_a_fault(gold, sandbox):
    verdict = judge(r"\boxed{x}", gold, sandbox)
    assert verdict.is_fault and "unparsable gold" in verdict.detail


def test_the_format_reward_goes_to_a_wrong_program(sandbox):
    assert verify_code(r"\boxed{x}", DOUBLE, sandbox, TIMEOUT_S, 0.1).reward == 0.1
    assert verify_code("none", DOUBLE, sandbox, TIMEOUT_S, 0.1).reward == 0.0


def test_the_programs_of_the_synthetic_task_are_judged_rightly(sandbox):
    import numpy as np

    from cures_ray.synthetic.tasks import TASKS

    first, second = generate("program", seed=0, count=2)
    solve = TASKS["program"].solve
    right = solve(first, None, np.random.default_rng(0))
    assert judge(right, first.answer, sandbox).outcome is Outcome.CORRECT
    assert judge(right, second.answer, sandbox).outcome is Outcome.INCORRECT


def test_the_report_tries_every_wall():
    report = sandbox_report()
    assert report["processes"] == report["files"] == "refused" and report["network"].startswith("refused (")
    assert "seccomp" in report["system calls"]


def test_small_rules():
    assert extract_code("text\nimport math\nprint(1)") == "import math\nprint(1)"
    assert extract_code("```python\nunfinished") == "unfinished"
    assert same_value([1.0, (1 / 3)], [1, 0.33333333]) and not same_value([1], [1, 2])
    assert not same_value(1, True) and not same_value("1", 1) and same_value({"a": [1]}, {"a": [1]})
    assert not same_value(10**400, 1.0) and same_value(float("nan"), float("nan"))
    assert read_tests(DOUBLE).inputs == [[1], [5]]
