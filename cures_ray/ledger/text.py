"""What `cures ledger` prints: tables, small bars, and the sections of the two reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.ledger.replay import Replay

LEVELS = " ▁▂▃▄▅▆▇█"
MOST_ROWS = 24  # of a table by step; --csv has all


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: numbers to the right, texts to the left."""
    cells = [[cell(value) for value in row] for row in rows]
    left = [any(isinstance(row[i], str) for row in rows) for i in range(len(headings))]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = []
    for row in [list(headings), *cells]:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A text of a value: 3 significant digits below 100, "-" where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def bars(counts: Sequence[float]) -> str:
    """One character a bin, the fullest as a full block; a bin that holds anything is seen."""
    top = max(counts, default=0) or 1
    return "".join(LEVELS[0 if c <= 0 else max(1, round(8 * c / top))] for c in counts)


def quantiles(histogram: Sequence[float], at: Sequence[float] = (0.1, 0.5, 0.9)) -> list[float]:
    """Quantiles of values in (0, 1) from equal bins, linear within a bin; NaN without values."""
    counts = np.asarray(histogram, float)
    if counts.sum() <= 0:
        return [float("nan")] * len(at)
    ends = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    bins = np.minimum(np.searchsorted(ends[1:], at), len(counts) - 1)
    return ((bins + (np.asarray(at) - ends[bins]) / (ends[bins + 1] - ends[bins])) / len(counts)).tolist()


def share(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{100 * value:.0f}%"


def some(rows: Sequence[Any], most: int = MOST_ROWS) -> list[Any]:
    """At most ``most`` rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]


# -- the report ----------------------------------------------------------------------------------------


def heading(config: Config, folder: object, batches: int) -> str:
    c = config.curriculum
    tau = f"tau = {c.tau:g}" if c.tau is not None else f"tau steered to an ESS of {c.target_ess_fraction:g} of the pool"
    steered = f", {tau}" if c.method == "cures" and c.sampling == "potential" else ""
    return (
        f"{folder}: method {c.method}, m = {c.prompts_per_step} prompts and N = {c.rollouts_per_step} rollouts a step"
        f"{steered}; {batches} of {config.trainer.steps} steps committed"
    )


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """``steps``: of ``ledger_report.step_row``."""
    headings = ["step", "beliefs 0 to 1", "p10", "p50", "p90", "tau", "ESS", "of pool", "prompts", "max n", "useful"]
    headings += ["reward", "trained", "discarded"]
    rows = [
        [
            s["step"],
            f"[{bars(s['belief_histogram'])}]",
            *(s["p10"], s["p50"], s["p90"], s["tau"], s["ess"], share(s["ess_fraction"])),
            *(s["distinct_prompts"], s["max_n"], share(s["useful"]), s["prompt_reward"]),
            *(s["trained"], s["discarded"]),
        ]
        for s in some(steps)
    ]
    shown = "" if len(rows) == len(steps) else f" ({len(rows)} of {len(steps)} steps; --csv has all)"
    return f"Beliefs and draws by step{shown}\n{table(headings, rows)}"


def allocation_table(history: Sequence[dict[str, Any]]) -> str:
    """Rollouts against believed accuracy (the paper's Fig. 4), all steps together."""
    n = np.array([v for line in history for v in line["n"]], float)
    p = np.array([v for line in history for v in line["p"]], float)
    place = np.minimum((p * 10).astype(int), 9)
    found = [i for i in range(10) if (place == i).any()]
    means = {i: float(n[place == i].mean()) for i in found}
    rows: list[list[Any]] = []
    for i in found:
        here = n[place == i]
        bar = "█" * max(1, round(24 * means[i] / max(means.values())))
        rows.append([f"{i / 10:.1f} - {(i + 1) / 10:.1f}", len(here), means[i], int(here.min()), int(here.max()), bar])
    title = "Rollouts against believed accuracy (groups as they were planned, at most 512 a step)"
    return f"{title}\n{table(['accuracy', 'groups', 'mean n', 'min n', 'max n', ''], rows)}"


def prompts_table(title: str, prompts: Sequence[dict[str, Any]], width: int = 64) -> str:
    """``prompts``: of ``ledger_report.prompt_row``."""
    has_text, has_level = any(p["text"] for p in prompts), any(p["level"] for p in prompts)
    headings = ["prompt", *(["level"] if has_level else []), "accuracy", "alpha", "beta", "visits"]
    headings += ["text"] if has_text else []
    rows = []
    for p in prompts:
        text = p["text"] if len(p["text"]) <= width else p["text"][: width - 1] + "…"
        figures = [p["accuracy"], p["alpha"], p["beta"], p["visits"]]
        rows.append([p["prompt"], *([p["level"]] if has_level else []), *figures, *([text] if has_text else [])])
    return f"{title}\n{table(headings, rows) if rows else '  none yet'}"


# -- the replay ----------------------------------------------------------------------------------------

REPLAY = {
    "rollouts": "rollouts",
    "tau": "tau",
    "ess": "ESS",
    "distinct_prompts": "prompts",
    "max_n": "max n",
    "mean_accuracy": "accuracy",
    "useful": "useful",
    "useful_posterior": "(Beta)",
    "hard": "p<0.1",
    "easy": "p>0.9",
    "overlap": "same prompts",
}
SHARES = ("useful", "useful_posterior", "hard", "easy", "overlap")


def replay_text(result: Replay, folder: object) -> str:
    """Totals of the run and every alternative, then one table an alternative by batch."""
    if not result.actual:
        parts = [f"{folder}: no batch was drawn in the journals still kept; nothing to replay"]
        return "\n\n".join([*parts, *result.problems])
    first, last = result.actual[0].batch, result.actual[-1].batch
    parts = [
        f"{folder}: batches {first} to {last} replayed from the journal"
        + (" (older ones are not kept: curriculum.snapshot_every)" if first else "")
        + f"; {result.agrees} of {result.compared} committed ones agree with the history\n"
        "Every batch is drawn from the beliefs that the run had then, with its random numbers. Shares of rollouts "
        "under those beliefs:\nuseful: in groups with both outcomes, at the posterior mean, and averaged over the "
        "posterior (Beta); p<0.1, p>0.9: on hard and easy prompts."
    ]
    if result.notes:
        parts.append("\n".join(f"note: {note}" for note in result.notes))
    totals = [["the run", *_figures(result.totals(result.actual))]]
    totals += [[n, *_figures(result.totals(d))] for n, d in zip(result.names(), result.others, strict=True)]
    parts.append(f"All batches\n{table(['', *REPLAY.values()], totals)}")
    for name, drawn in zip(result.names(), result.others, strict=True):
        pairs = list(zip(result.actual, drawn, strict=True))
        rows = []
        for actual, other in some(pairs, MOST_ROWS // 2):
            rows.append([actual.batch, _who("the run", actual.role), *_figures(actual.figures())])
            rows.append(["", _who(name, other.role), *_figures(other.figures(actual))])
        body = table(["batch", "", *REPLAY.values()], [[str(row[0]), *row[1:]] for row in rows])
        shown = f" ({len(rows) // 2} of {len(pairs)}; --csv has all)" if len(rows) < 2 * len(pairs) else ""
        parts.append(f"By batch{shown}\n{body}")
    return "\n\n".join([*parts, *result.problems])


def _who(name: str, role: str) -> str:
    return name if role == "train" else f"{name} ({role}s)"


def _figures(row: dict[str, Any]) -> list[Any]:
    return [share(row.get(k, float("nan"))) if k in SHARES else row[k] for k in REPLAY]
