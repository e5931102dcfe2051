"""Weights from learner to generators: which way they travel, and the sender's side of each way.

- ``shm``: the learner writes a safetensors file into the run's folder in /dev/shm (`write_shm`); generators on
  the same machine load it (``actors/weights/vllm_worker.py``). CPUs, and GPUs of one machine.
- ``nccl``: rank 0 of the learner broadcasts to all generators (`nccl_info`, `send_weights`).
- ``ipc``: learner and generator share a GPU; handles of its memory travel (`ipc_info`).

``nccl`` and ``ipc`` follow vLLM 0.32's interface as read in its source; they have not been run: the machine that
this was written on has no GPU.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cures_ray.config import Config
from cures_ray.messages import ConfigError, RunError

if TYPE_CHECKING:
    import torch

SHM_ROOT = Path("/dev/shm")
PREFIX = "cures-ray"
KEPT_VERSIONS = 2  # a generator may still read the version before the newest


def resolve_backend(config: Config, *, on_gpu: bool, colocated: bool) -> str:
    """The transfer backend of this run: "shm", "nccl" or "ipc". ``on_gpu``: the learner has CUDA devices.

    Raises:
        ConfigError: a backend that cannot work with this placement.
    """
    backend = config.weights.backend
    if backend == "auto":
        if not on_gpu:
            return "shm"
        return "ipc" if colocated else "nccl"
    if backend != "shm" and not on_gpu:
        raise ConfigError(f"weights.backend = {backend} needs GPUs; use weights.backend = shm, or auto")
    if backend == "ipc" and not colocated:
        raise ConfigError("weights.backend = ipc needs placement.colocate = true: both sides must hold the same GPU")
    if backend == "nccl" and colocated:
        raise ConfigError("weights.backend = nccl cannot join two processes on one GPU; use ipc, or auto")
    return backend


# -- shared memory -------------------------------------------------------------------------------------


def shm_folder(run_dir: Path, root: Path = SHM_ROOT) -> Path:
    """Make this process' folder for the published weights of ``run_dir`` and remove those of dead processes.

    The name tells the owner: host, process id and its start time (process ids are used again). Whoever called
    removes the folder at the end of the run.
    """
    remove_stale_folders(root)
    run = sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    pid = os.getpid()
    folder = root / f"{PREFIX}.{_machine()}.{pid}.{_started(pid)}.{run}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_stale_folders(root: Path = SHM_ROOT) -> list[Path]:
    """Remove and return the folders in ``root`` whose owner ran on this machine and is dead."""
    removed = []
    for folder in root.glob(f"{PREFIX}.{_machine()}.*"):
        parts = folder.name.split(".")
        if len(parts) == 5 and parts[2].isdigit() and _started(int(parts[2])) != parts[3]:
            with suppress(OSError):
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _machine() -> str:
    """Host and process-id namespace: containers may share /dev/shm and not see each other's processes."""
    name = f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
    return sha256(name.encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """The start time of process ``pid`` in clock ticks since boot; "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name, field 2, may hold spaces


def write_shm(named_tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, version: int) -> Path:
    """Write the weights of ``version`` into ``folder`` and return the file's path; older versions than the last
    two are removed. The file appears whole or not at all.

    Raises:
        RunError: ``folder`` is full, with what is needed and what is free.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.data_ptr() in seen:  # tied: safetensors refuses two names for one memory
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    published = sorted(folder.glob("version-*.safetensors"))
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    message = (
        f"no room for weights version {version} in {folder}: {needed >> 20} MiB needed, {free >> 20} MiB free. "
        f"{KEPT_VERSIONS} versions and one being written must fit; enlarge it "
        f"(docker run --shm-size, mount -o remount,size=) or use weights.backend = nccl on GPUs"
    )
    if needed > free:
        raise RunError(message)
    path = folder / f"version-{version:09d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"version": str(version)})
    except Exception as error:
        partial.unlink(missing_ok=True)
        if "No space left" in str(error):
            raise RunError(message) from error
        raise
    partial.replace(path)
    for old in [p for p in published if p != path][: -(KEPT_VERSIONS - 1)]:
        old.unlink(missing_ok=True)
    return path


# -- GPUs (not run on the machine this was written on) -------------------------------------------------


def _full(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter that DeepSpeed ZeRO-3 may have cut into shards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(module: torch.nn.Module, zero_stage: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor) of each parameter of the base model, in order, LoRA adapters merged. Under ZeRO-3 a
    collective: all ranks must iterate."""
    from cures_ray.learning.lora import full_tensors

    if zero_stage < 3:
        return full_tensors(module)
    import deepspeed

    return full_tensors(module, deepspeed.zero.GatheredParameters)


def _metadata(module: torch.nn.Module) -> dict[str, list[Any]]:
    from cures_ray.learning.lora import base_parameters

    named = list(base_parameters(module))
    return {
        "names": [name for name, _ in named],
        "dtype_names": [str(p.dtype).removeprefix("torch.") for _, p in named],
        "shapes": [list(_full(p)) for _, p in named],
    }


def nccl_info(module: torch.nn.Module, config: Config, address: str, port: int) -> dict[str, Any]:
    """``WeightUpdate.info`` of one nccl transfer; ``address:port`` must be free on the learner's rank 0.

    Each transfer opens a group of its own, of rank 0 and all generators, so that a generator that was replaced
    in between takes part in the next one.
    """
    world_size = 1 + config.rollout.num_generators * config.rollout.tensor_parallel_size
    init = {"master_address": address, "master_port": port, "world_size": world_size, "packed": True}
    return {"init": init, "update": _metadata(module)}


def send_weights(module: torch.nn.Module, info: dict[str, Any], *, rank: int, zero_stage: int) -> None:
    """The sender's half of an nccl transfer, on every learner rank, beside the generators' update_weights.

    The generators pause, load and stamp the version themselves, so the client that vLLM's sender would drive
    them through does nothing here. Returns at once for an ``info`` of another backend.
    """
    if "init" not in info:
        return
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from cures_ray.learning.lora import base_parameters

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, p.dtype, _full(p)) for name, p in base_parameters(module)]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return gathered(module, zero_stage)

    sender = WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(**info["init"], rank=rank), client=SelfDriven(), source=Source()
    )
    try:
        sender.send_weights()
    finally:
        sender.shutdown()


class SelfDriven:
    """vLLM's VLLMWeightSyncClient for generators that act on a WeightUpdate by themselves: four no-ops."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def ipc_info(module: torch.nn.Module, zero_stage: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """``WeightUpdate.info`` with CUDA IPC handles, and the tensors they point to, which must be kept until the
    generators have loaded. A collective: every learner rank calls it, each for the generator on its own GPU.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    keep = [t.detach().contiguous().clone() if zero_stage == 3 else t.detach() for _, t in gathered(module, zero_stage)]
    mine = [{device: reduce_tensor(tensor)[1]} for tensor in keep]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        mine = [{k: v for rank in everyone for k, v in rank[i].items()} for i in range(len(mine))]
    return {"update": _metadata(module) | {"ipc_handles": mine}}, keep
