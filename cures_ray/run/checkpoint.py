"""Atomic checkpoints: a temporary folder, a manifest with hashes, one rename.

    RUN/checkpoints/step-00000050/
        manifest.json       {"format": 1, "step": 50, "files": {"learner/rank-0.safetensors": sha256, ...}}
        learner/ ledger/    written by their owners through the ``write`` callback
        driver.json         step, evaluation history

A folder without a manifest, or whose files do not match it, is not a checkpoint: the newest intact one is
used, and the broken ones are named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from cures_ray.messages import ConfigError

FORMAT = 1


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.root, self.keep = run_dir / "checkpoints", keep

    async def save(self, step: int, write: Callable[[Path], Awaitable[None]]) -> Path:
        """Let ``write`` fill a temporary folder, then publish it as the checkpoint of ``step``."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.root / f".writing-{step:08d}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        await write(temporary)
        manifest = {"format": FORMAT, "step": step, "files": _hashes(temporary)}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync_tree(temporary)
        target = self.root / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync_folder(self.root)
        self._prune()
        return target

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that passes its manifest, and why newer ones were passed over."""
        problems: list[str] = []
        for folder in sorted(self.root.glob("step-*"), reverse=True):
            problem = check(folder)
            if problem is None:
                return folder, problems
            problems.append(f"{folder}: {problem}")
        return None, problems

    def resolve(self, resume: str) -> tuple[Path | None, list[str]]:
        """``checkpoint.resume`` = auto | none | PATH -> the folder to resume from, or None.

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

    def _prune(self) -> None:
        for folder in sorted(self.root.glob("step-*"))[: -self.keep]:
            shutil.rmtree(folder)
        for folder in self.root.glob(".writing-*"):
            shutil.rmtree(folder, ignore_errors=True)


def check(folder: Path) -> str | None:
    """Why ``folder`` is not an intact checkpoint, or None when it is."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        return f"no manifest.json in {folder} (not a checkpoint, or its writing was interrupted)"
    try:
        manifest = json.loads(manifest_path.read_text())
    except json.JSONDecodeError as error:
        return f"manifest.json cannot be parsed: {error}"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')} is not supported here (expected {FORMAT})"
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not match its hash"
    return None


def step_of(folder: Path) -> int:
    return int(json.loads((folder / "manifest.json").read_text())["step"])


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
