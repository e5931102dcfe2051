"""LoRA (arXiv 2106.09685) by peft: low-rank adapters beside frozen matrices.

Generators and exported folders get plain tensors under the base model's names, W + (alpha / rank) B A. The adapters
themselves only leave the learner in its checkpoints and in the exported adapter folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cures_ray.config import LoraConfig
from cures_ray.messages import ConfigError

ADAPTER = "default"  # peft's name for the only adapter

# parameters -> a block in which each of them is whole (DeepSpeed ZeRO-3 cuts them into shards)
Gather = Callable[[list[Tensor]], AbstractContextManager[Any]]


def add_adapters(model: Any, lora: LoraConfig, seed: int) -> None:
    """Freeze ``model`` and put adapters beside ``lora.targets``, in place. B starts at 0: the policy is unchanged.

    Raises:
        ConfigError: the targets are not linear layers below the output layer.
    """
    import peft  # optional; preflight looks for it

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # all ranks start alike
        try:
            peft.inject_adapter_in_model(settings, model, ADAPTER)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets = {lora.targets}: {error}") from error
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    if model.get_output_embeddings() in adapted or any(not isinstance(m.base_layer, torch.nn.Linear) for m in adapted):
        raise ConfigError(
            f"model.lora.targets = {lora.targets}: only linear layers below the output layer can have adapters; "
            f"all-linear takes them all"
        )


def base_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) as the model has them without adapters: the names, shapes and dtypes of ``full_tensors``."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def full_tensors(model: Any, gather: Gather = lambda parameters: nullcontext()) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each of the base model's parameters, adapters merged, in order; tied ones once. With a
    ``gather`` that shards need it is a collective, and a tensor lives only until the next one."""
    layers = {id(m.base_layer.weight): m for m in model.modules() if hasattr(m, "lora_A")}
    for name, parameter in base_parameters(model):
        layer = layers.get(id(parameter))
        adapters = [] if layer is None else [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        with gather([parameter, *adapters]):
            yield name, parameter.data if layer is None else _merged(layer)


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """W + (alpha / rank) B A, added in float32, in W's dtype."""
    weight = layer.base_layer.weight
    a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    return (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)


def adapter_tensors(model: Any, gather: Gather = lambda parameters: nullcontext()) -> dict[str, Tensor]:
    """The adapters alone, whole and on the CPU, under the names of peft's folders."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gather([parameter]):
                short = name.replace(f".{ADAPTER}.", ".")
                tensors[f"base_model.model.{short}"] = parameter.detach().to("cpu", copy=True).contiguous()
    return tensors


def save_adapter(model: Any, tensors: dict[str, Tensor], path: str, folder: Path) -> None:
    """Write ``adapter_tensors`` as a folder for ``peft.PeftModel.from_pretrained``; ``path`` is the base model's."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(model.peft_config[ADAPTER], base_model_name_or_path=path, inference_mode=True)
    settings.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
