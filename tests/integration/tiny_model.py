"""A random Qwen2 of about 0.1 M parameters with tied embeddings and a character tokenizer, made in a second."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = string.ascii_letters[:26] + string.digits + " +-*/=()[]{}.,:;?!\\\n"


def write_tiny_model(
    folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, vocab: int | None = None, scale: float = 0.5
) -> Path:
    """Write a Hugging Face folder. ``scale``: standard deviation of the weights, large, so that the
    distributions over tokens are far from uniform and a wrong weight shows."""
    tokens = ["<pad>", "<eos>", "<bos>", *CHARACTERS]
    characters = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab or len(tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(2, hidden // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=scale,
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    return folder
