"""Where a run's numbers go: one progress view on the terminal, JSONL, TensorBoard, trackers (trackers.py), Ray."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cures_ray.config import Config
from cures_ray.run.trackers import WeightsAndBiases, trackers

Metrics = dict[str, float]

# (heading, metric, format): the columns of the progress view
COLUMNS = [
    ("step", "step", "{:.0f}"),
    ("held-out", "eval/greedy_accuracy", "{:.3f}"),
    ("reward", "rollout/reward", "{:.3f}"),
    ("stale", "staleness/mean", "{:.2f}"),
    ("tok/s", "rollout/tokens_per_s", "{:.0f}"),
    ("idle L", "time/learner_idle_s", "{:.1f}s"),
    ("idle G", "time/generator_idle_s", "{:.1f}s"),
    ("tau", "curriculum/tau", "{:.3g}"),
    ("ESS", "curriculum/ess_fraction", "{:.2f}"),
    ("in flight", "accounting/in_flight", "{:.0f}"),
    ("trained", "accounting/trained", "{:.0f}"),
    ("discarded", "accounting/discarded", "{:.0f}"),
]


NOTHING_TO_LEARN = {  # mean reward of a batch -> what its rollouts were, and where to look
    0.0: (
        "wrong",
        "Read RUN/samples.jsonl: does the model answer in the form that verifier.fn expects, within "
        "rollout.max_new_tokens? Else the prompts are too hard for it.",
    ),
    1.0: ("right", "The prompts are solved, or verifier.fn accepts anything: read RUN/samples.jsonl."),
}
SILENT_STEPS = 5  # batches in a row without one right, or one wrong, rollout before it is said


class Sink(Protocol):
    """One place that a run's numbers go to."""

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The driver's Observer: tells every sink. Files are appended to, so that a resumed run continues its curves: from
    ``start``, the step of its checkpoint, on (run/folder.py has moved later lines away). ``sinks``: further ones."""

    def __init__(
        self, config: Config, run_dir: Path, out: TextIO | None = None, *, start: int = 0, sinks: Iterable[Sink] = ()
    ) -> None:
        chosen = config.logging
        self.sinks: list[Sink] = [ProgressView(chosen.progress, config.trainer.steps, out or sys.stdout)]
        if chosen.jsonl:
            self.sinks.append(JsonLines(run_dir / "metrics.jsonl"))
        if chosen.tensorboard:
            self.sinks.append(TensorBoard(run_dir / "tensorboard", start))
        self.sinks += [*trackers(config, run_dir), *sinks]
        self._silent = {0.0: 0, 1.0: 0}  # batch reward -> batches in a row with it

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        for sink in self.sinks:
            sink.step(step, metrics, histograms)
        self._warn(step, metrics.get("rollout/reward"))

    def _warn(self, step: int, reward: float | None) -> None:
        """Say it once when batches hold nothing to learn from."""
        if reward is None:
            return
        for value, (what, advice) in NOTHING_TO_LEARN.items():
            self._silent[value] = self._silent[value] + 1 if reward == value else 0
            if self._silent[value] == SILENT_STEPS:
                self.note(f"step {step}: every rollout of the last {SILENT_STEPS} batches was {what}. {advice}")

    def rewind(self, step: int) -> None:
        """Steps after ``step`` are made again."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                sink.rewind(step)

    def note(self, text: str) -> None:
        for sink in self.sinks:
            sink.note(text)

    @property
    def has_tables(self) -> bool:
        """Whether a sink takes ``rollouts``."""
        return any(isinstance(sink, WeightsAndBiases) for sink in self.sinks)

    def rollouts(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Some trained rollouts of ``step`` as a table, for sinks that have tables."""
        for sink in self.sinks:
            if isinstance(sink, WeightsAndBiases):
                sink.rollouts(step, rows)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonLines:
    """metrics.jsonl: a line a step and evaluation, and the notes."""

    def __init__(self, path: Path) -> None:
        self.path, self._written = path, _measured(path)
        self._file = path.open("a")

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        key = (step, "rollout/reward" in metrics)
        if key not in self._written:
            self._written.add(key)
            self._line({"step": step, "time": time.time(), **_plain(metrics)})

    def note(self, text: str) -> None:
        self._line({"time": time.time(), "note": text})

    def close(self) -> None:
        self._file.close()

    def rewind(self, step: int) -> None:
        """Lines of later steps go to metrics-lost.jsonl, so that no step is there twice."""
        self._file.close()
        self._written = {key for key in self._written if key[0] <= step}
        kept: list[str] = []
        lost: list[str] = []
        for line in self.path.read_text().splitlines(keepends=True):
            (lost if json.loads(line).get("step", 0) > step else kept).append(line)
        with self.path.with_name("metrics-lost.jsonl").open("a") as file:
            file.writelines(lost)
        self.path.write_text("".join(kept))
        self._file = self.path.open("a")

    def _line(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class TensorBoard:
    """Curves, histograms and the picture of rollouts against accuracy."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name, values in histograms.items():
            if len(values):
                self._writer.add_histogram(name, values, step)
        _accuracy_picture(self._writer, histograms, step)
        self._writer.flush()

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        self._writer.close()


class ProgressView:
    """One view: a live table on a terminal, aligned lines in a file."""

    def __init__(self, mode: str, total: int, out: TextIO) -> None:
        self.mode = ("live" if out.isatty() else "lines") if mode == "auto" else mode
        self.total, self.out, self.lines = total, out, 0
        self.latest: Metrics = {}
        self._recent: list[list[str]] = []
        self._live: Live | None = None
        if self.mode == "live":
            self._live = Live(console=Console(file=out), refresh_per_second=4)
            self._live.start()

    def step(self, step: int, metrics: Metrics, histograms: dict[str, np.ndarray]) -> None:
        self.latest = {**self.latest, **metrics, "step": float(step)}
        if "rollout/reward" not in metrics and "eval/greedy_accuracy" in metrics:
            return self.note(f"version {step}: held-out accuracy {metrics['eval/greedy_accuracy']:.3f}")
        cells = [fmt.format(self.latest[key]) if key in self.latest else "-" for _, key, fmt in COLUMNS]
        cells[0] += f"/{self.total}"
        if self._live:
            self._recent = [*self._recent, cells][-12:]
            self._live.update(self._table())
        elif self.mode == "lines":
            if self.lines % 20 == 0:
                self._print("  ".join(f"{heading:>9}" for heading, _, _ in COLUMNS))
            self.lines += 1
            self._print("  ".join(f"{cell:>9}" for cell in cells))

    def note(self, text: str) -> None:
        if self._live:
            self._live.console.print(text)
        elif self.mode == "lines":
            self._print(text)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _print(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def _table(self) -> Table:
        table = Table(*[heading for heading, _, _ in COLUMNS], box=None, pad_edge=False)
        for cells in self._recent:
            table.add_row(*cells)
        return table


def _plain(metrics: Metrics) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items()}


def _measured(path: Path) -> set[tuple[int, bool]]:
    """(step, of training) of the lines already in ``path``: a resumed run evaluates its first version again."""
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(record["step"], "rollout/reward" in record) for record in records if "step" in record}


def _accuracy_picture(writer: Any, histograms: dict[str, np.ndarray], step: int) -> None:
    """Rollouts against accuracy (the paper's Fig. 4) as one small picture."""
    n, p = histograms.get("n_by_lease"), histograms.get("p_by_lease")
    if n is None or p is None or not len(n):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(p, n, s=10, alpha=0.5)
    axes.set(xlabel="believed accuracy", ylabel="rollouts", xlim=(0, 1))
    writer.add_figure("curriculum/rollouts_against_accuracy", figure, step)
