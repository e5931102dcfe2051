"""Tables of `cures ledger`: pandas frames on the terminal (rich), as CSV, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

T = TypeVar("T")
LEVELS = " ▁▂▃▄▅▆▇█"
MOST_ROWS = 24  # of a table by step; --csv has all
WIDE = 240  # columns where the output is no terminal


def show(*parts: str | Table) -> None:
    """Print texts and tables, a blank line between them."""
    width = None if sys.stdout.isatty() else WIDE
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    for number, part in enumerate(parts):
        console.print(*([] if number == 0 else [""]), part, sep="\n", soft_wrap=isinstance(part, str))


def table(title: str, rows: pd.DataFrame, names: dict[str, str], shares: Sequence[str] = ()) -> Table:
    """``names``: column of ``rows`` -> heading; columns that are missing or empty throughout are left out."""
    names = {k: v for k, v in names.items() if k in rows and not (rows[k].isna() | (rows[k].astype(str) == "")).all()}
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.min_width = len(title)
    for key, heading in names.items():
        text = rows[key].map(lambda value: isinstance(value, str)).any()
        made.add_column(heading, justify="left" if text else "right", no_wrap=True, overflow="ellipsis")
    for row in rows.to_dict("records"):
        made.add_row(*(share(row[key]) if key in shares else cell(row[key]) for key in names))
    return made


def cell(value: Any) -> str:
    """A text of a value: 3 significant digits below 100, "-" where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def share(value: float) -> str:
    return f"{100 * value:.0f}%" if np.isfinite(value) else "-"


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


def some(rows: Sequence[T], most: int = MOST_ROWS) -> list[T]:
    """At most ``most`` rows, evenly spread, the first and the last among them."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]


def write_csv(path: Path, rows: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Frames as lists of records; numbers that are none as null."""
    plain = {k: json.loads(v.to_json(orient="records")) if isinstance(v, pd.DataFrame) else v for k, v in value.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")
