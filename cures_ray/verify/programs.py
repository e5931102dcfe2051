r"""The code verifier: model-written Python against hidden tests, in a process that can do nothing but compute.

    verify.child --(code, inputs)--> sandbox_child.py --fork--> limits, seccomp, exec(code)
                 <----- outputs ----                            one process a run, killed at the deadline

The gold (``answer``) is JSON, in one of two shapes. Call-based when there is a function name, else stdin to stdout:

    {"entry": "f", "tests": [[input, output], ...]}          input: a list of arguments, or the only argument
    {"fn_name": "f", "inputs": [[...], ...], "outputs": [...]}   "fn_name" may be missing; outputs as they are

The program is the last ``` block of the completion, else the content of its last \boxed{}, else the text from the
first line that starts like a program. For call-based tests it defines the function (or a class ``Solution`` with
it), or is one expression of the arguments, ``x`` unless the gold says ``"parameters": "x, y"``.

Correct: every test gives the expected value (floats to 1e-6, relative; tuples are lists; text without trailing
spaces). Expected values stay outside the sandbox. Incorrect: a wrong value, an exception, too much CPU time, memory or
output, waiting without end, a forbidden system call. Fault: an unreadable gold, or a wall deadline at which the
program had queued for a processor (an overloaded machine: nothing was learned about the answer).

Programs may import the usual standard modules, numpy and sympy. What they write to standard error is not output.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cures_ray.boxes import last_box
from cures_ray.messages import Verdict
from cures_ray.verify.mathematics import correct, fault, incorrect

CPU_SHARE = 0.3  # of the wall limit of an item: a loop ends by processor time also on a busy machine
WALL_SHARE = 0.9
START_SECONDS = 60.0  # imports sympy
MAX_CODE_CHARS = 100_000
FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
PROGRAM_START = re.compile(r"^(?:def |class |import |from |async def |@)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """Hidden tests, read from the gold."""

    entry: str | None  # None: stdin to stdout
    parameters: str  # of an expression
    inputs: list[Any]  # argument lists, or stdin texts
    outputs: list[Any]


class SandboxError(RuntimeError):
    """The sandbox itself does not work; says nothing about the program."""


@lru_cache(maxsize=1024)
def read_tests(answer: str) -> Tests | str:
    """The tests of a gold, or what is wrong with it."""
    try:
        gold = json.loads(answer)
        entry = gold.get("entry") or gold.get("fn_name")
        if "tests" in gold:
            inputs, outputs = [list(column) for column in zip(*gold["tests"], strict=True)]
        else:
            inputs, outputs = gold["inputs"], gold["outputs"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    if not inputs or len(inputs) != len(outputs):
        return f"{len(inputs)} inputs and {len(outputs)} outputs"
    if entry is None and not all(isinstance(text, str) for text in [*inputs, *outputs]):
        return "inputs or outputs are not text, and there is no entry or fn_name to call"
    if entry is not None:
        inputs = [value if isinstance(value, list) else [value] for value in inputs]
    return Tests(entry=entry, parameters=str(gold.get("parameters", "x")), inputs=inputs, outputs=outputs)


def extract_code(completion: str) -> str | None:
    """The program of a completion, by the rule at the top of this file."""
    if blocks := FENCE.findall(completion):
        return blocks[-1]
    if (boxed := last_box(completion)) is not None:
        return boxed.strip().removeprefix("\\text{").strip("$ ")
    if match := PROGRAM_START.search(completion):
        return completion[match.start() :]
    return None


class Sandbox:
    """One ``sandbox_child.py``, started when first used and again after it was lost. Not for several threads."""

    def __init__(self, memory_mb: int = 1024, *, seccomp: bool = True) -> None:
        self.memory_mb, self.seccomp = memory_mb, seccomp
        self.network = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def run(self, code: str, tests: Tests, wall_s: float, cpu_s: float) -> list[dict[str, Any]]:
        """The runs of ``code``: {"why", "output", "failed", "cpu_s"} each; one run for call-based tests.

        Raises:
            SandboxError: the sandbox could not be started, died or did not answer in time.
        """
        request = {
            "code": code,
            "entry": tests.entry,
            "parameters": tests.parameters,
            "inputs": tests.inputs,
            "cpu_s": cpu_s,
            "wall_s": wall_s,
            "memory_mb": self.memory_mb,
            "seccomp": self.seccomp,
        }
        try:
            process = self._process if self._process is not None and self._process.poll() is None else self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return self._read_line(time.monotonic() + wall_s + 2.0)
        except (OSError, ValueError) as error:
            self.close()
            raise SandboxError(f"{type(error).__name__}: {error}") from error
        except BaseException:  # the caller's alarm: what is running must not answer the next request
            self.close()
            raise

    def start(self) -> None:
        """Start now what ``run`` would start."""
        if self._process is None:
            self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        child = Path(__file__).with_name("sandbox_child.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(child), *_package_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            bufsize=-1,
        )
        self._rest = b""
        self.network = self._read_line(time.monotonic() + START_SECONDS)["network"]
        return self._process

    def _read_line(self, deadline: float) -> Any:
        assert self._process is not None and self._process.stdout is not None
        parts, out = [self._rest], self._process.stdout.fileno()
        while b"\n" not in parts[-1]:
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise OSError("the sandbox did not answer in time")
            if not (chunk := os.read(out, 1 << 16)):
                raise OSError(f"the sandbox ended with status {self._process.wait(1.0)}")
            parts.append(chunk)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the sandbox; the program in it dies with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(5.0)
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self._process = None


@lru_cache(maxsize=1)
def _package_folders() -> list[str]:
    """Where numpy and sympy lie, for programs that import them."""
    found = (importlib.util.find_spec(name) for name in ("numpy", "sympy"))
    return sorted({str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin})


def verify_code(
    completion: str, answer: str, sandbox: Sandbox, timeout_s: float = 5.0, format_reward: float = 0.0
) -> Verdict:
    """Judge a completion's program by the tests in ``answer``; ``format_reward`` goes to a wrong program."""
    tests = read_tests(answer)
    if isinstance(tests, str):
        return fault(f"unparsable gold ...{answer[-80:]!r}: {tests}")
    code = extract_code(completion)
    if code is None or not code.strip():
        return incorrect("no program: no code block, box or definition")
    if len(code) > MAX_CODE_CHARS:
        return incorrect(f"the program has {len(code)} characters", format_reward)
    try:
        runs = sandbox.run(code, tests, WALL_SHARE * timeout_s, CPU_SHARE * timeout_s)
    except SandboxError as error:
        return fault(f"sandbox: {error}")
    why = runs[-1]["why"]
    if why == "starved":
        return fault(f"no end within {WALL_SHARE * timeout_s:.3g} s, and the program did not get its processor time")
    if why == "SIGKILL":
        return fault("the program was killed from outside")
    if why:
        reasons = {"cpu": f"more than {CPU_SHARE * timeout_s:.3g} s of processor time", "output": "too much output"}
        reasons["waits"] = f"no end within {WALL_SHARE * timeout_s:.3g} s: it waits, with processor time left"
        return incorrect(reasons.get(why, f"ended by {why}"), format_reward)
    wrong = _wrong_call(runs[0]["output"], tests) if tests.entry is not None else _wrong_text(runs, tests)
    return correct(f"{len(tests.inputs)} tests passed") if wrong is None else incorrect(wrong, format_reward)


def _wrong_call(output: str, tests: Tests) -> str | None:
    """What is wrong with the result lines of a call-based run; None: nothing."""
    lines = [line for line in output.split("\n") if line]
    for i, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
        try:
            result = json.loads(lines[i])
            if "error" in result:
                return f"test {i}: {result['error']}"
            value = result["value"]
        except (IndexError, ValueError, TypeError, KeyError, RecursionError):
            return f"test {i}: no result"
        if not same_value(value, expected):
            return f"test {i}: f({json.dumps(given)[1:-1]:.40}) = {json.dumps(value):.60}"
    return None


def _wrong_text(runs: list[dict[str, Any]], tests: Tests) -> str | None:
    for i, run in enumerate(runs):
        if run["failed"]:
            reason = run["output"].strip().rpartition('{"error": ')[2]
            return f"test {i}: {reason[-150:].strip('}')}"
        if _lines(run["output"]) != _lines(tests.outputs[i]):
            return f"test {i}: printed {run['output'].strip()[:60]!r}"
    return None if len(runs) == len(tests.inputs) else "not every test ran"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def same_value(a: Any, b: Any) -> bool:
    """Equality of JSON values; floats to 1e-6, and a truth value is no number."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        try:
            return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) or (a != a and b != b)
        except (TypeError, OverflowError):
            return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


PROBES = {
    "network": "import socket\nsocket.socket().connect(('127.0.0.1', 9))",
    "processes": "import os\nos.fork()",
    "files": "open('probe', 'w').write('x')",
}


def sandbox_report() -> dict[str, str]:
    """What the sandbox on this machine refuses, tried out, and by which means; for ``cures doctor``."""
    sandbox = Sandbox(memory_mb=512)
    report = {}
    try:
        for what, code in PROBES.items():
            tests = Tests(entry=None, parameters="", inputs=[""], outputs=[""])
            (run,) = sandbox.run(code, tests, 10.0, 5.0)
            refused = "PermissionError" in run["output"] or "BlockingIOError" in run["output"]
            report[what] = "refused" if refused else "NOT REFUSED: do not train on code here"
        report["network"] += f" ({sandbox.network})"
        probe = "import ctypes\nprint(ctypes.CDLL(None).prctl(21, 0, 0, 0, 0))"
        (run,) = sandbox.run(probe, Tests(entry=None, parameters="", inputs=[""], outputs=[""]), 10.0, 5.0)
        strong = run["output"].strip() == "-1"
        report["system calls"] = "seccomp" if strong else "NO seccomp here: audit hook and limits only, a weaker wall"
    except SandboxError as error:
        report["sandbox"] = f"does not work: {error}"
    finally:
        sandbox.close()
    return report
