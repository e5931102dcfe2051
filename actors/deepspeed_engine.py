"""The DeepSpeed engine of one learner rank: the policy module, its optimizer, and their state without pickle.

DeepSpeed's own checkpoints are pickles. Here each rank writes the tensors it owns (float32 master weights and
Adam moments, whole for ZeRO 0, its shard for ZeRO 1-3) to ``rank-<r>.safetensors`` and rank 0 a
``learner.json``; they load at the same number of ranks and the same ZeRO stage. This reads DeepSpeed's
internals, so its version is pinned (pyproject.toml).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cures_ray.config import Config, LearnerConfig
from cures_ray.learning.losses import SampledLogprobs
from cures_ray.messages import ConfigError

FORMAT = 1
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


def build_engine(policy: Policy, config: Config, world_size: int, *, on_gpu: bool) -> Any:
    """A DeepSpeed engine whose accumulation boundary and learning rate the caller sets."""
    import deepspeed

    learner = config.learner
    parameters = [p for p in policy.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    groups: Any = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}] if learner.weight_decay else parameters
    optimizer = torch.optim.AdamW(
        groups,
        lr=learner.lr,
        betas=(learner.adam_beta1, learner.adam_beta2),
        weight_decay=learner.weight_decay,
        fused=True,
    )
    bucket = min(200_000_000, sum(p.numel() for p in parameters))
    bf16 = learner.dtype == "bfloat16"
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches have any number of rows; the loss is a sum
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": learner.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": on_gpu and learner.zero_stage > 1,
        },
    }
    if bf16 and learner.zero_stage:
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=tree)
    return engine


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


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in _inner(engine).param_groups:
        group["lr"] = rate


def grad_norm(engine: Any) -> float | None:
    """The global norm before clipping as DeepSpeed found it in its last step; None for float32 ZeRO 0."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def save_state(engine: Any, folder: Path, rank: int, world_size: int, learner: LearnerConfig, updates: int) -> None:
    """Write this rank's share of the training state; rank 0 also writes ``learner.json``."""
    tensors = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    state = _inner(engine).state
    for i, master in enumerate(_masters(engine)):
        tensors[f"{i}.master"] = master.detach()
        for key, value in state.get(master, {}).items():
            tensors[f"{i}.{key}"] = torch.as_tensor(value)
    tensors = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, folder / f"rank-{rank}.safetensors")
    if rank == 0:
        (folder / "learner.json").write_text(json.dumps(_header(world_size, learner) | {"updates": updates}, indent=1))


def load_state(engine: Any, folder: Path, rank: int, world_size: int, learner: LearnerConfig) -> int:
    """Restore what ``save_state`` wrote; returns the number of optimizer updates done.

    Raises:
        ConfigError: the checkpoint is of another number of ranks, ZeRO stage, dtype or model size.
    """
    header = json.loads((folder / "learner.json").read_text())
    for key, wanted in _header(world_size, learner).items():
        if header.get(key) != wanted:
            raise ConfigError(
                f"learner checkpoint {folder}: {key} is {header.get(key)}, this run has {wanted}; set it back, or "
                f"start a new run from an exported model"
            )
    masters, state = _masters(engine), _inner(engine).state
    with safe_open(folder / f"rank-{rank}.safetensors", framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if sum(n.endswith(".master") for n in names) != len(masters):
            raise ConfigError(f"learner checkpoint {folder}: it holds another model or other parameter groups")
        for i, master in enumerate(masters):
            saved = file.get_tensor(f"{i}.master")
            if saved.shape != master.shape:
                raise ConfigError(
                    f"learner checkpoint {folder}: tensor {i} of rank {rank} is {list(saved.shape)}, this model "
                    f"needs {list(master.shape)}; is model.path the model of that run?"
                )
            master.data.copy_(saved)
            keys = [n.removeprefix(f"{i}.") for n in names if n.startswith(f"{i}.") and n != f"{i}.master"]
            if keys:
                state[master] = {k: file.get_tensor(f"{i}.{k}").to(master.device) for k in sorted(keys)}
        torch.set_rng_state(file.get_tensor("rng_cpu"))
        if "rng_cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))
    _masters_to_model(engine)
    return int(header["updates"])


def _header(world_size: int, learner: LearnerConfig) -> dict[str, Any]:
    return {"format": FORMAT, "num_ranks": world_size, "zero_stage": learner.zero_stage, "dtype": learner.dtype}


def _inner(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrapper; ZeRO 0 in float32 has no wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimizer updates on this rank, in a fixed order."""
    sharded = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    if sharded is not None:
        return list(sharded)
    return [p for group in _inner(engine).param_groups for p in group["params"]]


def _masters_to_model(engine: Any) -> None:
    """Copy the masters into the parameters that the forward pass uses. A collective."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for i in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
    elif hasattr(wrapper, "update_lp_params"):  # ZeRO 1, 2 and bfloat16 with float32 accumulation
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp16_groups"):  # ZeRO 0 in bfloat16
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master.data)
