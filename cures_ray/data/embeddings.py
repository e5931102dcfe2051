"""Frozen embeddings of prompts, as features for the difficulty predictor (predictor.py).

The mean of the base model's own input embeddings over a prompt's tokens, projected at random to a few dimensions and
standardised. Only the embedding table is read, so this costs no forward pass and works for any size of model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import ModelConfig
from cures_ray.messages import ConfigError

NAMES = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
BATCH = 2048  # texts per tokenizer call


def prompt_embeddings(texts: Sequence[str], tokenizer: Any, model: ModelConfig, dimensions: int = 64) -> np.ndarray:
    """Features float32 [N, d], columns of mean 0 and standard deviation 1; d = min(``dimensions``, hidden size).

    Raises:
        ConfigError: the model folder has no embedding table under a known name.
    """
    table = _projected(embedding_table(model), dimensions)
    features = np.zeros((len(texts), table.shape[1]), np.float32)
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        for i, ids in enumerate(tokenizer(batch, add_special_tokens=False)["input_ids"]):
            if ids:
                features[start + i] = table[ids].mean(0)
    return _standardised(features)


def prompt_hidden(
    texts: Sequence[str], tokenizer: Any, model: ModelConfig, dimensions: int = 64, batch: int = 16
) -> np.ndarray:
    """Features float32 [N, d] as ``prompt_embeddings``, from the base model's last hidden state at the last token of
    the prompt: one forward pass over all prompts, once, on this machine. A probe on the policy's own states in the way
    of POISE (2605.07579), but of the policy before training."""
    import torch
    from transformers import AutoModel

    net = AutoModel.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, dtype=torch.float32
    ).eval()
    states = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            rows = [
                ids or [0]
                for ids in tokenizer(list(texts[start : start + batch]), add_special_tokens=False)["input_ids"]
            ]
            last = torch.tensor([len(ids) - 1 for ids in rows])
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
            mask = torch.arange(padded.shape[1])[None, :] <= last[:, None]
            hidden = net(input_ids=padded, attention_mask=mask.long()).last_hidden_state
            states.append(hidden[torch.arange(len(rows)), last].float())
    return _standardised(_projected(torch.cat(states), dimensions))


def _standardised(features: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1; a constant column is 0."""
    spread = features.std(0)
    return ((features - features.mean(0)) / np.where(spread > 1e-8, spread, 1.0)).astype(np.float32)


def embedding_table(model: ModelConfig) -> Any:
    """The input embeddings, float32 torch tensor [V, h], read from the model's safetensors files alone."""
    import torch
    from safetensors import safe_open

    folder = Path(model.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        files = [folder / where[name] for name in NAMES if name in where]
    for path in files:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys()) & set(NAMES)
            if found:
                return file.get_tensor(found.pop()).to(torch.float32)
    raise ConfigError(
        f"curriculum.predictor_features = embedding: no {' or '.join(NAMES)} in {folder}/*.safetensors; "
        f"use predictor_features = text"
    )


def _projected(table: Any, dimensions: int) -> np.ndarray:
    """[V, d]: a fixed Gaussian projection where the hidden size is larger than d."""
    import torch

    hidden = table.shape[1]
    if hidden <= dimensions:
        return table.numpy()
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(hidden, dimensions, generator=generator) / dimensions**0.5
    return (table @ projection).numpy()
