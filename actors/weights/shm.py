"""Road ``shm``: the learner writes the stream to a file in /dev/shm, and engines of the same machine load that file."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from actors.weights.backend import KEPT_VERSIONS, Info, Node, Settings
from cures_ray.messages import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from actors.weights.stream import Source

SHM_ROOT = Path("/dev/shm")
PREFIX = "cures-ray"


class Publisher:
    kept = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def publish(self, source: Source, version: int) -> Info:
        """Raises RunError when /dev/shm is full."""
        from actors.weights.stream import chunks, total_bytes

        if self.settings.rank:
            source.assist()
            return {}
        size = total_bytes(source, version)
        stream = (c.numpy() for c in chunks(source, version, self.settings.chunk_bytes))
        path = write_version(self.settings.folder, version, size, stream)
        return {"backend": "shm", "path": str(path), "bytes": size}

    def close(self) -> None:
        pass


def update_info(info: Info, version: int, node: Node) -> Info:
    return {"path": info["path"]}


def receive(update: Info, device: torch.device, rank: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) from the file; on a CPU the tensors are views of its pages.

    Raises:
        ValueError: the file is missing or of another version.
    """
    from safetensors import safe_open

    path, version = update["path"], update["version"]
    if not os.path.exists(path):
        raise ValueError(
            f"published weights {path} do not exist on this machine; weights.backend = object_store serves other nodes"
        )
    with safe_open(path, framework="pt", device=str(device)) as file:
        found = (file.metadata() or {}).get("version")
        if found != str(version):
            raise ValueError(f"{path} holds version {found}, expected {version}")
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def end() -> None:
    pass  # the driver removes its folder


def write_version(folder: Path, version: int, size: int, chunks: Iterator[object]) -> Path:
    """Write the ``size`` bytes of ``chunks`` (buffers) to the file of ``version`` in ``folder`` and return its path.
    The file appears whole or not at all; versions before the last two are removed.

    Raises:
        RunError: ``folder`` is full, with what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    message = (
        f"no room for weights version {version} in {folder}: {size >> 20} MiB needed, {free >> 20} MiB free. "
        f"{KEPT_VERSIONS} versions and one being written must fit; enlarge it "
        f"(docker run --shm-size, mount -o remount,size=) or use weights.backend = nccl on GPUs"
    )
    if size > free:
        raise RunError(message)
    path = version_path(folder, version)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk)  # type: ignore[arg-type]
            if file.tell() != size:
                raise ValueError(f"weights version {version} has {file.tell()} bytes, announced were {size}")
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(message) from error
        raise
    partial.replace(path)
    others = sorted(p for p in folder.glob("version-*.safetensors") if p != path)
    for old in others[: -(KEPT_VERSIONS - 1)]:
        old.unlink(missing_ok=True)
    return path


def version_path(folder: Path, version: int) -> Path:
    return folder / f"version-{version:09d}.safetensors"


# -- folders: each names its owner, so that what the dead left can be told from what the living use ------------------


def shm_folder(run_dir: Path, root: Path = SHM_ROOT) -> Path:
    """Make this process' folder for the published weights of ``run_dir`` and remove those of dead processes. Whoever
    called removes the folder at the end of the run."""
    return owned_folder(sha256(str(run_dir.resolve()).encode()).hexdigest()[:8], os.getpid(), root)


def owned_folder(label: str, owner: int, root: Path = SHM_ROOT) -> Path:
    """Make the folder ``label`` (without dots) of process ``owner``. The name tells the owner: host, process id and its
    start time (process ids are used again)."""
    remove_stale_folders(root)
    folder = root / f"{PREFIX}.{_machine()}.{owner}.{_started(owner)}.{label}"
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
