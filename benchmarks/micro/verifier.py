"""Verdicts per second of one verifier process, by kind of answer: ``cures bench verifier``.

One process of ``VerifyPool`` judges groups of eight completions a prompt, half of them right, one kind after the other
in turn. Rates are per CPU second of the process and of its parent (what a core gives, whatever else the machine does)
and per wall second. Hostile answers end at a deadline or at a limit (here 1 s, killed at 1.5 s), so theirs is the
seconds a verdict takes. After a SIGKILL the process is replaced: ``respawn`` is the wall time to the next verdict.

Writes benchmarks/results/verifier.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.results_file import RESULTS, spread, write_result
from cures_ray.config import VerifierConfig
from cures_ray.messages import Outcome, PromptRow, Verdict
from cures_ray.verify.pool import VerifyItem, VerifyPool

GROUP = 8
HOSTILE_DEADLINE_S = 1.0
LATEX = (  # (gold, right, wrong) with two integers
    (r"\frac{{{a}}}{{{b}}}", r"\dfrac{{2\cdot {a}}}{{2\cdot {b}}}", r"\frac{{{a}}}{{{b}+1}}"),
    (r"{a}\sqrt{{{b}}}", r"\sqrt{{{a}^2\cdot {b}}}", r"{b}\sqrt{{{a}+1}}"),
    (r"x^2+{a}x+{b}", r"{b}+x({a}+x)", r"x^2-{a}x+{b}"),
    (r"[{a}, {a}+{b})", r"\left[{a}, {a}+{b}\right)", r"({a}, {a}+{b}]"),
    (r"\{{{a}, -{b}\}}", r"\{{-{b}, {a}\}}", r"\{{{a}, {b}+1\}}"),
)
HOSTILE = (  # (gold, completion)
    ("3", r"\boxed{9^{9^{9^{9}}}}"),
    ("3", r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}}"),
    (r"\sqrt{2}", r"\boxed{" + "(" * 90 + "x" + "+1)^{2}" * 90 + "}"),
    ("3", r"\boxed{" + r"\frac{1}{1+" * 80 + "x" + "}" * 80 + "}"),
)


def item(gold: str, completion: str) -> VerifyItem:
    return VerifyItem(
        prompt=PromptRow(prompt_id="0" * 16, text="", token_ids=np.zeros(0, np.int32), answer=gold),
        completion=completion,
    )


def integers(rng: np.random.Generator, groups: int) -> Iterator[tuple[VerifyItem, bool]]:
    """(item, whether it is right)."""
    for value in rng.integers(-99_999, 100_000, groups):
        for j in range(GROUP):
            shown = value if j % 2 else value + 1 + j
            yield item(str(value), rf"Adding the parts gives \boxed{{{shown}}}."), bool(j % 2)


def latex(rng: np.random.Generator, groups: int) -> Iterator[tuple[VerifyItem, bool]]:
    for g in range(groups):
        a, b = 2 * int(rng.integers(1, 50)) + 1, (2, 3, 5, 7)[int(rng.integers(4))]  # coprime enough to stay distinct
        gold, right, wrong = (text.format(a=a * 11 * 13, b=b) for text in LATEX[g % len(LATEX)])
        for j in range(GROUP):
            yield item(gold, rf"so the answer is \boxed{{{right if j % 2 else wrong}}}."), bool(j % 2)


KINDS = {"integer": integers, "latex": latex}


def cpu_seconds(pool: VerifyPool) -> float:
    """Of this process and the pool's one child."""
    process = pool._children[0]._process
    child = 0.0
    if process is not None:
        child = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9
    return time.process_time() + child


def measure_kind(pool: VerifyPool, kind: str, rng: np.random.Generator, groups: int) -> dict[str, Any]:
    """Raises AssertionError when a verdict is wrong: a fast wrong verifier is worth nothing."""
    asked = list(KINDS[kind](rng, groups * (10 if kind == "integer" else 1)))
    cpu, wall = cpu_seconds(pool), time.perf_counter()
    verdicts = pool.verify([i for i, _ in asked])
    cpu, wall = cpu_seconds(pool) - cpu, time.perf_counter() - wall
    for (i, right), verdict in zip(asked, verdicts, strict=True):
        if verdict.outcome is not (Outcome.CORRECT if right else Outcome.INCORRECT):
            raise AssertionError(f"{i.completion!r} against {i.prompt.answer!r}: {verdict}")
    slowest = max(v.seconds for v in verdicts)
    return {"kind": kind, "verdicts": len(asked), "cpu_s": cpu, "wall_s": wall, "slowest_s": slowest}


def measure_hostile(pool: VerifyPool, gold: str, completion: str) -> dict[str, Any]:
    verdict, seconds = _one(pool, gold, completion)
    if verdict.outcome is Outcome.CORRECT:
        raise AssertionError(f"{completion[:80]!r} is correct")
    _, after = _one(pool, "42", r"\boxed{42}")
    row = {
        "kind": "hostile",
        "answer": completion[:40],
        "outcome": verdict.outcome.value,
        "detail": verdict.detail[:80],
    }
    return row | {"wall_s": seconds, "next_verdict_s": after}


def measure_kill(pool: VerifyPool) -> dict[str, Any]:
    process = pool._children[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10.0)
    verdict, seconds = _one(pool, "42", r"\boxed{42}")
    if verdict.outcome is not Outcome.CORRECT:
        raise AssertionError(f"after a kill: {verdict}")
    _, warm = _one(pool, "42", r"\boxed{42}")
    return {"kind": "kill", "respawn_s": seconds, "warm_verdict_s": warm}


def _one(pool: VerifyPool, gold: str, completion: str) -> tuple[Verdict, float]:
    began = time.perf_counter()
    (verdict,) = pool.verify([item(gold, completion)], timeout_s=HOSTILE_DEADLINE_S)
    return verdict, time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cures bench verifier", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement, at least 5")
    parser.add_argument(
        "--groups", type=int, default=40, help="prompts a repeat, eight completions each; ten times as many integers"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    rng, rows = np.random.default_rng(0), []
    with VerifyPool(VerifierConfig(fn="math", processes_per_worker=1)) as pool:
        pool.prewarm()
        for repeat in range(args.repeats + 1):  # the first warms up
            measured = [measure_kind(pool, kind, rng, args.groups) for kind in KINDS]
            measured += [measure_hostile(pool, *answer) for answer in HOSTILE] + [measure_kill(pool)]
            rows += [{"repeat": repeat, **row} for row in measured] if repeat else []
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        found[f"{kind}_verdicts_per_second_per_core"] = spread([row["verdicts"] / row["cpu_s"] for row in mine])
        found[f"{kind}_verdicts_per_second_wall"] = spread([row["verdicts"] / row["wall_s"] for row in mine])
    hostile = [row for row in rows if row["kind"] == "hostile"]
    slowest = [max(row["wall_s"] for row in hostile if row["repeat"] == r) for r in range(1, args.repeats + 1)]
    found["hostile_slowest_verdict_seconds"] = spread(slowest)
    found["respawn_seconds"] = spread([row["respawn_s"] for row in rows if row["kind"] == "kill"])
    found["warm_verdict_seconds"] = spread([row["warm_verdict_s"] for row in rows if row["kind"] == "kill"])
    path = write_result("verifier", found, rows, folder=args.out)
    for name, (low, median, high) in found.items():
        print(f"{name:40} {median:.4g}  [{low:.4g}, {high:.4g}]")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
