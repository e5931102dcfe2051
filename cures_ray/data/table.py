"""Prompts: files, data sets and generated tasks -> a ``PromptTable``.

    read rows -> filter -> gold -> render by the chat template -> merge duplicates -> decontaminate -> drop too long

All of it batch by batch; texts and rows lie in a memory-mapped file (``store.py``), so a set may be larger than memory.
A row becomes Python objects only when ``PromptTable.row`` asks for it. Prompt ids are content hashes (64 bit) of the
rendered prompt and the gold, so that beliefs survive reordered or extended files; a generated prompt's id is the hash
of how it is generated. Every problem with the input is a ``ConfigError`` that names the file and, where there is one,
the line.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cures_ray.config import Config, DataConfig
from cures_ray.data.embeddings import prompt_embeddings, prompt_hidden
from cures_ray.data.features import prompt_features
from cures_ray.data.golds import gold_of, has_box
from cures_ray.data.presets import EVAL_SETS, Preset, eval_settings, preset_of
from cures_ray.data.read import Row, read_rows
from cures_ray.data.reasoning_gym import SOURCE, generated_rows, identity, tags_of
from cures_ray.data.render import Renderer
from cures_ray.data.select import Decontaminator, Filter, column
from cures_ray.data.store import Store, Texts
from cures_ray.data.tokenizer import load_tokenizer
from cures_ray.messages import ConfigError, PromptRow

__all__ = ["LoadReport", "PromptTable", "check_disjoint", "curriculum_columns", "load_prompts", "load_tokenizer"]

PROMPT_COLUMNS = ("prompt", "problem", "question")  # tried in this order when data.prompt_key is not there
ANSWER_COLUMNS = ("answer", "solution", "reward_model")
FEATURES = 2**28  # floats of all prompts' features together: 1 GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What happened to the rows of one source:
    ``read = filtered + no_gold + merged + contaminated + dropped_too_long + left_out + kept``."""

    source: str
    read: int
    filtered: int = 0  # by data.filter
    no_gold: int = 0  # the preset's rows without an answer that can be checked
    merged: int  # duplicates of an earlier prompt
    conflicting: int  # among the merged: same prompt, another answer; the first is used
    contaminated: tuple[tuple[str, str], ...] = ()  # (evaluation set, the prompt's first words), each dropped
    dropped_too_long: int
    left_out: int  # over data.max_train_prompts or data.max_eval_prompts
    limit: str = ""  # which of the two
    kept: int

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.read} prompts read"]
        if self.filtered:
            parts.append(f"{self.filtered} left out by data.filter")
        if self.no_gold:
            parts.append(f"{self.no_gold} without an answer that can be checked dropped")
        if self.merged:
            other = f", {self.conflicting} of them with another answer" if self.conflicting else ""
            parts.append(f"{self.merged} duplicates merged{other}")
        if self.contaminated:
            sets = Counter(name for name, _ in self.contaminated)
            which = ", ".join(f"{count} {name}" for name, count in sets.items())
            example = self.contaminated[0][1]
            parts.append(f"{len(self.contaminated)} that overlap with evaluation sets dropped ({which}; {example!r})")
        if self.dropped_too_long:
            parts.append(f"{self.dropped_too_long} longer than data.max_prompt_tokens dropped")
        if self.left_out:
            parts.append(f"{self.left_out} over {self.limit} left out")
        return ", ".join([*parts, f"{self.kept} kept"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTable:
    """The prompts of one source. N = prompts."""

    columns: pa.Table  # [N]: "text", "answer", "row" (the other columns, as JSON), "tags" (words for features)
    tokenizer: Any
    ids: np.ndarray  # uint64 [N]
    levels: np.ndarray | None  # int64 [N] when the level column holds integers, else object [N]
    token_counts: np.ndarray  # int32 [N]
    report: LoadReport

    def __len__(self) -> int:
        return len(self.ids)

    def prompt_id(self, index: int) -> str:
        return f"{int(self.ids[index]):016x}"

    def row(self, index: int) -> PromptRow:
        """Prompt ``index`` with its token ids. Raises IndexError when out of range."""
        return self.rows(np.array([index]))[0]

    def rows(self, index: np.ndarray, *, tokenize: bool = True) -> list[PromptRow]:
        """Prompts ``index`` [k]; without ``tokenize`` their token ids are empty.

        Raises:
            IndexError: out of range.
        """
        places = np.asarray(index).tolist()
        if places and not (min(places) >= 0 and max(places) < len(self)):
            raise IndexError(f"prompts {min(places)} to {max(places)} of {len(self)}")
        columns = [self.columns[name] for name in ("text", "answer", "row")]
        texts, answers, rows = ([column[i].as_py() for i in places] for column in columns)
        tokens = (
            self.tokenizer(texts, add_special_tokens=False)["input_ids"] if tokenize and texts else [()] * len(texts)
        )
        return [
            PromptRow(
                prompt_id=self.prompt_id(i),
                text=text,
                token_ids=np.asarray(ids, dtype=np.int32),
                answer=answer,
                row=json.loads(row),
            )
            for i, text, ids, answer, row in zip(places, texts, tokens, answers, rows, strict=True)
        ]

    def best_constant(self) -> dict[str, float]:
        """Accuracy of the best answer that ignores the prompt: the share of the most frequent gold, as
        ``best_constant_accuracy`` over all prompts and ``best_constant_accuracy/level_X`` within each level."""
        answers = np.array(self.columns["answer"].to_pylist(), dtype=object)
        share = {"best_constant_accuracy": _largest_share(answers)}
        if self.levels is not None:
            for level in dict.fromkeys(self.levels.tolist()):
                share[f"best_constant_accuracy/level_{level}"] = _largest_share(answers[self.levels == level])
        return share


def _largest_share(answers: np.ndarray) -> float:
    return max(Counter(answers.tolist()).values()) / len(answers) if len(answers) else 0.0


def load_prompts(config: DataConfig, tokenizer: Any, which: str = "train") -> PromptTable:
    """Load ``config.train`` or ``config.eval``.

    Raises:
        ConfigError: missing, empty or malformed source, missing columns, or nothing left after dropping.
    """
    source = config.train if which == "train" else config.eval
    if not source:
        raise ConfigError(f"data.{which} is not set; write it in the configuration or pass data.{which}=...")
    loading = _Loading(config, tokenizer, which, source)
    batches = generated_rows(config, which) if source == SOURCE else read_rows(source, f"data.{which}")
    try:
        for batch in batches:
            loading.add(batch)
    except BaseException:
        loading.store.discard()
        raise
    return loading.table()


class _Loading:
    """What has been seen of a source so far. ``add`` batches, then ask for the ``table``."""

    def __init__(self, config: DataConfig, tokenizer: Any, which: str, source: str) -> None:
        self._config, self._tokenizer, self._which, self._source = config, tokenizer, which, source
        self._preset = preset_of(config, which)
        self._render = Renderer(config, tokenizer)
        self._wanted = Filter(config.filter if which == "train" else {})
        self._decontaminator = _decontaminator(config, tokenizer) if which == "train" else None
        self._keys: tuple[str, str] | None = None  # prompt and answer column
        self._first: dict[int, int] = {}  # hash of the rendered text -> hash of its gold
        self._count: Counter[str] = Counter()
        self._contaminated: list[tuple[str, str]] = []
        self._shortest = 0
        self._ids: list[int] = []
        self._levels: list[Any] = []
        self._token_counts: list[int] = []
        self.store = Store()

    def add(self, batch: list[Row]) -> None:
        if self._keys is None:
            names = tuple(dict.fromkeys(name for row in batch for name in row))
            preset = self._preset
            self._keys = (
                self._find(names, self._config.prompt_key, preset.prompt if preset else (), "prompt"),
                self._find(names, self._config.answer_key, preset.answer if preset else (), "answer"),
            )
        found = [item for row in batch if (item := self._prompt(row)) is not None]
        if not found:
            return
        lengths = [len(ids) for ids in self._tokenizer([t for t, _, _ in found], add_special_tokens=False)["input_ids"]]
        shortest = min(lengths)
        self._shortest = min(self._shortest, shortest) if self._shortest else shortest
        kept = [i for i, length in enumerate(lengths) if length <= self._config.max_prompt_tokens]
        self._count["dropped_too_long"] += len(found) - len(kept)
        self._keep([found[i] for i in kept], [lengths[i] for i in kept])

    def _prompt(self, row: Row) -> tuple[str, str, Row] | None:
        """(rendered text, gold, row), or None for what is left out and counted."""
        assert self._keys is not None
        self._count["read"] += 1
        where = f"{self._source}, row {self._count['read']}"
        prompt_key, answer_key = self._keys
        if not self._wanted(row):
            self._count["filtered"] += 1
            return None
        value = column(row, answer_key)
        gold = gold_of(value)
        if self._preset is not None and _no_gold(self._preset, answer_key, value, gold):
            self._count["no_gold"] += 1
            return None
        if gold is None:
            raise ConfigError(f"{where}: {answer_key} has no answer; every prompt needs a gold")
        prompt = column(row, prompt_key)
        text = self._render(prompt, where)
        key, answer = _hash64(text), _hash64(gold)
        if key in self._first:
            self._count["merged"] += 1
            self._count["conflicting"] += self._first[key] != answer
            return None
        self._first[key] = answer
        if self._decontaminator is not None and (name := self._decontaminator.source(plain_text(prompt))):
            self._contaminated.append((name, plain_text(prompt)[:80]))
            return None
        return text, gold, row

    def _keep(self, prompts: list[tuple[str, str, Row]], lengths: list[int]) -> None:
        assert self._keys is not None
        used = {self._keys[0], self._keys[1].split(".")[0], "text", "answer"}
        texts, golds, rows = [p[0] for p in prompts], [p[1] for p in prompts], [p[2] for p in prompts]
        level_key = self._level_key()
        for text, gold, row in prompts:
            self._ids.append(_hash64(identity(row) if self._source == SOURCE else f"{text}\0{gold}"))
            self._levels.append(column(row, level_key) if level_key else None)
        self._token_counts += lengths
        others = [{k: v for k, v in row.items() if k not in used and v is not None} for row in rows]
        self.store.append(texts, golds, others, [tags_of(row) for row in rows])

    def _level_key(self) -> str | None:
        key = self._config.level_key
        if self._preset is not None and self._preset.level and key == DataConfig.model_fields["level_key"].default:
            return self._preset.level
        return key

    def _find(self, names: tuple[str, ...], key: str, preset: tuple[str, ...], what: str) -> str:
        """The column of the prompt or the answer: ``key``, dotted keys included, the preset's, or a usual name."""
        wanted: tuple[str, ...] = (key,)
        if key == DataConfig.model_fields[f"{what}_key"].default:
            wanted = (*preset, key, *(PROMPT_COLUMNS if what == "prompt" else ANSWER_COLUMNS))
        for name in wanted:
            if name.split(".")[0] in names:
                return name
        raise ConfigError(
            f"data.{self._which} = {self._source} has no column {key!r} for the {what}; found: {', '.join(names)}. "
            f"Set data.{what}_key to one of them"
        )

    def table(self) -> PromptTable:
        """Raises ConfigError: nothing was read, or nothing is left."""
        columns, count = self.store.finish(), self._count
        name = f"data.{self._which} = {self._source}"
        if not count["read"]:
            raise ConfigError(f"{name} is empty: no prompts in it")
        ids, lengths = np.array(self._ids, np.uint64), np.array(self._token_counts, np.int32)
        levels = _level_array(self._levels)
        limit = self._config.max_train_prompts if self._which == "train" else self._config.max_eval_prompts
        left_out = max(0, len(ids) - limit) if limit else 0
        if left_out:
            rng = np.random.default_rng(self._config.seed)
            chosen = np.sort(rng.choice(len(ids), limit, replace=False))
            columns, ids, lengths = columns.take(pa.array(chosen)), ids[chosen], lengths[chosen]
            levels = levels[chosen] if levels is not None else None
        report = LoadReport(
            source=self._source,
            read=count["read"],
            filtered=count["filtered"],
            no_gold=count["no_gold"],
            merged=count["merged"],
            conflicting=count["conflicting"],
            contaminated=tuple(self._contaminated),
            dropped_too_long=count["dropped_too_long"],
            left_out=left_out,
            limit=f"data.max_{self._which}_prompts",
            kept=len(ids),
        )
        if not len(ids) and count["dropped_too_long"] and not self._contaminated:
            raise ConfigError(
                f"{name}: all {count['dropped_too_long']} prompts are longer than data.max_prompt_tokens = "
                f"{self._config.max_prompt_tokens} tokens (the shortest has {self._shortest}); raise it"
            )
        if not len(ids):
            raise ConfigError(f"{name}: no prompt is left ({report}); check data.filter, data.preset and the columns")
        return PromptTable(
            columns=columns, tokenizer=self._tokenizer, ids=ids, levels=levels, token_counts=lengths, report=report
        )


def _no_gold(preset: Preset, key: str, value: Any, gold: str | None) -> bool:
    """Whether a public data set's row has no answer that can be checked. A solution counts by its box."""
    boxless = key == "solution" or preset.needs_box
    return gold is None or gold in preset.without or (boxless and key != "answer" and not has_box(value))


def plain_text(prompt: Any) -> str:
    """A prompt's own words, without the template: a string, or the contents of a chat."""
    if isinstance(prompt, list):
        return "\n".join(str(m.get("content", "")) for m in prompt if isinstance(m, dict) and m.get("role") != "system")
    return str(prompt)


def _decontaminator(config: DataConfig, tokenizer: Any) -> Decontaminator | None:
    """Of ``data.decontaminate_against``: names of evaluation sets, or sources as in data.eval.

    Raises:
        ConfigError: a set that cannot be read.
    """
    if not config.decontaminate_against:
        return None
    found = Decontaminator(config.decontaminate_ngram)
    for name in config.decontaminate_against:
        settings = eval_settings(name) if name in EVAL_SETS else {"eval": name, "eval_preset": None, "preset": None}
        found.add(name, _questions(config.model_copy(update=settings)))
    return found


def _questions(config: DataConfig) -> Iterator[str]:
    """The plain texts of an evaluation set's prompts."""
    preset = preset_of(config, "eval")
    columns = (*(preset.prompt if preset else ()), config.prompt_key, *PROMPT_COLUMNS)
    for batch in read_rows(str(config.eval), "data.decontaminate_against"):
        for row in batch:
            prompt = next((value for name in columns if (value := column(row, name)) is not None), None)
            if prompt is None:
                raise ConfigError(
                    f"data.decontaminate_against: {config.eval} has no prompt column; found: {', '.join(row)}"
                )
            yield plain_text(prompt)


def _level_array(values: list[Any]) -> np.ndarray | None:
    """Levels [N]: int64 where all are integers (also as text), else object; None where there are none."""
    if all(value is None for value in values):
        return None
    if all(isinstance(v, int) or (isinstance(v, str) and v.isdecimal()) for v in values):
        return np.array([int(v) for v in values], np.int64)
    return np.array(["" if v is None else str(v) for v in values], dtype=object)


def curriculum_columns(config: Config, table: PromptTable) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """What the curriculum knows of the prompts: ids [N], levels [N] or None, and features [N, d] when
    ``curriculum.prior_from`` has a predictor, else None.

    Raises:
        ConfigError: predictor_features = embedding, and the model has no embedding table that can be read.
    """
    features, c = None, config.curriculum
    if c.prior_from in ("mixture", "predictor"):
        texts = Texts(table.columns["text"])
        if c.predictor_features == "embedding":
            features = prompt_embeddings(texts, table.tokenizer, config.model)
        elif c.predictor_features == "hidden":
            features = prompt_hidden(texts, table.tokenizer, config.model)
        else:
            dimensions = min(512, max(32, FEATURES // max(len(texts), 1)))
            features = prompt_features(texts, table.levels, dimensions, Texts(table.columns["tags"]))
    return table.ids, table.levels, features


def check_disjoint(train: PromptTable, evaluation: PromptTable) -> None:
    """Raise ConfigError when a held-out prompt is also a training prompt (compared as rendered text)."""
    shared = np.intersect1d(_text_hashes(train), _text_hashes(evaluation), return_indices=True)[2]
    if len(shared):
        text = evaluation.columns["text"][int(shared[0])].as_py()
        raise ConfigError(
            f"{len(shared)} of {len(evaluation)} prompts of {evaluation.report.source} (data.eval) are also in "
            f"{train.report.source} (data.train), for example {text[:80]!r}: held-out accuracy would mean nothing; "
            "remove them from one of the two"
        )


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _text_hashes(table: PromptTable) -> np.ndarray:
    return np.fromiter((_hash64(t) for t in Texts(table.columns["text"])), np.uint64, len(table))
