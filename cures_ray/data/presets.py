"""Public data sets by name: where they are on the Hub, which columns hold what, and how their golds are written.

    data.preset: gsm8k | math | numina_math | numina_math_1_5 | dapo_math       (training sets, ``DATA_PRESETS``)
    cures eval --sets math500,gsm8k,gaokao2023en,minerva,...                    (evaluation sets, ``EVAL_SETS``)

A preset fills only what the configuration leaves at its default. A local file with the Hub's columns serves as well:
``data.train`` names it, and ``local_or_hub`` takes DIR/NAME.jsonl (or .parquet, .csv) before the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cures_ray.config import DataConfig
from cures_ray.messages import ConfigError

LOCAL_SUFFIXES = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One data set. Column names are tried in order; dots reach into objects (``reward_model.ground_truth``).

    Golds: a text with a box is cut to its last box, one with a line ``#### 42`` to what follows (``data/golds.py``).
    """

    source: str  # on the Hub: name, name:split, or name@subset:split
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    level: str | None = None
    needs_box: bool = False  # the answers are worked solutions; those without a box (proofs) are dropped
    without: tuple[str, ...] = ()  # answers that stand for none; their rows are dropped
    samples: int = 1  # evaluation sets: 1 = pass@1 (greedy), 16 = mean of 16 draws, as small sets need it
    prompts: int | None = None  # evaluation sets: the size of the published set


DATA_PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(source="openai/gsm8k@main:train", prompt=("question",), answer=("answer",)),
    "math": Preset(
        source="DigitalLearningGmbH/MATH-lighteval:train",
        prompt=("problem",),
        answer=("answer", "solution"),
        level="level",  # "Level 1" to "Level 5"
        needs_box=True,
    ),
    "numina_math": Preset(
        source="AI-MO/NuminaMath-CoT:train", prompt=("problem",), answer=("solution",), level="source", needs_box=True
    ),
    "numina_math_1_5": Preset(
        source="AI-MO/NuminaMath-1.5:train",
        prompt=("problem",),
        answer=("answer", "solution"),
        level="source",
        without=("proof", "notfound", ""),
    ),
    "dapo_math": Preset(
        source="BytedTsinghua-SIA/DAPO-Math-17k:train", prompt=("prompt",), answer=("reward_model.ground_truth",)
    ),
}

EVAL_SETS: dict[str, Preset] = {
    "math500": Preset(
        source="HuggingFaceH4/MATH-500:test", prompt=("problem",), answer=("answer",), level="level", prompts=500
    ),
    "gsm8k": Preset(source="openai/gsm8k@main:test", prompt=("question",), answer=("answer",), prompts=1319),
    "gaokao2023en": Preset(
        source="MARIO-Math-Reasoning/Gaokao2023-Math-En:train",  # its only split
        prompt=("question",),
        answer=("answer",),
        prompts=385,
    ),
    "minerva": Preset(
        source="math-ai/minervamath:test", prompt=("question", "problem"), answer=("answer", "solution"), prompts=272
    ),
    "olympiadbench": Preset(
        source="math-ai/olympiadbench:test",  # text only, English, open answers
        prompt=("question", "problem"),
        answer=("final_answer", "answer"),
        prompts=674,
    ),
    "aime24": Preset(
        source="HuggingFaceH4/aime_2024:train", prompt=("problem",), answer=("answer",), samples=16, prompts=30
    ),
    "aime25": Preset(source="math-ai/aime25:test", prompt=("problem",), answer=("answer",), samples=16, prompts=30),
    "amc23": Preset(
        source="math-ai/amc23:test", prompt=("question", "problem"), answer=("answer",), samples=16, prompts=40
    ),
}


def data_preset(name: str) -> Preset:
    """Raises ConfigError: no such preset of a training set."""
    if name not in DATA_PRESETS:
        raise ConfigError(f"data.preset = {name!r} is not known; there are {', '.join(DATA_PRESETS)}")
    return DATA_PRESETS[name]


def eval_set(name: str) -> Preset:
    """Raises ConfigError: no such evaluation set."""
    if name not in EVAL_SETS:
        raise ConfigError(f"there is no evaluation set {name!r}; there are {', '.join(EVAL_SETS)}, or name a file")
    return EVAL_SETS[name]


def preset_of(config: DataConfig, which: str) -> Preset | None:
    """The preset of ``data.train`` or ``data.eval`` (its own, else that of the training data), or None.

    Raises:
        ConfigError: unknown name.
    """
    if which == "eval" and config.eval_preset:
        return eval_set(config.eval_preset)
    return data_preset(config.preset) if config.preset else None


def local_or_hub(name: str, preset: Preset, folder: str | Path | None = None) -> str:
    """``folder``/``name``.jsonl, .parquet or .csv where there is one, else the Hub's name."""
    for suffix in LOCAL_SUFFIXES if folder is not None else ():
        path = Path(folder) / f"{name}{suffix}"  # type: ignore[arg-type]
        if path.is_file():
            return str(path)
    return preset.source


def eval_settings(name: str, folder: str | Path | None = None) -> dict[str, Any]:
    """Keys of ``DataConfig`` that make ``load_prompts(config, tokenizer, "eval")`` read the evaluation set ``name``:
    ``config.data.model_copy(update=eval_settings("aime24", "my_sets"))``. Raises ConfigError: unknown name."""
    return {"eval": local_or_hub(name, eval_set(name), folder), "eval_preset": name}
