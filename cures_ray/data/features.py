"""Features of prompts for the difficulty predictor: what a text shows of its difficulty."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def prompt_features(
    texts: Sequence[str],
    levels: np.ndarray | None = None,
    dimensions: int = 512,
    tags: Sequence[str] | None = None,
) -> np.ndarray:
    """Features of prompts, float32 [N, d]: level, length, digits, and a signed hash of words and of character
    3-grams, scaled to unit length. ``d`` = ``dimensions``; the hash is CRC-32, the same in every process.

    A level that is text ("gcd", "Level 5") and the words of ``tags`` (parameters of a generated task) join the hash as
    a second bag of words of unit length.
    """
    if dimensions < 8:
        raise ValueError(f"prompt_features needs at least 8 dimensions, not {dimensions}")
    features = np.zeros((len(texts), dimensions), np.float32)
    if levels is not None:
        values = np.asarray(levels)
        names, codes = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
        features[:, 0] = codes.reshape(-1) / max(len(names) - 1, 1)
    words = _tag_words(len(texts), levels, tags)
    for i, text in enumerate(texts):
        features[i, 1] = np.log1p(len(text)) / 8
        features[i, 2] = np.log1p(sum(ch.isdigit() for ch in text)) / 4
        features[i, 3] = np.log1p(text.count(" ")) / 6
        features[i, 4:] = _hashed(_grams(text[:4096]), dimensions - 4)
        if words is not None and words[i]:
            features[i, 4:] += _hashed(words[i], dimensions - 4)
    return features


def _tag_words(count: int, levels: np.ndarray | None, tags: Sequence[str] | None) -> list[list[str]] | None:
    named = levels is not None and np.asarray(levels).dtype == object
    if not named and tags is None:
        return None
    words: list[list[str]] = [[] for _ in range(count)]
    for i in range(count):
        if named and levels is not None and str(levels[i]):
            words[i].append(f"level={levels[i]}")
        if tags is not None:
            words[i] += tags[i].split()
    return words


def _grams(text: str) -> list[str]:
    return text.split() + [text[j : j + 3] for j in range(len(text) - 2)]


def _hashed(grams: list[str], size: int) -> np.ndarray:
    codes = np.array([zlib.crc32(g.encode()) for g in grams] or [0], np.uint32)
    sign = np.where(codes >> 31, 1.0, -1.0)
    bag = np.bincount(codes % size, weights=sign, minlength=size)
    return bag / max(float(np.linalg.norm(bag)), 1.0)
