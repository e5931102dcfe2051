"""The mathematical verifier's speed beside bare math-verify's: ``cures bench verifier [--pairs FILE]``.

One process of ``VerifyPool`` and bare math-verify (in this process, without alarms) judge the same groups of eight
completions a prompt, half of them right, one after the other in turn; ``*_ratio`` is ours over theirs in verdicts per
CPU second. A stream in which every tenth answer is hostile runs at the default ``verifier.timeout_s``. ``respawn`` is
the wall time from a SIGKILL of the process to the next verdict.

``--pairs FILE``: JSON lines {"gold", "prediction", "expected"}; how often both agree with the labels, and how many
golds are not right against themselves. The file stays where it is; disagreements are printed.

Writes benchmarks/results/verifier.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.results_file import RESULTS, spread, write_result
from cures_ray.config import VerifierConfig
from cures_ray.messages import Outcome, PromptRow, Verdict
from cures_ray.verify.pool import VerifyItem, VerifyPool

GROUP = 8
LATEX = (  # (gold, right, wrong) with two integers
    (r"\frac{{{a}}}{{{b}}}", r"\dfrac{{2\cdot {a}}}{{2\cdot {b}}}", r"\frac{{{a}}}{{{b}+1}}"),
    (r"{a}\sqrt{{{b}}}", r"\sqrt{{{a}^2\cdot {b}}}", r"{b}\sqrt{{{a}+1}}"),
    (r"x^2+{a}x+{b}", r"{b}+x({a}+x)", r"x^2-{a}x+{b}"),
    (r"[{a}, {a}+{b})", r"\left[{a}, {a}+{b}\right)", r"({a}, {a}+{b}]"),
    (r"\{{{a}, -{b}\}}", r"\{{-{b}, {a}\}}", r"\{{{a}, {b}+1\}}"),
)
HOSTILE = (  # (gold, answer)
    ("3", "9^{9^{9^{9}}}"),
    ("3", r"\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}"),
    (r"\sqrt{2}", "(" * 90 + "x" + "+1)^{2}" * 90),
    ("3", r"\frac{1}{1+" * 80 + "x" + "}" * 80),
    ("3", "1000000!"),
    ("x+1", "(x+1)^{100000} - x"),
    (r"\frac{1}{2}", "+".join(rf"\sin({k}x)" for k in range(60))),
    ("3", "x+" * 500_000 + "x"),
    (r"\pi", r"\log_{10}(" * 40 + "10^{10^{10}}" + ")" * 40),
    ("3", r"\int_0^1 \int_0^1 \sin(x^{y^x}) \cos(y^{x^{y}}) dx dy"),
)
HOSTILE_ITEMS = 200  # of which every tenth is hostile


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
    """Of this process and the pool's one worker."""
    pid = pool._workers[0]._pid
    worker = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 if pid is not None else 0.0
    return time.process_time() + worker


def all_cpu_seconds(pool: VerifyPool) -> float:
    """As ``cpu_seconds``, with the workers that were replaced."""
    process = pool._nursery._process
    assert process is not None
    ended = psutil.Process(process.pid).cpu_times()
    return cpu_seconds(pool) + ended.user + ended.system + ended.children_user + ended.children_system


def measure_kind(pool: VerifyPool, kind: str, rng: np.random.Generator, groups: int) -> dict[str, Any]:
    """Both judges on the same items. Raises AssertionError when a verdict of ours is wrong: a fast wrong verifier is
    worth nothing."""
    asked = list(KINDS[kind](rng, groups))
    cpu, wall = cpu_seconds(pool), time.perf_counter()
    parent = time.process_time()
    verdicts = pool.verify([i for i, _ in asked])
    parent = time.process_time() - parent
    cpu, wall = cpu_seconds(pool) - cpu, time.perf_counter() - wall
    for (i, right), verdict in zip(asked, verdicts, strict=True):
        if verdict.outcome is not (Outcome.CORRECT if right else Outcome.INCORRECT):
            raise AssertionError(f"{i.completion!r} against {i.prompt.answer!r}: {verdict}")
    bare_cpu = time.process_time()
    bare = [bare_verdict(i.prompt.answer, i.completion) for i, _ in asked]
    bare_cpu = time.process_time() - bare_cpu
    return {
        "kind": kind,
        "verdicts": len(asked),
        "cpu_s": cpu,
        "wall_s": wall,
        "pool_cpu_s": parent,
        "bare_cpu_s": bare_cpu,
        "bare_right": sum(found is right for found, (_, right) in zip(bare, asked, strict=True)),
    }


def bare_verdict(gold: str, completion: str) -> bool:
    from math_verify import parse, verify

    return bool(
        verify(
            parse(f"${gold}$", parsing_timeout=None),  # type: ignore[arg-type]
            parse(completion, parsing_timeout=None),  # type: ignore[arg-type]
            timeout_seconds=None,
        )
    )


def measure_hostile(pool: VerifyPool, rng: np.random.Generator) -> dict[str, Any]:
    normal = list(latex(rng, -(-HOSTILE_ITEMS // GROUP)))
    asked = [
        (item(HOSTILE[k // 10 % len(HOSTILE)][0], rf"\boxed{{{HOSTILE[k // 10 % len(HOSTILE)][1]}}}"), False)
        if k % 10 == 0
        else normal[k]
        for k in range(HOSTILE_ITEMS)
    ]
    cpu, wall = all_cpu_seconds(pool), time.perf_counter()
    verdicts = pool.verify([i for i, _ in asked])
    cpu, wall = all_cpu_seconds(pool) - cpu, time.perf_counter() - wall
    for k, ((i, right), verdict) in enumerate(zip(asked, verdicts, strict=True)):
        if k % 10 == 0:
            if verdict.outcome is Outcome.CORRECT:
                raise AssertionError(f"{i.completion[:80]!r} is correct")
        elif (verdict.outcome is Outcome.CORRECT) is not right or verdict.is_fault:
            raise AssertionError(f"{i.completion!r} beside a hostile answer: {verdict}")
    faults = sum(v.is_fault for v in verdicts)
    return {"kind": "hostile", "verdicts": len(asked), "cpu_s": cpu, "wall_s": wall, "faults": faults}


def measure_kill(pool: VerifyPool) -> dict[str, Any]:
    pid = pool._workers[0]._pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.05)  # its death is seen, not its answer
    verdict, seconds = _one(pool, "42", r"\boxed{42}")
    if verdict.outcome is not Outcome.CORRECT:
        raise AssertionError(f"after a kill: {verdict}")
    _, warm = _one(pool, "42", r"\boxed{42}")
    return {"kind": "kill", "respawn_s": seconds, "warm_verdict_s": warm}


def _one(pool: VerifyPool, gold: str, completion: str) -> tuple[Verdict, float]:
    began = time.perf_counter()
    (verdict,) = pool.verify([item(gold, completion)])
    return verdict, time.perf_counter() - began


def measure_pairs(pool: VerifyPool, file: Path) -> dict[str, Any]:
    """Agreement with the labels of ``file``; each disagreement of ours is printed."""
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    verdicts = pool.verify([item(p["gold"], p["prediction"]) for p in pairs])
    right = [
        (v.outcome is Outcome.CORRECT) is p["expected"] and not v.is_fault for p, v in zip(pairs, verdicts, strict=True)
    ]
    for pair, verdict, agrees in zip(pairs, verdicts, right, strict=True):
        if not agrees:
            print(f"{pair['gold']!r}, {pair['prediction']!r}: {verdict.outcome.value}, labelled {pair['expected']}")
    bare = sum(bare_verdict(p["gold"], p["prediction"]) is p["expected"] for p in pairs)
    golds = sorted({p["gold"] for p in pairs})
    itself = pool.verify([item(gold, f"\\boxed{{{gold}}}") for gold in golds])
    return {
        "kind": "pairs",
        "file": file.name,
        "pairs": len(pairs),
        "agree": sum(right),
        "bare_agree": bare,
        "golds": len(golds),
        "golds_not_themselves": sum(v.outcome is not Outcome.CORRECT for v in itself),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """[lowest, median, highest] over the repeats."""
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        found[f"{kind}_verdicts_per_second_per_core"] = spread([row["verdicts"] / row["cpu_s"] for row in mine])
        found[f"{kind}_verdicts_per_second_wall"] = spread([row["verdicts"] / row["wall_s"] for row in mine])
        found[f"{kind}_ratio_to_math_verify"] = spread([row["bare_cpu_s"] / row["cpu_s"] for row in mine])
        found[f"{kind}_pool_cpu_ms_per_verdict"] = spread([1e3 * row["pool_cpu_s"] / row["verdicts"] for row in mine])
    hostile = [row for row in rows if row["kind"] == "hostile"]
    found["hostile_tenth_verdicts_per_second"] = spread([row["verdicts"] / row["wall_s"] for row in hostile])
    found["hostile_tenth_verdicts_per_second_per_core"] = spread([row["verdicts"] / row["cpu_s"] for row in hostile])
    found["respawn_seconds"] = spread([row["respawn_s"] for row in rows if row["kind"] == "kill"])
    found["warm_verdict_seconds"] = spread([row["warm_verdict_s"] for row in rows if row["kind"] == "kill"])
    for row in (row for row in rows if row["kind"] == "pairs"):
        for name in ("agree", "bare_agree"):
            found[f"pairs_{name}"] = [row[name] / row["pairs"]] * 3
        found["pairs_golds_not_themselves"] = [float(row["golds_not_themselves"])] * 3
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cures bench verifier", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement, at least 5")
    parser.add_argument("--groups", type=int, default=40, help="prompts a repeat and kind, eight completions each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--pairs", type=Path, help="labelled pairs to measure agreement on")
    args = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # math-verify warns of its alarms being off
    rng, rows = np.random.default_rng(0), []
    with VerifyPool(VerifierConfig(fn="math", processes_per_worker=1)) as pool:
        pool.prewarm()
        for repeat in range(args.repeats + 1):  # the first warms up
            measured = [measure_kind(pool, kind, rng, args.groups) for kind in KINDS]
            measured += [measure_hostile(pool, rng), measure_kill(pool)]
            rows += [{"repeat": repeat, **row} for row in measured] if repeat else []
        if args.pairs is not None:
            rows.append({"repeat": 1, **measure_pairs(pool, args.pairs)})
    found = summary(rows)
    path = write_result("verifier", found, rows, folder=args.out)
    for name, (low, median, high) in found.items():
        print(f"{name:40} {median:.4g}  [{low:.4g}, {high:.4g}]")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
