"""Prompts: JSONL, Parquet or a Hugging Face dataset -> a ``PromptTable``.

    read columns -> find prompt and answer -> render by the chat template -> merge duplicates -> drop too long

Texts stay in Arrow columns; a row becomes Python objects only when ``PromptTable.row`` asks for it. Prompt ids are
content hashes (64 bit) of the messages and the gold, so that beliefs survive reordered or extended files.
Every problem with the input is a ``ConfigError`` that names the file and, where there is one, the line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cures_ray.boxes import final_answer
from cures_ray.config import Config, DataConfig, ModelConfig
from cures_ray.data.embeddings import prompt_embeddings
from cures_ray.data.features import prompt_features
from cures_ray.data.read import read_table
from cures_ray.messages import ConfigError, PromptRow

PROMPT_COLUMNS = ("prompt", "problem", "question")  # tried in this order when data.prompt_key is not there
ANSWER_COLUMNS = ("answer", "solution", "reward_model")
FEATURES = 2**28  # floats of all prompts' features together: 1 GiB
TOKENIZE_BATCH = 2048  # texts per tokenizer call


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What happened to the lines of one source; ``read = merged + dropped_too_long + kept + left_out``."""

    source: str
    read: int
    merged: int  # duplicates of an earlier prompt
    conflicting: int  # among the merged: same prompt, another answer; the first is used
    dropped_too_long: int
    left_out: int  # over data.max_eval_prompts
    kept: int

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.read} prompts read"]
        if self.merged:
            other = f", {self.conflicting} of them with another answer" if self.conflicting else ""
            parts.append(f"{self.merged} duplicates merged{other}")
        if self.dropped_too_long:
            parts.append(f"{self.dropped_too_long} longer than data.max_prompt_tokens dropped")
        if self.left_out:
            parts.append(f"{self.left_out} over data.max_eval_prompts left out")
        return ", ".join([*parts, f"{self.kept} kept"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTable:
    """The prompts of one source. N = prompts."""

    columns: pa.Table  # [N]: "text", "answer", and the remaining columns
    tokenizer: Any
    ids: np.ndarray  # uint64 [N]
    levels: np.ndarray | None  # int64 [N] when the level column holds integers, else object [N]
    token_counts: np.ndarray  # int32 [N]
    report: LoadReport
    extra: tuple[str, ...] = field(default=())  # names of the remaining columns

    def __len__(self) -> int:
        return len(self.ids)

    def prompt_id(self, index: int) -> str:
        return f"{int(self.ids[index]):016x}"

    def row(self, index: int) -> PromptRow:
        """Prompt ``index`` with its token ids. Raises IndexError when out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        values = {name: self.columns[name][index].as_py() for name in ("text", "answer", *self.extra)}
        text, answer = values.pop("text"), values.pop("answer")
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return PromptRow(
            prompt_id=self.prompt_id(index),
            text=text,
            token_ids=np.asarray(tokens, dtype=np.int32),
            answer=answer,
            row={name: value for name, value in values.items() if value is not None},
        )


def load_prompts(config: DataConfig, tokenizer: Any, which: str = "train") -> PromptTable:
    """Load ``config.train`` or ``config.eval``.

    Raises:
        ConfigError: missing, empty or malformed source, missing columns, or nothing left after dropping.
    """
    source = config.train if which == "train" else config.eval
    if not source:
        raise ConfigError(f"data.{which} is not set; write it in the configuration or pass data.{which}=...")
    table = read_table(source, f"data.{which}")
    if table.num_rows == 0:
        raise ConfigError(f"data.{which} = {source} is empty: no prompts in it")
    prompt_key = _find(table, config.prompt_key, PROMPT_COLUMNS, "prompt", source, which)
    answer_key = _find(table, config.answer_key, ANSWER_COLUMNS, "answer", source, which)
    answers = _golds(table, answer_key, source)
    texts, ids, first, conflicting = _render_and_merge(table[prompt_key], answers, tokenizer, config, source)
    counts = _token_counts(texts, tokenizer)
    fits = counts <= config.max_prompt_tokens
    keep = np.flatnonzero(fits)
    left_out = 0
    if which == "eval" and config.max_eval_prompts and len(keep) > config.max_eval_prompts:
        chosen = np.random.default_rng(config.seed).choice(len(keep), config.max_eval_prompts, replace=False)
        left_out = len(keep) - config.max_eval_prompts
        keep = keep[np.sort(chosen)]
    report = LoadReport(
        source=source,
        read=table.num_rows,
        merged=table.num_rows - len(first),
        conflicting=conflicting,
        dropped_too_long=int((~fits).sum()),
        left_out=left_out,
        kept=len(keep),
    )
    if not len(keep):
        raise ConfigError(
            f"data.{which} = {source}: all {len(first)} prompts are longer than data.max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens (the shortest has {counts.min()}); raise it"
        )
    rows = first[keep]
    extra = tuple(n for n in table.column_names if n not in (prompt_key, answer_key.split(".")[0], "text", "answer"))
    columns = pa.table({"text": pa.array([texts[i] for i in keep]), "answer": pa.array([answers[i] for i in rows])})
    for name in extra:
        columns = columns.append_column(name, table[name].take(pa.array(rows)))
    return PromptTable(
        columns=columns,
        tokenizer=tokenizer,
        ids=ids[keep],
        levels=_levels(table, config.level_key, rows),
        token_counts=counts[keep],
        report=report,
        extra=extra,
    )


def curriculum_columns(config: Config, table: PromptTable) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """What the curriculum knows of the prompts: ids [N], levels [N] or None, and features [N, d] when
    ``curriculum.prior_from`` has a predictor, else None.

    Raises:
        ConfigError: predictor_features = embedding, and the model has no embedding table that can be read.
    """
    features, c = None, config.curriculum
    if c.prior_from in ("mixture", "predictor"):
        texts = table.columns["text"].to_pylist()
        if c.predictor_features == "embedding":
            features = prompt_embeddings(texts, table.tokenizer, config.model)
        else:
            features = prompt_features(texts, table.levels, min(512, max(32, FEATURES // max(len(texts), 1))))
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


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of ``model.path``, with a pad token.

    Raises:
        ConfigError: the folder does not exist, holds no tokenizer, or the tokenizer has no end token.
    """
    from transformers import AutoTokenizer

    path = Path(config.path)
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1
    looks_local |= len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # runs/modle is a typo, not a Hub name
    if not path.exists() and looks_local:
        raise ConfigError(
            f"model.path = {config.path} does not exist (looked in {Path.cwd()}); "
            "`cures prepare` makes the model of the demo"
        )
    if path.is_dir() and not any(
        (path / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConfigError(f"model.path = {config.path} holds no tokenizer (tokenizer.json); found {found}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises many types here
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model.path = {config.path}: the tokenizer cannot be loaded: {first_line}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path = {config.path}: the tokenizer has no eos_token; generation would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _find(table: pa.Table, key: str, alternatives: tuple[str, ...], what: str, source: str, which: str) -> str:
    """The column that holds the prompt or the answer: ``key``, dotted keys included, or a usual name."""
    if key.split(".")[0] in table.column_names:
        return key
    default = DataConfig.model_fields[f"{what}_key"].default
    if key == default:
        for name in alternatives:
            if name in table.column_names:
                return name
    raise ConfigError(
        f"data.{which} = {source} has no column {key!r} for the {what}; found: {', '.join(table.column_names)}. "
        f"Set data.{what}_key to one of them"
    )


def _golds(table: pa.Table, key: str, source: str) -> list[str]:
    """One gold per row. A worked solution is cut to its final answer; a reward_model column to its ground_truth."""
    out = []
    for number, value in enumerate(table[key.split(".")[0]].to_pylist(), 1):
        for part in key.split(".")[1:] or ["ground_truth"]:
            value = value.get(part) if isinstance(value, dict) else value
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if value is None:
            raise ConfigError(f"{source}, row {number}: {key} has no answer; every prompt needs a gold")
        text = value if isinstance(value, str) else json.dumps(value)
        out.append(final_answer(text).strip())
    return out


def _render_and_merge(
    prompts: pa.ChunkedArray, answers: list[str], tokenizer: Any, config: DataConfig, source: str
) -> tuple[list[str], np.ndarray, np.ndarray, int]:
    """Distinct rendered texts [K], their ids uint64 [K], the first row of each int64 [K], conflicting golds."""
    first_of: dict[str, int] = {}
    conflicting = 0
    for row, prompt in enumerate(prompts.to_pylist()):
        text = _render(prompt, tokenizer, config, f"{source}, row {row + 1}")
        earlier = first_of.setdefault(text, row)
        conflicting += earlier != row and answers[earlier] != answers[row]
    ids = np.fromiter((_hash64(f"{t}\0{answers[r]}") for t, r in first_of.items()), np.uint64, len(first_of))
    return list(first_of), ids, np.fromiter(first_of.values(), np.int64, len(first_of)), conflicting


def _render(prompt: Any, tokenizer: Any, config: DataConfig, where: str) -> str:
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
        messages = [{"role": m.get("role") or "user", "content": m["content"]} for m in prompt]
    else:
        raise ConfigError(
            f"{where}: the prompt must be a string or a list of {{role, content}} messages, not {str(prompt)[:80]!r}"
        )
    if config.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if isinstance(prompt, str):
        return "\n\n".join(m["content"] for m in messages)
    raise ConfigError(
        f"{where}: the prompt is a chat, but the tokenizer of model.path has no chat template; "
        "use plain strings as prompts, or a model with a template"
    )


def _token_counts(texts: list[str], tokenizer: Any) -> np.ndarray:
    counts = np.empty(len(texts), np.int32)
    for start in range(0, len(texts), TOKENIZE_BATCH):
        batch = tokenizer(texts[start : start + TOKENIZE_BATCH], add_special_tokens=False)["input_ids"]
        counts[start : start + len(batch)] = [len(ids) for ids in batch]
    return counts


def _levels(table: pa.Table, key: str | None, rows: np.ndarray) -> np.ndarray | None:
    if not key or key not in table.column_names:
        return None
    values = table[key].take(pa.array(rows)).to_pylist()
    if all(isinstance(v, int) for v in values):
        return np.array(values, np.int64)
    return np.array(["" if v is None else str(v) for v in values], dtype=object)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _text_hashes(table: PromptTable) -> np.ndarray:
    return np.fromiter((_hash64(t.as_py()) for t in table.columns["text"]), np.uint64, len(table))
