"""The model that the learner trains: how it is loaded, how it scores tokens, its optimizer and learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cures_ray.config import Config, LearnerConfig
from cures_ray.learning.lora import add_adapters
from cures_ray.learning.losses import SampledLogprobs
from cures_ray.messages import ConfigError, TrainingBatch

LOGITS_PER_CHUNK = 2**28  # entries [tokens, vocabulary] computed at a time: 1 GiB in float32

Residual = Callable[[Tensor, Tensor, int], Tensor]  # (probs [N, V], target [N], d) -> [N, K]


class Policy(torch.nn.Module):
    """A causal language model whose forward pass scores given completion tokens.

    Logits are computed only where a completion token is predicted, and in ``chunks`` pieces that are computed
    again in the backward pass, so that [tokens, vocabulary] never has to fit in memory at once.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if getattr(model.config, "final_logit_softcapping", None):
            raise ConfigError(f"model {model.config.model_type}: final_logit_softcapping is not supported")
        self.lm = model

    def forward(
        self,
        input_ids: Tensor,
        index: Tensor,
        target: Tensor,
        temperature: float,
        chunks: int,
        residual: Residual | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Score N tokens of ``input_ids`` [B, S], right-padded.

        ``index`` int64 [N]: flat position (row * S + column) whose logits predict ``target`` [N].
        Returns log-probabilities [N], entropies [N], hidden states [N, d], and ``residual``'s [N, K] if given.
        """
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, index)
        head = self.lm.get_output_embeddings()

        def score(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, entropy, probs = SampledLogprobs.apply(head(h), t, temperature)
            return logprobs, entropy, probs.new_zeros(0) if residual is None else residual(probs, t, h.shape[1])

        if chunks == 1:
            logprobs, entropy, extra = score(hidden, target)
        else:
            parts = [
                checkpoint(score, h, t, use_reentrant=False)
                for h, t in zip(_pieces(hidden, chunks), _pieces(target, chunks), strict=True)
            ]
            logprobs, entropy, extra = (torch.cat(column) for column in zip(*parts, strict=True))
        return logprobs, entropy, hidden.detach(), None if residual is None else extra


def _pieces(tensor: Tensor, chunks: int) -> list[Tensor]:
    """Exactly ``chunks`` pieces, empty ones included: every rank must call a ZeRO-3 layer equally often."""
    bounds = [len(tensor) * i // chunks for i in range(chunks + 1)]
    return [tensor[a:b] for a, b in itertools.pairwise(bounds)]


def load_model(config: Config) -> Any:
    """The Hugging Face model in the learner's dtype, dropout off: log-probabilities must be those of sampling."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        dtype=getattr(torch, config.learner.dtype),
    )
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if config.learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_policy(config: Config) -> Policy:
    """The policy that is trained, with its adapters where ``model.lora`` asks for them."""
    model = load_model(config)
    if config.model.lora is not None:
        add_adapters(model, config.model.lora, config.learner.seed)
    return Policy(model)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Of the whole model, whatever part of it this process holds."""

    parameters: int
    trained: int  # parameters that get a gradient
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(n for n, requires_grad in sizes if requires_grad)
        c = model.config
        return cls(sum(n for n, _ in sizes), trained, c.num_hidden_layers, c.hidden_size, c.vocab_size)

    def chunks(self, batch: TrainingBatch, max_tokens: int) -> int:
        """Pieces in which logits are computed: of the largest micro-batch that can occur, equal on all ranks."""
        whole = sum(int(g.completion_tokens.sum()) for g in batch.groups)
        longest = max((int(g.completion_tokens.max()) + g.prompt_tokens for g in batch.groups), default=1)
        return max(1, -(-min(whole, max(max_tokens, longest)) * self.vocabulary // LOGITS_PER_CHUNK))

    def flops(self, tokens: float, squares: float, *, updates: int, scores: int) -> float:
        """Of ``updates`` forward and backward passes and ``scores`` forward passes over ``tokens`` tokens.

        A forward pass costs 2 x parameters a token, and so does the gradient of the activations; that of the weights
        2 x trained parameters. Causal attention: 2 x layers x hidden x length^2 a pass; ``squares`` sums length^2.
        """
        forward, attention = 2.0 * self.parameters * tokens, 2.0 * self.layers * self.hidden * squares
        backward = forward + 2.0 * self.trained * tokens + 2.0 * attention
        return (updates + scores) * (forward + attention) + updates * backward


def parameter_groups(policy: torch.nn.Module, learner: LearnerConfig) -> list[list[Any]]:
    """The trained parameters, matrices first where they alone decay. The order is part of a checkpoint."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if not learner.weight_decay:
        return [parameters]
    groups = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return [group for group in groups if group]


def make_optimizer(policy: torch.nn.Module, learner: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``."""
    decays = (learner.weight_decay, 0.0)
    groups = parameter_groups(policy, learner)
    return torch.optim.AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=False)],
        lr=learner.lr,
        betas=(learner.adam_beta1, learner.adam_beta2),
        fused=True,
    )


def learning_rate(learner: LearnerConfig, update: int, total: int) -> float:
    """Of optimizer update ``update`` (0-based) of ``total``: linear warm-up, then the schedule down to 0."""
    if update < learner.warmup_steps:
        return learner.lr * (update + 1) / learner.warmup_steps
    done = min(1.0, (update - learner.warmup_steps) / max(1, total - learner.warmup_steps))
    if learner.lr_schedule == "linear":
        return learner.lr * (1 - done)
    if learner.lr_schedule == "cosine":
        return learner.lr * 0.5 * (1 + math.cos(math.pi * done))
    return learner.lr


SMALL_MODEL = 5_000_000  # parameters; below it a second thread costs more than it computes


def learner_threads(setting: float | str, parameters: int, cores: int, ranks: int) -> int:
    """Threads of one learner rank on CPUs: ``learner.cpus_per_rank``, or for "auto" all cores of the node shared by
    its ``ranks``. Generators have little to do while the learner of a real model computes, and threads that wait give
    their core away (OMP_WAIT_POLICY=PASSIVE), so nothing is kept back for them."""
    if setting != "auto":
        return max(1, int(setting))
    return 1 if parameters < SMALL_MODEL else max(1, cores // ranks)
