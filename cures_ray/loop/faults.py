"""Faults are not wrong answers: they are counted by reason, shown with examples, and end a run when they are many.

A reward function that raises on wrong answers only leaves a batch of right ones: nothing is lost that anyone would
notice, and the training signal is gone. So the share of faults among recent verdicts has a limit.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable

WINDOW = 512  # verdicts
MIN_VERDICTS = 64  # before the share says anything
EXAMPLES = 3  # a reason, in the log
MAX_REASONS = 50


class FaultLog:
    """Counts verdicts in the order of their settlement. Deterministic and without clock or files."""

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.verdicts = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def add(self, details: Iterable[str | None]) -> list[str]:
        """Count verdicts: a fault by its detail, None for each other one. Returns what is new and worth a line in the
        log: the first examples of each reason."""
        new = []
        for detail in details:
            self.verdicts += 1
            self._recent.append(detail is not None)
            if detail is None:
                continue
            reason = fault_reason(detail)
            if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
                reason = "other"
            self.reasons[reason] += 1
            shown = self.examples.setdefault(reason, [])
            if len(shown) < EXAMPLES and detail not in shown:
                shown.append(detail)
                new.append(f"no verdict (fault {sum(self.reasons.values())}): {detail}")
        return new

    @property
    def share(self) -> float:
        """Of faults among the last ``WINDOW`` verdicts."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def problem(self) -> str | None:
        """Why the run should stop; None while the share of faults is within ``verifier.max_fault_share``."""
        if len(self._recent) < MIN_VERDICTS or self.share <= self.max_share:
            return None
        reason, count = self.reasons.most_common(1)[0]
        return (
            f"{self.share:.0%} of the last {len(self._recent)} verdicts are faults, more than verifier.max_fault_share "
            f"= {self.max_share:g}. Most frequent ({count} times): {self.examples[reason][0]}. What is left of a batch "
            "is biased; mend the reward function or the golds (a resumed run goes on from the last checkpoint), or "
            "raise verifier.max_fault_share"
        )

    def metrics(self) -> dict[str, float]:
        """``verifier/fault_share`` of recent verdicts, ``verifier/faults`` since the start."""
        return {"verifier/fault_share": self.share, "verifier/faults": float(sum(self.reasons.values()))}

    def summary(self) -> list[str]:
        """A line a reason, the most frequent first, with its first example."""
        return [f"{count} x {self.examples[reason][0]}" for reason, count in self.reasons.most_common(10)]


def fault_reason(detail: str) -> str:
    """A fault's kind, without the numbers and texts of its item, so that kinds can be counted."""
    kind = re.split(r": | \(| \.\.\.| \[|, ", detail, maxsplit=1)[0]
    raised = re.match(r"\w+ raised \w+", detail)
    return re.sub(r"\d+(?:\.\d+)?", "n", raised[0] if raised else kind)[:60]
