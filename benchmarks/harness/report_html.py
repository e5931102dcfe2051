"""One HTML file with tables and pictures inside, and the pictures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from benchmarks.harness import plots
from benchmarks.harness.analysis import ArmFigures, Record, by_arm
from benchmarks.harness.cell import COST_AXES
from benchmarks.harness.report import accuracy_table, cost_map, explanation_table, speedup_table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:3px 8px;text-align:left;white-space:nowrap}th{background:#f3f3f3}"
    "img{max-width:100%}code{background:#f3f3f3;padding:1px 4px}"
)
MOST_CURRICULA = 6  # arms whose beliefs and allocation are drawn


def write_html(
    folder: Path, figures: list[ArmFigures], records: list[Record], baseline: str, title: str, command: str
) -> None:
    """``report.html`` and ``plots/*.png`` in ``folder``."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    labels = [f.label for f in figures if f.seeds]
    body = [f"<h1>{html.escape(title)}</h1><p><code>{html.escape(command)}</code></p>"]
    body += ["<h2>Accuracy</h2>", _table(accuracy_table(figures))]
    for axis, heading in COST_AXES.items():
        body.append(f"<h2>By {html.escape(heading)}</h2>")
        body.append(_image(folder, f"accuracy_{axis}", plots.accuracy_curves(records, labels, axis)))
        body.append(_image(folder, f"speedup_{axis}", plots.speedup_bars(figures, axis)))
        body.append(_table(speedup_table(figures, axis)))
    for kind in ("trained", "computed"):
        heading, _, rows = cost_map(figures, kind, baseline).partition("\n")
        body += [f"<h2>{html.escape(heading.lstrip('# '))}</h2>", _table(rows)]
        body.append(_image(folder, f"cost_{kind}", plots.cost_map_lines(figures, kind)))
    body += ["<h2>What the batches were made of</h2>", _table(explanation_table(figures))]
    arms = by_arm(records)
    for label in [x for x in labels if arms[x][min(arms[x])]["plans"]][-MOST_CURRICULA:]:
        record = arms[label][min(arms[label])]
        body.append(_image(folder, f"curriculum_{len(body)}", plots.curriculum_pictures(record)))
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    (folder / "report.html").write_text(page + "\n".join(body) + "\n")


def _table(markdown: str) -> str:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f"<table><tr>{head}</tr>{body}</table>"


def _image(folder: Path, name: str, png: bytes) -> str:
    (folder / "plots" / f"{name}.png").write_bytes(png)
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
