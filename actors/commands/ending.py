"""What a finished run says: accuracy before and after, conservation, and where to look further."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from cures_ray.run.report import write_report
from cures_ray.run.summary import RunSummary


def finish(name: str, summary: RunSummary, folder: Path, setup: float, began: float) -> dict[str, Any]:
    """The end of `make demo` and `make real`: ``summary.json`` in ``folder``, with the seconds of ``setup`` and of all
    since ``began`` (monotonic), and the last lines."""
    data = summary.as_json() | {"seconds_setup": round(setup, 1), "seconds": round(time.monotonic() - began, 1)}
    (folder / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
    print(ending(summary))
    print(f"{name}: {data['seconds']} s in all")
    return data


def ending(summary: RunSummary) -> str:
    """The last lines of ``cures train``."""
    data, run_dir = summary.as_json(), summary.run_dir
    lines = [""]
    if summary.interrupted_at is not None:
        lines += [
            f"interrupted after {summary.interrupted_at} of {summary.steps} steps, with a checkpoint: the same command "
            f"continues",
            "",
        ]
    lines += [*accuracy_lines(data), "", f"rollouts: {summary.accounting.line()}", ""]
    lines += [f"training took {summary.seconds_training:.0f} s after {summary.seconds_start:.0f} s of start-up"]
    if summary.exported:
        lines += [f"exported model   {summary.exported}   (AutoModelForCausalLM.from_pretrained, vllm.LLM)"]
    lines += [
        f"report           {_report(run_dir)}",
        f"summary          {run_dir / 'summary.json'}",
        f"TensorBoard log  {run_dir / 'tensorboard'}",
        "",
        "look further:",
        f"  {command('tensorboard')} --logdir {run_dir / 'tensorboard'}",
        f"  {command('cures')} top {run_dir} --once",
        f"  {command('cures')} ledger {run_dir}",
        f"  {command('cures')} ledger {run_dir} --replay tau=0.05",
    ]
    return "\n".join(lines)


def _report(run_dir: Path) -> str:
    """Write the run's page; where it is, or why there is none."""
    try:
        return f"{write_report(run_dir)}   (open it in a browser)"
    except Exception as error:  # a page that cannot be drawn must not hide that the run is done
        return f"could not be written: {type(error).__name__}: {error}"


def accuracy_lines(data: dict[str, Any]) -> list[str]:
    """Held-out greedy accuracy before and after, in all and by level; of one evaluation only what it measured."""
    measured = data["evaluations"]
    if not measured:
        return ["no held-out evaluation was made (data.eval, eval.interval)"]
    last = measured[-1]["version"]
    if len(measured) == 1:
        accuracy = measured[0]["eval/greedy_accuracy"]
        return [f"held-out accuracy {accuracy:.3f} after step {last}; measured once, so no gain is known"]
    rows = [("all", data["held_out_accuracy_before"], data["held_out_accuracy_after"], data["best_constant_accuracy"])]
    rows += [(f"level {k}", v["before"], v["after"], v["best_constant"]) for k, v in data["by_level"].items()]
    known = rows[0][3] is not None
    lines = [f"{'held-out accuracy':<28}{'before':>8}{'after':>8}{'gain':>8}" + (f"{'constant':>10}" if known else "")]
    for name, first, latest, constant in rows:
        gain = _number(_gain(first, latest), "+")
        beside = f"  {_number(constant)}" if known else ""
        lines.append(f"{name:<28}{_number(first)}{_number(latest)}{gain}{beside}")
    if known:
        lines.append("constant: what the best answer that is the same for every prompt would get")
    if data["interrupted_at"] is not None and last < data["interrupted_at"]:
        lines.append(
            f"after: as measured after step {last}; steps {last + 1} to {data['interrupted_at']} are not in it"
        )
    return lines


def command(name: str) -> str:
    """How to call ``name`` from the shell as this process was called: from the same virtual environment."""
    beside = Path(sys.executable).parent / name
    if not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def _gain(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else last - first


def _number(value: float | None, sign: str = "") -> str:
    return f"{'-':>8}" if value is None else f"{value:>{sign}8.3f}"
