"""The engine's side of every road: loads what arrives into the running model.

vLLM imports this module in the processes that hold the model, because the generator names
``actors.weights.vllm_worker.WorkerExtension`` as its ``worker_extension_cls``; importing it registers the transfer
engine.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights.backend import road

ENGINE = "cures"  # the name under which vLLM knows it


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree on: each update says what it needs."""


@dataclass
class Update(WeightTransferUpdateInfo):
    backend: str
    info: dict[str, Any]  # of the backend's update_info, and the version


class RunningModel(WeightTransferEngine[Init, Update]):
    """Loads a stream of tensors into the running model, layer by layer.

    ``load_weights`` alone does not do: vLLM repacks linear layers for the CPU after loading, and the layerwise
    reload restores the loadable layout, loads, and repacks.
    """

    init_info_cls = Init
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Load all of it.

        Raises:
            ValueError: what arrived is of another version, or lacks parameters of the model. The model is then
                unusable and its process must be restarted.
        """
        model: Any = self.model
        expected = {name for name, _ in model.named_parameters()}
        arriving = road(update_info.backend).receive(update_info.info, self.device, self.parallel_config.rank)
        loaded = model.load_weights(arriving)
        missing = expected - set(loaded) if loaded is not None else set()
        if self._tied():
            missing = {name for name in missing if not name.startswith("lm_head.")}
        if missing:
            raise ValueError(f"the weights received lack {len(missing)} parameters, among them {min(missing)}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu" and self._tied():
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            # lm_head shares the embedding's weight, so no weight is loaded into it and the reload leaves the
            # copy that was packed from the old weight. The canary would notice: log-probabilities are nats off.
            head: Any = self.model.lm_head
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def shutdown(self) -> None:
        pass

    def _tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))


with suppress(ValueError):  # imported twice
    WeightTransferEngineFactory.register_engine(ENGINE, RunningModel)


class WorkerExtension:
    """Adds no method to the worker; naming it makes vLLM import this module."""
