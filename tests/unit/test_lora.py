"""LoRA: what leaves the learner are merged weights under the base model's names, or a folder that peft reads."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cures_ray.config import Config
from cures_ray.learning.lora import adapter_tensors, base_parameters, full_tensors, save_adapter
from cures_ray.learning.policy import ModelSize, load_policy, parameter_groups
from cures_ray.messages import ConfigError


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tied = request.param == "tied"
    architecture, settings = (Qwen2ForCausalLM, Qwen2Config) if tied else (LlamaForCausalLM, LlamaConfig)
    folder = tmp_path_factory.mktemp("lora") / "model"
    architecture(
        settings(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


def policy(model, **lora):
    settings = {"rank": 4, "alpha": 8} | lora
    return load_policy(
        Config.model_validate(
            {"model": {"path": str(model), "lora": settings}, "learner": {"dtype": "float32", "weight_decay": 0.1}}
        )
    )


def trained(model, **lora):
    """As after training: B is no longer 0."""
    changed = policy(model, **lora)
    with torch.no_grad():
        for name, parameter in changed.lm.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return changed


def scores(lm) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(lm(torch.arange(3, 30)[None]).logits, -1)


def test_only_adapters_are_trained_and_at_the_start_they_change_nothing(model):
    fresh = policy(model)
    size = ModelSize.of(fresh.lm)
    assert 0 < size.trained < 0.5 * size.parameters
    assert sum(p.numel() for g in parameter_groups(fresh, Config().learner) for p in g) == size.trained
    assert [len(g) for g in parameter_groups(fresh, Config.model_validate({"learner": {"weight_decay": 0.1}}).learner)]
    base = AutoModelForCausalLM.from_pretrained(model)
    assert torch.allclose(scores(fresh.lm), scores(base), atol=1e-6)
    again = dict(policy(model).lm.named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in fresh.lm.named_parameters())  # on every rank alike


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_published_tensors_in_a_fresh_base_model_score_as_the_adapted_policy(model, targets):
    """Fails if adapters are left out of what is published, or under names that nobody loads."""
    ours, fresh = trained(model, targets=targets), AutoModelForCausalLM.from_pretrained(model)
    base = scores(fresh)
    published = {name: tensor.clone() for name, tensor in full_tensors(ours.lm)}
    assert list(published) == [n for n, _ in fresh.named_parameters()] == [n for n, _ in base_parameters(ours.lm)]
    result = fresh.load_state_dict(published, strict=False)
    assert result.unexpected_keys == [] and set(result.missing_keys) <= {"lm_head.weight"}
    assert torch.allclose(scores(fresh), scores(ours.lm), atol=1e-5)
    assert (scores(fresh) - base).abs().max() > 0.05


def test_the_adapter_folder_is_one_that_peft_loads(model, tmp_path):
    ours = trained(model)
    save_adapter(ours.lm, adapter_tensors(ours.lm), str(model), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert torch.allclose(scores(theirs), scores(ours.lm), atol=1e-5)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["no_such_layer"]])
def test_targets_that_cannot_be_merged_are_refused(model, targets):
    with pytest.raises(ConfigError, match=r"model.lora.targets = \['"):
        policy(model, targets=targets)
