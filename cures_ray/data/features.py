"""Features of prompts for the difficulty predictor: what a text shows of its difficulty."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def prompt_features(texts: Sequence[str], levels: np.ndarray | None = None, dimensions: int = 512) -> np.ndarray:
    """Features of prompts, float32 [N, d]: level, length, digits, and a signed hash of words and of character
    3-grams, scaled to unit length. ``d`` = ``dimensions``; the hash is CRC-32, the same in every process."""
    if dimensions < 8:
        raise ValueError(f"prompt_features needs at least 8 dimensions, not {dimensions}")
    features = np.zeros((len(texts), dimensions), np.float32)
    if levels is not None:
        values = np.asarray(levels)
        names, codes = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
        features[:, 0] = codes.reshape(-1) / max(len(names) - 1, 1)
    for i, text in enumerate(texts):
        features[i, 1] = np.log1p(len(text)) / 8
        features[i, 2] = np.log1p(sum(ch.isdigit() for ch in text)) / 4
        features[i, 3] = np.log1p(text.count(" ")) / 6
        features[i, 4:] = _hashed(text, dimensions - 4)
    return features


def _hashed(text: str, size: int) -> np.ndarray:
    text = text[:4096]
    grams = text.split() + [text[j : j + 3] for j in range(len(text) - 2)]
    codes = np.array([zlib.crc32(g.encode()) for g in grams] or [0], np.uint32)
    sign = np.where(codes >> 31, 1.0, -1.0)
    bag = np.bincount(codes % size, weights=sign, minlength=size)
    return bag / max(float(np.linalg.norm(bag)), 1.0)
