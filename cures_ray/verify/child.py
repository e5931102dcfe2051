"""The processes of ``pool.py``: a nursery that has loaded what is safe to share, and the workers that it forks.

    pool --control socket--> nursery --fork--> worker: own session, own limits, loads users' functions itself
    pool --data socket (handed over as a descriptor)--> worker: one line a message, one line a verdict back

A message is {"token", "timeout_s", "groups": [{"answer", "prompt", "row", "completions"}, ...]}; each verdict is
[token, place, outcome, reward, detail, seconds, retire], "place" counting the message's completions. Without the
token, a line is nobody's verdict: a reward function that writes to foreign descriptors cannot shift the verdicts after
it. A copy that a reward function forks loses the data socket at once and ends when it comes back here.

An alarm (SIGALRM, caught between bytecodes) ends an item that takes too long; the pool kills a little later. After an
alarm or a lack of memory the worker asks to be replaced: what SymPy left behind is unknown. A fork costs milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.mathematics import fault, verify_math

Item = dict[str, Any]  # prompt, completion, answer, row, timeout_s
Judge = Callable[[list[Item]], Iterator[tuple[int, Verdict]]]  # each item's place and verdict, as they come
MATH_CPU_SECONDS = 2.0  # an item; answers take milliseconds, a busy machine's waiting does not count
fired = [int(signal.SIGALRM)]  # the alarm that went off last
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class SoftDeadline(BaseException):
    """The item's alarm; stands in where math-verify is not loaded (its TimeoutException must not be swallowed)."""


def main() -> None:
    """The nursery. First line out: {"ready": true} or {"error": why}; then {"start"} with a descriptor is answered by
    {"pid"}, {"end": pid} by {"status"}. Ends, with all that it started, when the pool's end of the socket closes."""
    options, control = json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    control.set_inheritable(False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a reward function prints
    limit = options["max_rss_mb"] << 20
    if options["fn"] != "code":  # there each program has its own
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of a worker come here
    logging.disable(logging.ERROR)  # math-verify warns of its alarms being off, and quotes model outputs
    try:
        if options["fn"] == "math":
            _warm_up()
    except (MemoryError, ImportError, OSError) as error:
        _send(control, {"error": _too_small(options, error)})
        return
    _send(control, {"ready": True})
    workers: set[int] = set()
    try:
        while True:
            text, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
            if not text:
                return
            request = json.loads(text)
            if "end" in request:
                workers.discard(request["end"])
                _send(control, {"status": _end(request["end"], workers)})
            elif (pid := os.fork()) == 0:
                control.close()
                _worker(options, socket.socket(fileno=descriptors[0]))
            else:
                os.close(descriptors[0])
                workers.add(pid)
                _send(control, {"pid": pid})
    finally:
        kill_tree(os.getpid(), itself=False)


def _end(pid: int, workers: set[int]) -> int | None:
    """Kill a worker, its descendants and the orphans that came here. Returns its wait status."""
    kill_tree(pid)
    status = None
    with contextlib.suppress(ChildProcessError):
        status = os.waitpid(pid, 0)[1]
    for orphan in psutil.Process().children():
        if orphan.pid not in workers:
            kill_tree(orphan.pid)
            os.waitpid(orphan.pid, 0)
    return status


def kill_tree(pid: int, itself: bool = True) -> None:
    """SIGKILL to a process, its group and all its descendants, also those in sessions of their own."""
    try:
        victims = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        victims = []
    if itself:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def _worker(options: dict[str, Any], data: socket.socket) -> None:
    """In the fork; does not return."""
    own = os.getpid()
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.register_at_fork(after_in_child=lambda: _close(data))
        try:
            style, judge = JUDGES.get(options["fn"], _user_judge)(options)
        except ConfigError as error:
            _send(data, {"error": str(error)})
            return
        except (MemoryError, ImportError, OSError) as error:
            _send(data, {"error": _too_small(options, error)})
            return
        signal.signal(signal.SIGALRM, _on_alarm)
        _send(data, {"ready": True, "style": style})
        for line in data.makefile("rb"):
            if not _answer(judge, json.loads(line), data, own):
                return
    except OSError:  # the pool has closed its end, or this is a copy without one
        pass
    finally:
        os._exit(0)


def _close(data: socket.socket) -> None:
    """In a copy that a reward function forked; a copy of a copy has nothing left to close."""
    if (descriptor := data.detach()) >= 0:
        os.close(descriptor)


def _answer(judge: Judge, message: dict[str, Any], data: socket.socket, own: int) -> bool:
    """Send one line a verdict. False: this worker is not to be used again."""
    items = [
        {"prompt": group["prompt"], "row": group["row"], "answer": group["answer"], "completion": completion}
        for group in message["groups"]
        for completion in group["completions"]
    ]
    timeout_s, left, began = message["timeout_s"], dict.fromkeys(range(len(items))), time.monotonic()

    def send(place: int, verdict: Verdict, retire: bool) -> None:
        nonlocal began
        if os.getpid() != own:
            os._exit(0)
        now = time.monotonic()
        reply = [message["token"], place, verdict.outcome, verdict.reward, verdict.detail, now - began, retire]
        _send(data, reply)
        del left[place]
        began = now

    why = ""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        for place, verdict in judge([item | {"timeout_s": timeout_s} for item in items]):
            signal.setitimer(signal.ITIMER_REAL, 0)
            retire = verdict.is_fault and "MemoryError" in verdict.detail
            send(place, verdict, retire)
            if retire:
                return False
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
    except MemoryError:
        why = "out of memory (verifier.max_rss_mb)"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    except BaseException as error:
        if os.getpid() != own:
            os._exit(0)
        if not isinstance(error, _timeout_exception() | SoftDeadline):
            raise
        spent = fired[-1] == signal.SIGPROF  # math-verify raises anew, without the first one's text
        limit = f"{MATH_CPU_SECONDS:g} s of processor time" if spent else f"{timeout_s:g} s (verifier.timeout_s)"
        why = f"no verdict within {limit}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if why and left:
        send(next(iter(left)), fault(why), True)
    return not why


def _send(channel: socket.socket, message: Any) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _on_alarm(number: int, frame: Any) -> None:
    fired[:] = [number]
    raise _timeout_exception()()


def _timeout_exception() -> type[BaseException]:
    """math-verify's own, as its code lets exactly that one pass."""
    errors = sys.modules.get("math_verify.errors")
    return errors.TimeoutException if errors is not None else SoftDeadline


def _too_small(options: dict[str, Any], error: BaseException) -> str:
    return f"the verifier does not start within verifier.max_rss_mb = {options['max_rss_mb']}: {error!r}; raise it"


def _warm_up() -> None:
    """Import SymPy and build math-verify's parser now, for all workers."""
    warm = verify_math(r"\boxed{\frac{x}{2}}", r"\frac{x + 0}{2}")
    if warm.outcome is not Outcome.CORRECT:  # math-verify hides a MemoryError
        raise MemoryError(warm.detail)


def _each(judge: Callable[[Item], Verdict]) -> Judge:
    return lambda items: ((place, judge(item)) for place, item in enumerate(items))


def _math_judge(options: dict[str, Any]) -> tuple[str, Judge]:
    reward = options["format_reward"]
    signal.signal(signal.SIGPROF, _on_alarm)

    def judge(item: Item) -> Verdict:
        signal.setitimer(signal.ITIMER_PROF, MATH_CPU_SECONDS)
        try:
            return verify_math(item["completion"], item["answer"], reward)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    return "item", _each(judge)


def _code_judge(options: dict[str, Any]) -> tuple[str, Judge]:
    from cures_ray.verify.programs import Sandbox, SandboxError, verify_code

    sandbox, reward = Sandbox(options["max_rss_mb"]), options["format_reward"]
    try:
        sandbox.start()
    except (OSError, ValueError, SandboxError) as error:
        raise ConfigError(f"verifier.fn = 'code': the sandbox does not start: {error}") from error
    return "item", _each(
        lambda item: verify_code(item["completion"], item["answer"], sandbox, item["timeout_s"], reward)
    )


def _user_judge(options: dict[str, Any]) -> tuple[str, Judge]:
    from cures_ray.verify.functions import load_reward_function

    function = load_reward_function(options["fn"], tuple(options["reward_range"]))
    return function.style, function.judge


def _reasoning_gym_judge(options: dict[str, Any]) -> tuple[str, Judge]:
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"verifier.fn = 'reasoning_gym': the package cannot be imported ({error}); "
            "pip install 'cures-ray[reasoning-gym]'"
        ) from None
    from cures_ray.verify.reasoning_gym import ReasoningGymJudge

    return "item", _each(ReasoningGymJudge())


JUDGES: dict[str, Callable[[dict[str, Any]], tuple[str, Judge]]] = {
    "math": _math_judge,
    "code": _code_judge,
    "reasoning_gym": _reasoning_gym_judge,
}


if __name__ == "__main__":
    main()
