"""What the ledger knows of the prompts, beside it: RUN/ledger/prompts/.

    state.safetensors    ids, codes of the levels, features of the predictor: a restarted ledger needs them
    texts.parquet        level and the begin of the text, for people

Both are written when the run starts. The data set may change or go afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cures_ray.curriculum.batches import digest
from cures_ray.curriculum.predictor import level_codes
from cures_ray.snapshot import read_state, write_state

PREVIEW = 400  # characters kept of a text
SHARED = 40  # characters kept of what all texts begin with (a system prompt)
MARKUP = r"<\|[^|<>]*\|>"  # of chat templates


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The run's N prompts."""

    ids: np.ndarray  # uint64 [N]
    levels: np.ndarray | None  # codes [N]
    features: np.ndarray | None  # float32 [N, d]
    shown: pa.Table  # [N]: "level", "text"

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """As ``Curriculum`` takes them."""
        return self.ids, self.levels, self.features

    def find(self, words: str) -> np.ndarray:
        """Rows whose id begins with ``words`` or whose text holds them, int64 [k]."""
        named = np.array([f"{int(i):016x}".startswith(words.lower()) for i in self.ids], bool)
        holds = pc.match_substring(self.shown["text"], words, ignore_case=True).to_numpy()
        return np.flatnonzero(named | holds.astype(bool))


def write_prompts(
    folder: Path,
    ids: np.ndarray,
    levels: np.ndarray | None = None,
    features: np.ndarray | None = None,
    texts: pa.ChunkedArray | None = None,
) -> None:
    """Put the prompts into the ledger's ``folder``. As arguments of an actor they would lie in the object store, and a
    restarted actor could find them gone.

    Args:
        levels: of any type [N].
        texts: as the model sees them [N].
    """
    columns: dict[str, Any] = {"ids": np.asarray(ids, np.uint64)}
    if levels is not None:
        columns["levels"] = level_codes(levels, len(ids))[0]
    if features is not None:
        columns["features"] = features
    write_state(folder / "prompts", columns)
    named = [""] * len(ids) if levels is None else [str(level) for level in levels]
    begins = pa.chunked_array([[""] * len(ids)]) if texts is None else _previews(texts)
    temporary = folder / "prompts" / ".texts"
    pq.write_table(pa.table({"level": named, "text": begins}), temporary, compression="zstd")
    temporary.rename(folder / "prompts" / "texts.parquet")


def _previews(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """On one line, without the template's marks and most of what all texts begin with."""
    ends = pc.min_max(texts).as_py()
    pairs = enumerate(zip(ends["min"], ends["max"], strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), 0)  # of all: the least and the greatest text differ first
    texts = pc.utf8_slice_codeunits(texts, max(0, shared - SHARED), shared + 2 * PREVIEW)
    texts = pc.replace_substring_regex(texts, MARKUP, " ")
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))
    return pc.utf8_slice_codeunits(texts, 0, PREVIEW)


def read_prompts(folder: Path, wanted: str | None = None) -> Prompts:
    """What ``write_prompts`` wrote into the ledger's ``folder``; ``wanted``: the digest of its ids.

    Raises:
        ValueError: missing, damaged, or other prompts.
    """
    columns = read_state(folder / "prompts")
    if wanted is not None and digest(columns["ids"]) != wanted:
        raise ValueError(f"{folder}/prompts are not the prompts of the journal beside them")
    path = folder / "prompts" / "texts.parquet"
    try:
        shown = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return Prompts(ids=columns["ids"], levels=columns.get("levels"), features=columns.get("features"), shown=shown)
