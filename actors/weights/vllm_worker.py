"""Worker side of the shared-memory weight transfer.

vLLM imports this module in the process that holds the model, because the generator names
``actors.weights.vllm_worker.WorkerExtension`` as its ``worker_extension_cls``; importing it registers the "shm"
engine. Weights arrive as a safetensors file (in /dev/shm), so nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Nothing to agree on: each update names its file."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    path: str  # a safetensors file with Hugging Face parameter names
    version: int  # must equal the file's metadata entry "version"


class ShmWeightTransferEngine(WeightTransferEngine[ShmInit, ShmUpdate]):
    """Loads a published file into the running model, layer by layer.

    ``load_weights`` alone does not do: vLLM repacks linear layers for the CPU after loading, and the layerwise
    reload restores the loadable layout, loads, and repacks.
    """

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdate) -> None:
        """Load the whole file.

        Raises:
            ValueError: the file is missing, is of another version, or lacks parameters of the model. The model
                is then unusable and its process must be restarted.
        """
        if not os.path.exists(update_info.path):
            raise ValueError(f"published weights {update_info.path} do not exist on this machine")
        with safe_open(update_info.path, framework="pt") as file:
            version = (file.metadata() or {}).get("version")
            if version != str(update_info.version):
                raise ValueError(f"{update_info.path} holds version {version}, expected {update_info.version}")
            expected = {name for name, _ in self.model.named_parameters()}
            model: Any = self.model
            loaded = model.load_weights(self._tensors(file))
        missing = expected - set(loaded) if loaded is not None else set()
        if self._tied():
            missing = {name for name in missing if not name.startswith("lm_head.")}
        if missing:
            raise ValueError(f"{update_info.path} lacks {len(missing)} parameters, among them {min(missing)}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu" and self._tied():
            # lm_head shares the embedding's weight, so no weight is loaded into it and the reload leaves the
            # copy that was packed from the old weight. The canary would notice: log-probabilities are nats off.
            head: Any = self.model.lm_head
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        pass

    def _tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))

    @staticmethod
    def _tensors(file: safe_open) -> Iterator[tuple[str, torch.Tensor]]:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


with suppress(ValueError):  # imported twice
    WeightTransferEngineFactory.register_engine("shm", ShmWeightTransferEngine)


class WorkerExtension:
    """Adds no method to the worker; naming it makes vLLM import this module."""
