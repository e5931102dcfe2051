"""A random Qwen2 (tied embeddings) or Llama (untied) of about 0.1 M parameters with a character tokenizer."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHARACTERS = string.ascii_letters[:26] + string.digits + " +-*/=()[]{}.,:;?!\\\n"


def write_tiny_model(folder: Path, *, seed: int = 0, tied: bool = True, scale: float = 0.5) -> Path:
    """Write a Hugging Face folder: a Qwen2 with tied embeddings, or a Llama without. ``scale`` of the weights: large
    ones make distributions over tokens far from uniform, so that a wrong weight shows."""
    tokens = ["<pad>", "<eos>", "<bos>", *CHARACTERS]
    characters = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    architecture, settings = (Qwen2ForCausalLM, Qwen2Config) if tied else (LlamaForCausalLM, LlamaConfig)
    config = settings(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=scale,
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
    )
    architecture(config).to(torch.float32).save_pretrained(folder)
    return folder
