"""What a learner rank and a generator will take, from the model's shape alone; checked against measured runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.engine_settings import BYTES
from actors.weights.canary import engine_dtype
from cures_ray.config import Config
from cures_ray.learning.policy import LOGITS_PER_CHUNK
from cures_ray.messages import ConfigError

GIB = 2**30
PROCESS_GIB = 0.6  # Python, torch and DeepSpeed before a model is loaded
ENGINE_GIB = 1.0  # the same of vLLM


@dataclass(frozen=True, slots=True)
class Shape:
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Config) -> Shape:
        """Read on the meta device, from the model's configuration.

        Raises:
            ConfigError: it cannot be read.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        model = config.model
        try:
            description: Any = AutoConfig.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path = {model.path}: its configuration cannot be read: {error}") from None
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(description, trust_remote_code=model.trust_remote_code)
        text = description.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in built.parameters()),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
        )


def learner_gib(shape: Shape, config: Config, prompt_tokens: float) -> dict[str, float]:
    """GiB of one rank at most, by what takes them. ``prompt_tokens``: of a usual prompt."""
    learner, width = config.learner, BYTES[config.learner.dtype]
    shard = 1 / learner.num_ranks
    per_parameter = width * (shard if learner.zero_stage >= 3 else 1)
    per_parameter += 4 * (shard if learner.zero_stage >= 2 else 1)  # gradients, accumulated in float32
    per_parameter += (8 + (4 if width == 2 else 0)) * (shard if learner.zero_stage >= 1 else 1)  # Adam, float32 copy
    rollouts = config.curriculum.rollouts_per_step / learner.num_ranks
    completions = rollouts * config.rollout.max_new_tokens
    tokens = min(learner.max_tokens_per_rank, completions + rollouts * prompt_tokens)
    scored = min(tokens, completions)
    return {
        "process": PROCESS_GIB,
        "weights, gradients, Adam": shape.parameters * per_parameter / GIB,
        "activations": activations_gib(shape, config, tokens),
        "logits": logits_gib(shape, width, min(scored, LOGITS_PER_CHUNK / shape.vocabulary)),
    }


def activations_gib(shape: Shape, config: Config, tokens: float) -> float:
    """What the backward pass needs of one micro-batch: per token and layer about 8 hidden and 4 intermediate vectors,
    and in bfloat16 the float32 copies inside two norms. With gradient checkpointing one vector, and one layer whole."""
    width = BYTES[config.learner.dtype]
    layer = (8 * shape.hidden + 4 * shape.intermediate) * width + (16 * shape.hidden if width == 2 else 0)
    if config.learner.gradient_checkpointing:
        return tokens * (shape.layers * shape.hidden * width + layer) / GIB
    return tokens * shape.layers * layer / GIB


def logits_gib(shape: Shape, width: int, tokens: float) -> float:
    """The output layer of ``tokens`` scored tokens: logits, and float32 probabilities and their gradient."""
    return tokens * shape.vocabulary * (width + 8) / GIB


def generator_gib(shape: Shape, config: Config) -> dict[str, float]:
    """GiB of one device of a generator without its KV cache."""
    weights = shape.parameters * BYTES[engine_dtype(config)] / config.rollout.tensor_parallel_size / GIB
    return {"process": ENGINE_GIB, "weights": weights}


def memory_report(config: Config, prompt_tokens: float) -> str:
    shape = Shape.of(config)
    lines = [f"{shape.parameters / 1e6:,.1f} M parameters; a third more or less is usual"]
    learner = f"learner, a rank (ZeRO {config.learner.zero_stage}, {config.learner.dtype})"
    generator = f"generator, a device ({engine_dtype(config)}; KV cache beside)"
    for name, parts in (
        (learner, learner_gib(shape, config, prompt_tokens)),
        (generator, generator_gib(shape, config)),
    ):
        each = " + ".join(f"{key} {value:.2f}" for key, value in parts.items())
        lines.append(f"{name}: {sum(parts.values()):.1f} GiB = {each}")
    return "\n".join(lines)
