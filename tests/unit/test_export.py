"""`cures export`: the model of a checkpoint as a folder of its own."""

import asyncio
import errno
import shutil

import pytest

from actors.commands import export as command
from actors.commands.cli import main
from cures_ray.run.checkpoint import CheckpointStore

MODEL = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}


def checkpoint(run, step, *, model=True):
    async def write(folder):
        (folder / "learner").mkdir()
        (folder / "learner" / "rank-0.safetensors").write_text(f"state {step}")
        if model:
            (folder / "learner" / "model").mkdir()
            for name, text in MODEL.items():
                (folder / "learner" / "model" / name).write_text(f"{text} {step}")

    return asyncio.run(CheckpointStore(run).save(step, write))


def exported(folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_the_newest_intact_checkpoint_of_a_run_or_a_named_one_is_exported(tmp_path, capsys):
    first, second = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "run", 2)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "a")]) == 0
    assert exported(tmp_path / "new" / "a") == {name: f"{text} 2" for name, text in MODEL.items()}
    assert "after step 2" in capsys.readouterr().out
    assert main(["export", str(first), "--out", str(tmp_path / "b")]) == 0
    assert exported(tmp_path / "b")["config.json"] == "{} 1"
    (second / "manifest.json").write_text("{")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "c")]) == 0
    assert exported(tmp_path / "c")["config.json"] == "{} 1"


def test_a_failed_export_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "out" / "model"
    checkpoint(run, 1)
    copy = shutil.copytree

    def full(source, target):
        copy(source, target)
        (target / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command.shutil, "copytree", full)
        assert main(["export", str(run), "--out", str(out)]) == 2
    assert "No space left on device; free space there and repeat" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / ".model.writing").mkdir()  # of a try that was killed
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert exported(out)["model.safetensors"] == "weights 1"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize("case", ["nothing", "damaged", "no model", "taken"])
def test_what_cannot_be_exported_is_explained(case, tmp_path, capsys):
    target = checkpoint(tmp_path / "run", 1, model=case != "no model")
    out, source = tmp_path / "out", tmp_path / "run"
    if case == "nothing":
        source = tmp_path / "elsewhere"
    elif case == "damaged":
        (target / "learner" / "model" / "config.json").write_text("{} 3")
    elif case == "taken":
        out.mkdir()
        (out / "file").write_text("mine")
    assert main(["export", str(source), "--out", str(out)]) == 2
    hints = {"nothing": "no manifest.json", "damaged": "config.json does not match its hash", "no model": "no model"}
    assert hints.get(case, "exists already") in capsys.readouterr().err
    assert case == "taken" or not out.exists()
