"""Atomic checkpoints: a temporary folder, a manifest with hashes, one rename.

    RUN/checkpoints/step-00000050/
        manifest.json       format, step, sizes and hashes of the files, and a hash of itself
        learner/ ledger/    written by their owners through the ``write`` callback
        driver.json         step, evaluation history

A folder without a manifest, or whose bytes do not match it, is not a checkpoint. The newest intact one is used, and
the broken ones are named.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cures_ray.messages import CheckpointError, ConfigError

FORMAT = 2


class CheckpointStore:
    """The checkpoints of one run folder. ``keep``: intact ones that stay when another is written."""

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.root, self.keep = run_dir / "checkpoints", keep

    async def save(self, step: int, write: Callable[[Path], Awaitable[None]]) -> Path:
        """Let ``write`` fill a temporary folder, then publish it as the checkpoint of ``step``.

        Raises:
            CheckpointError: a file could not be written (full disk, quota). The checkpoints before are as they were.
        """
        temporary = self.root / f".writing-{step:08d}-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            await write(temporary)
            # hashing and flushing gigabytes takes seconds; the driver's event loop goes on meanwhile
            return await asyncio.to_thread(self._publish, temporary, step)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root}: {error}; "
                f"free disk space there. The checkpoints before it are intact"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that passes its manifest, and why newer ones were passed over."""
        problems: list[str] = []
        for folder in self.folders():
            problem = check(folder)
            if problem is None:
                return folder, problems
            problems.append(f"{folder}: {problem}")
        return None, problems

    def resolve(self, resume: str) -> tuple[Path | None, list[str]]:
        """``checkpoint.resume`` = auto | none | PATH -> the folder to resume from, or None; why others were not used.

        Raises:
            ConfigError: PATH is not an intact checkpoint.
        """
        if resume == "none":
            return None, []
        if resume == "auto":
            return self.newest_intact()
        folder = Path(resume)
        problem = check(folder)
        if problem is not None:
            raise ConfigError(f"checkpoint.resume = {resume}: {problem}")
        return folder, []

    def folders(self) -> list[Path]:
        """Newest first, damaged ones among them."""
        return sorted(self.root.glob("step-????????"), reverse=True)

    def abandoned_by(self, resume: Path) -> list[Path]:
        """What a run that resumes from ``resume`` leaves behind: damaged folders and those of the branch that it
        leaves. ``auto`` must not find them later, and they must not count as kept."""
        if resume.parent.resolve() != self.root.resolve():
            return self.folders()
        return [folder for folder in self.folders() if folder.name > resume.name]

    def _publish(self, temporary: Path, step: int) -> Path:
        (temporary / "manifest.json").write_bytes(_manifest(step, temporary))
        _sync_tree(temporary)
        target, replaced = self.root / f"step-{step:08d}", self.root / f".replaced-{step:08d}"
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _sync(self.root)
        self._prune(target)
        return target

    def _prune(self, newest: Path) -> None:
        """Keep ``newest`` and the intact ones before it. What claims to be newer is damaged or of another branch
        (``abandoned_by`` has moved them away); it is left to people and takes nobody's place."""
        kept = 1
        for folder in self.folders():
            if folder.name < newest.name:
                if kept < self.keep and check(folder, hashes=False) is None:
                    kept += 1
                else:
                    shutil.rmtree(folder)
        for pattern in (".writing-*", ".replaced-*"):
            for folder in self.root.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)


def check(folder: Path, *, hashes: bool = True) -> str | None:
    """Why ``folder`` is not an intact checkpoint, or None when it is. Without ``hashes`` only the sizes are looked at:
    quick for any model."""
    try:
        files = _read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or (hashes and _sha256(path) != digest):
            return f"{name} does not match its hash"
    return None


def step_of(folder: Path) -> int:
    """Raises ValueError: the manifest is damaged."""
    return int(_read_manifest(folder)["step"])


def _manifest(step: int, folder: Path) -> bytes:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {str(p.relative_to(folder)): [p.stat().st_size, _sha256(p)] for p in paths}
    return _seal({"format": FORMAT, "step": step, "files": files})


def _seal(facts: dict[str, Any]) -> bytes:
    """The one text of ``facts`` with its own hash: any other bytes are damage."""
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps({**facts, "sha256": own}, indent=1, sort_keys=True).encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ValueError: there is none, it is damaged, or it is of another format."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"no manifest.json in {folder} (not a checkpoint, or its writing was interrupted)")
    data = path.read_bytes()
    try:
        facts = json.loads(data)
        facts.pop("sha256", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"manifest.json is damaged: {error}") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"format {facts.get('format')} is not supported here (expected {FORMAT})")
    if data != _seal(facts):
        raise ValueError("manifest.json is damaged: it does not match its own hash")
    return facts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
