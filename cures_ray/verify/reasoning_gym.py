"""Verdicts of the package ``reasoning-gym``: each task's own scorer on the entry that the prompt was made from.

The answer in a completion is the first of these that there is:

1. the content of the last ``\\boxed{}``;
2. what stands in the last ``<answer>`` tags;
3. Yes, No, True or False, where the completion begins with one of them: ``No, 1900 is not a leap year.`` is ``No``;
4. what the last statement of an answer says, up to the end of its sentence: ``The answer to the problem is 7.`` and
   ``3 + 4 = 7`` are ``7``;
5. the whole completion, without white space around it and a full stop behind it.

One of them is taken, so that a completion that names several answers gains nothing. After 3 or 4 the whole completion
(5) is scored as well: an answer may be an equation or begin with such a word itself.

Reward: 1 where the scorer gives at least 0.99, else 0; with ``data.reasoning_gym.partial_credit`` the score itself.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from functools import lru_cache
from typing import Any

from cures_ray.boxes import last_box
from cures_ray.messages import Outcome, Verdict
from cures_ray.verify.mathematics import fault, printable

ANSWER_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FIRST_WORD = re.compile(r"(yes|no|true|false)(?![\w-])", re.IGNORECASE)
STATED = re.compile(r"(?:\banswer\b[^.\n]{0,80}?(?:\bis\b|:)|=)[ \t]*(?=[^\s=])", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
RIGHT = 0.99
KEPT_ENTRIES = 2048
SIZE = 10_000  # as in cures_ray/data/reasoning_gym.py; a test holds the two together


def answers_in(completion: str) -> list[str]:
    """What is scored of ``completion``, in this order: one or two texts."""
    boxed = last_box(completion)
    if boxed is not None:
        return [boxed.strip()]
    if tagged := ANSWER_TAGS.findall(completion):
        return [_bare(tagged[-1])]
    whole = _bare(completion)
    if first := FIRST_WORD.match(whole):
        return list(dict.fromkeys([first[1], whole]))
    if stated := list(STATED.finditer(whole)):
        rest = whole[stated[-1].end() :].partition("\n")[0]
        return list(dict.fromkeys([_bare(SENTENCE_END.split(rest)[0]), whole]))
    return [whole]


def _bare(text: str) -> str:
    """Without white space around it, a full stop behind it, and the marks of bold text."""
    text = text.strip().strip("*").strip()
    return text[:-1].rstrip() if text.endswith(".") else text


class ReasoningGymJudge:
    """Callable with a request's item (``child.py``): ``{"completion", "answer", "row"}`` -> Verdict.

    A scorer that raises on an answer while it accepts the gold has met a malformed answer: that is a wrong answer. An
    entry that cannot be made again, or whose gold is another, is a fault.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, int, int], dict[str, Any]] = OrderedDict()

    def __call__(self, item: dict[str, Any]) -> Verdict:
        made = item["row"].get("reasoning_gym")
        if not isinstance(made, dict):
            return fault("the row was not made by data.train: reasoning-gym (it has no column reasoning_gym)")
        dataset = _dataset(made["task"], _frozen(made["params"]), made["seed"])
        entry = self._entry(dataset, made)
        gold = "" if entry["answer"] is None else str(entry["answer"])
        if gold != item["answer"]:
            return fault(f"this version of reasoning-gym makes another entry: its answer is {printable(gold, 60)!r}")
        answers = answers_in(item["completion"])
        score = 0.0
        for answer in answers:
            try:
                score = max(score, min(1.0, float(dataset.score_answer(answer, entry))))
            except Exception as error:  # a task's scorer may raise anything on an odd answer
                if gold and not _accepts_gold(dataset, entry):
                    return fault(f"the scorer of {made['task']} raised {type(error).__name__}: {error}")
            if score >= RIGHT:
                break
        if not made.get("partial_credit"):
            score = float(score >= RIGHT)
        outcome = Outcome.CORRECT if score > 0.5 else Outcome.INCORRECT
        return Verdict(outcome=outcome, reward=score, detail=printable(answers[0]))

    def _entry(self, dataset: Any, made: dict[str, Any]) -> dict[str, Any]:
        key = (f"{made['task']} {_frozen(made['params'])}", made["seed"], made["index"])
        if key not in self._entries:
            self._entries[key] = dataset[made["index"]]
            if len(self._entries) > KEPT_ENTRIES:
                self._entries.popitem(last=False)
        return self._entries[key]


def _accepts_gold(dataset: Any, entry: dict[str, Any]) -> bool:
    try:
        return float(dataset.score_answer(str(entry["answer"]), entry)) >= RIGHT
    except Exception:
        return False


@lru_cache(maxsize=64)
def _dataset(name: str, params: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=SIZE, **json.loads(params))


def _frozen(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
