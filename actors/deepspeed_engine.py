"""The DeepSpeed engine of one learner rank (learning.step.Engine), and its state without pickle.

DeepSpeed's own checkpoints are pickles. Here each rank writes the tensors it owns (float32 master weights and
Adam moments of what is trained, whole for ZeRO 0, its shard for ZeRO 1-3) to ``rank-<r>.safetensors`` and rank 0 a
``learner.json``. They load at the same ZeRO stage, also at another number of ranks: shards are even cuts of flat
tensors. This reads DeepSpeed's internals, so its version is pinned (pyproject.toml).
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cures_ray.config import Config
from cures_ray.learning.policy import Policy, make_optimizer, parameter_groups
from cures_ray.messages import CheckpointError, ConfigError

FORMAT = 2


class DeepSpeedEngine:
    """One of ``ranks`` ranks; ``module`` holds the policy's weights, ``policy`` is its forward pass."""

    def __init__(self, policy: Policy, config: Config, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device, self.config = rank, ranks, device, config
        self.policy = build_engine(policy, config, ranks, on_gpu=device.type == "cuda")
        self.module = self.policy.module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.policy.set_gradient_accumulation_boundary(last)
        self.policy.backward(loss * self.ranks)  # DeepSpeed divides the sum over ranks by their number

    def update(self, rate: float) -> float:
        for group in _inner(self.policy).param_groups:
            group["lr"] = rate
        plain = 0.0
        if self.config.learner.zero_stage == 0:  # DeepSpeed tells no norm for float32 without ZeRO
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            plain = float(torch.nn.utils.get_total_norm(gradients))
        self.policy.step()
        norm = self.policy.get_global_grad_norm()
        return plain if norm is None else float(norm)

    def total(self, values: list[float], *, largest: bool = False) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return [float(x) for x in tensor.tolist()]


def gather(parameters: list[Tensor]) -> AbstractContextManager[Any]:
    """A block in which parameters that ZeRO-3 has cut into shards are whole. A collective."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # type: ignore[no-any-return]


def build_engine(policy: Policy, config: Config, world_size: int, *, on_gpu: bool) -> Any:
    """A DeepSpeed engine whose accumulation boundary and learning rate the caller sets."""
    import deepspeed

    learner = config.learner
    bucket = min(200_000_000, sum(p.numel() for p in policy.parameters() if p.requires_grad))
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
    engine, *_ = deepspeed.initialize(model=policy, optimizer=make_optimizer(policy, learner), config=tree)
    return engine


# -- state ---------------------------------------------------------------------------------------------


def save_state(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's share of the training state; rank 0 also writes ``learner.json``.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tensors = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    state = _inner(engine.policy).state
    for i, master in enumerate(_masters(engine.policy)):
        tensors[f"{i}.master"] = master.detach()
        for key, value in state.get(master, {}).items():
            tensors[f"{i}.{key}"] = torch.as_tensor(value)
    tensors = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(tensors, folder / f"rank-{engine.rank}.safetensors")
        if engine.rank == 0:
            (folder / "learner.json").write_text(json.dumps(_header(engine), indent=1))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"learner rank {engine.rank} could not write its checkpoint to {folder}: {error}; free space there, or "
            f"choose another checkpoint.dir"
        ) from error


def load_state(engine: DeepSpeedEngine, folder: Path) -> None:
    """Restore what ``save_state`` wrote, also by another number of ranks.

    Raises:
        ConfigError: the checkpoint is of another ZeRO stage, dtype, LoRA or model.
    """
    header, expected = json.loads((folder / "learner.json").read_text()), _header(engine)
    stage, saved_ranks = engine.config.learner.zero_stage, header.get("num_ranks")
    for key, wanted in expected.items():
        if header.get(key) != wanted and key != "num_ranks":
            raise ConfigError(
                f"learner checkpoint {folder}: {key} is {header.get(key)}, this run has {wanted}; set it back, or "
                f"start a new run from an exported model"
            )
    masters, state = _masters(engine.policy), _inner(engine.policy).state
    same_ranks = saved_ranks == engine.ranks
    sliced = stage > 0 and not same_ranks
    ranks = list(range(saved_ranks)) if sliced else [engine.rank if same_ranks else 0]
    with ExitStack() as open_files, torch.no_grad():
        files = [open_files.enter_context(safe_open(folder / f"rank-{r}.safetensors", framework="pt")) for r in ranks]
        names = set(files[0].keys())
        if sum(n.endswith(".master") for n in names) != len(masters):
            raise ConfigError(f"learner checkpoint {folder}: it holds another model or other parameter groups")
        sizes = _sizes(engine) if sliced else []
        for i, master in enumerate(masters):
            keys = sorted(n.removeprefix(f"{i}.") for n in names if n.startswith(f"{i}."))
            values = {k: [f.get_tensor(f"{i}.{k}") for f in files] for k in keys}
            restored = {k: _slice(v, master, sizes[i], engine) if sliced else v[0] for k, v in values.items()}
            saved = restored.pop("master")
            if saved.shape != master.shape:
                raise ConfigError(
                    f"learner checkpoint {folder}: tensor {i} of rank {engine.rank} is {list(saved.shape)}, this "
                    f"model needs {list(master.shape)}; is model.path the model of that run?"
                )
            master.data.copy_(saved)
            if restored:
                state[master] = {k: t.to(master.device) for k, t in restored.items()}
        file = files[min(engine.rank, len(files) - 1)]
        torch.set_rng_state(file.get_tensor("rng_cpu"))
        if "rng_cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))
    _masters_to_model(engine.policy)


def _slice(parts: list[Tensor], master: Tensor, sizes: list[int], engine: DeepSpeedEngine) -> Tensor:
    """This rank's share of what other ranks saved in ``parts``: each tensor of ``sizes`` values was cut evenly, with
    padding at its end. A step count is everybody's."""
    if parts[0].dim() == 0:
        return parts[0]
    shares, start = [], 0
    for size in sizes:
        # a whole group is padded beyond an even cut (ZeRO 1, 2), one parameter is not (ZeRO 3)
        saved = len(parts[0]) if len(sizes) == 1 else -(-size // len(parts))
        length = len(master) if len(sizes) == 1 else -(-size // engine.ranks)
        values = torch.cat([part[start : start + saved] for part in parts])[:size]
        share = values[engine.rank * length : (engine.rank + 1) * length]
        shares.append(torch.nn.functional.pad(share, (0, length - len(share))))
        start += saved
    return torch.cat(shares) if start == len(parts[0]) else parts[0].new_zeros(0)  # of another model: no shape fits


def _sizes(engine: DeepSpeedEngine) -> list[list[int]]:
    """Values, over all ranks and without padding, of the tensors that lie behind each other in each master."""
    if engine.config.learner.zero_stage == 3:
        return [[p.ds_numel for p in group] for group in engine.policy.optimizer.fp16_groups]
    groups = parameter_groups(engine.module, engine.config.learner)
    return [[sum(p.numel() for p in group)] for group in groups]


def _header(engine: DeepSpeedEngine) -> dict[str, Any]:
    learner, lora = engine.config.learner, engine.config.model.lora
    return {
        "format": FORMAT,
        "num_ranks": engine.ranks,
        "zero_stage": learner.zero_stage,
        "dtype": learner.dtype,
        "lora": None if lora is None else lora.model_dump(),
    }


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
