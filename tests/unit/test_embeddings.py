import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cures_ray.config import ModelConfig
from cures_ray.curriculum.predictor import DifficultyPredictor
from cures_ray.data.embeddings import prompt_embeddings
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import build_tokenizer

TEXTS = [f"{a}+{b}=" for a in range(10, 30) for b in (11, 22)] + [f"{a}*{b}=" for a in range(10, 30) for b in (11, 22)]
HARD = np.array(["*" in t for t in TEXTS])


def model_folder(folder, hidden: int, name: str = "model.embed_tokens.weight") -> ModelConfig:
    torch.manual_seed(0)
    save_file({name: torch.randn(600, hidden), "lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("hidden", [32, 256])
def test_frozen_embeddings_are_standardised_repeatable_and_tell_kinds_of_prompts_apart(tmp_path, hidden):
    model, tokenizer = model_folder(tmp_path, hidden), build_tokenizer()
    features = prompt_embeddings(TEXTS, tokenizer, model)
    assert features.shape == (len(TEXTS), min(hidden, 64)) and features.dtype == np.float32
    assert np.allclose(features.mean(0), 0, atol=1e-5) and np.allclose(features.std(0), 1, atol=1e-3)
    assert np.array_equal(features, prompt_embeddings(TEXTS, tokenizer, model))

    predictor = DifficultyPredictor(features)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    seen, rest = order[: len(TEXTS) // 2], order[len(TEXTS) // 2 :]
    for _ in range(60):
        predictor.update(seen, np.where(HARD[seen], 0.0, 4.0), np.full(len(seen), 4.0))
    unseen = predictor.mean(rest)
    assert ((unseen < 0.5) == HARD[rest]).mean() > 0.85


def test_only_the_file_that_holds_the_table_is_read(tmp_path):
    model_folder(tmp_path, 8)
    (tmp_path / "model.safetensors").rename(tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.embed_tokens.weight": "b.safetensors"}}'
    )
    assert prompt_embeddings(["1", "2"], build_tokenizer(), ModelConfig(path=str(tmp_path))).shape == (2, 8)


def test_a_model_without_a_known_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="predictor_features = text"):
        prompt_embeddings(["1"], build_tokenizer(), model_folder(tmp_path, 8, name="strange.weight"))
