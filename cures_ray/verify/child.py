"""One verifier process of ``verify_pool.py``: JSON lines on standard input and output, one item a line.

Started as ``python -m cures_ray.verify.child '{"fn": ..., "max_rss_mb": ..., "format_reward": ...}'``. First line
out: {"ready": true} or {"error": why}. Then for each {"completion", "answer", "prompt", "row", "timeout_s"} one
{"outcome", "reward", "detail", "retire"}.

Three things end an item that takes too long: an alarm here (SIGALRM, caught between bytecodes, a fault verdict); the
parent, which kills this process a little later; and, should the parent be gone, SIGPROF, which ends the process even
inside C code. After an alarm or a lack of memory the process asks to be replaced: what SymPy left behind is unknown.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.mathematics import fault, verify_math

Judge = Callable[[dict[str, Any]], Verdict]


class SoftDeadline(BaseException):
    """The item's alarm; stands in where math-verify is not loaded (its TimeoutException must not be swallowed)."""


def main() -> None:
    options = json.loads(sys.argv[1])
    requests, replies = _private_pipes()
    limit = options["max_rss_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.ERROR)  # math-verify warns of its alarms being off, and quotes model outputs
    try:
        judge = JUDGES.get(options["fn"], _user_judge)(options)
    except ConfigError as error:
        _send(replies, {"error": str(error)})
        return
    except (MemoryError, ImportError, OSError) as error:
        why = f"the verifier does not start within verifier.max_rss_mb = {options['max_rss_mb']}: {error!r}; raise it"
        _send(replies, {"error": why})
        return
    _send(replies, {"ready": True})
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in requests:
        _send(replies, _judge_one(judge, json.loads(line)))


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The protocol's ends on descriptors of their own: what a user function prints goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _on_alarm(number: int, frame: Any) -> None:
    raise _timeout_exception()()


def _timeout_exception() -> type[BaseException]:
    """math-verify's own, as its code lets exactly that one pass."""
    errors = sys.modules.get("math_verify.errors")
    return errors.TimeoutException if errors is not None else SoftDeadline


def _judge_one(judge: Judge, item: dict[str, Any]) -> dict[str, Any]:
    retire = False
    signal.setitimer(signal.ITIMER_PROF, 2 * item["timeout_s"] + 2)
    try:
        signal.setitimer(signal.ITIMER_REAL, item["timeout_s"])
        try:
            verdict = judge(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
        verdict, retire = fault("out of memory (verifier.max_rss_mb)"), True
    except Exception as error:
        verdict = fault(f"{type(error).__name__}: {error}")
    except BaseException as error:
        if not isinstance(error, _timeout_exception() | SoftDeadline):
            raise
        verdict, retire = fault(f"no verdict within {item['timeout_s']:g} s (verifier.timeout_s)"), True
    signal.setitimer(signal.ITIMER_PROF, 0)
    retire = retire or (verdict.is_fault and "MemoryError" in verdict.detail)
    return {"outcome": verdict.outcome, "reward": verdict.reward, "detail": verdict.detail, "retire": retire}


def _math_judge(options: dict[str, Any]) -> Judge:
    reward = options["format_reward"]
    warm = verify_math(r"\boxed{\frac{x}{2}}", r"\frac{x + 0}{2}")  # imports SymPy and builds its parser now
    if warm.outcome is not Outcome.CORRECT:  # math-verify hides a MemoryError
        raise MemoryError(warm.detail)
    return lambda item: verify_math(item["completion"], item["answer"], reward)


def _code_judge(options: dict[str, Any]) -> Judge:
    from cures_ray.verify.programs import Sandbox, SandboxError, verify_code

    sandbox = Sandbox(options["max_rss_mb"])
    try:
        sandbox.start()
    except (OSError, ValueError, SandboxError) as error:
        raise ConfigError(f"verifier.fn = 'code': the sandbox does not start: {error}") from error
    return lambda item: verify_code(
        item["completion"], item["answer"], sandbox, item["timeout_s"], options["format_reward"]
    )


def _user_judge(options: dict[str, Any]) -> Judge:
    from cures_ray.verify.functions import load_reward_function

    function = load_reward_function(options["fn"])
    return lambda item: function(item["prompt"], item["completion"], item["answer"], item["row"])


def _reasoning_gym_judge(options: dict[str, Any]) -> Judge:
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"verifier.fn = 'reasoning_gym': the package cannot be imported ({error}); "
            "pip install 'cures-ray[reasoning-gym]'"
        ) from None
    from cures_ray.verify.reasoning_gym import ReasoningGymJudge

    return ReasoningGymJudge()


JUDGES: dict[str, Callable[[dict[str, Any]], Judge]] = {
    "math": _math_judge,
    "code": _code_judge,
    "reasoning_gym": _reasoning_gym_judge,
}


if __name__ == "__main__":
    main()
