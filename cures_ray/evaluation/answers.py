"""Answers on disk: one line each, written as they come, so that a killed evaluation continues.

OUT/SET.answers.jsonl    {"prompt_id", "sample", "outcome", "reward", "answer", "tokens", ..., "completion"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cures_ray.evaluation.scores import JudgedAnswer
from cures_ray.messages import ConfigError, Outcome, Verdict

Key = tuple[str, int]  # prompt id, sample


class AnswerFile:
    """The answers of one model to one set.

    Args:
        identity: model, data and sampling; a file of another identity is refused.

    Raises:
        ConfigError: the file holds answers of another model, data or sampling.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.answers = path, dict[Key, JudgedAnswer]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read(identity)
        else:
            path.write_text(json.dumps({"evaluation": identity}) + "\n")

    def _read(self, identity: dict[str, Any]) -> None:
        with self.path.open("rb+") as file:
            header = _parse(file.readline())
            if header is None or header.get("evaluation") != json.loads(json.dumps(identity)):
                raise ConfigError(
                    f"{self.path} holds answers of another evaluation ({header and header.get('evaluation')}); give "
                    f"another --out, or remove the file"
                )
            end = file.tell()
            for line in file:
                record = _parse(line)
                if record is None:  # torn by a kill
                    break
                end += len(line)
                self.answers[record["prompt_id"], record["sample"]] = _answer(record)
            file.truncate(end)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those that have no answer yet, in order."""
        return [key for key in keys if key not in self.answers]

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append answers; they are on disk when this returns."""
        with self.path.open("a") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self.answers[record["prompt_id"], record["sample"]] = _answer(record)


def record_of(
    prompt_id: str, sample: int, verdict: Verdict, completion: str, tokens: int, truncated: bool, gold: str
) -> dict[str, Any]:
    """The line of one answer."""
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "outcome": verdict.outcome.value,
        "reward": 0.0 if verdict.is_fault else round(verdict.reward, 6),
        "answer": verdict.detail,
        "tokens": tokens,
        "truncated": truncated,
        "gold": gold,
        "completion": completion,
    }


def _answer(record: dict[str, Any]) -> JudgedAnswer:
    return JudgedAnswer(
        reward=record["reward"],
        correct=record["outcome"] == Outcome.CORRECT.value,
        fault=record["outcome"] == Outcome.FAULT.value,
        text=record["answer"],
        tokens=record["tokens"],
        truncated=record["truncated"],
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
