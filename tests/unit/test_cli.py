"""Bad input ends in one clear message and exit code 2, before any actor starts."""

import subprocess
import sys

import pytest

from actors.commands import cli


def run(capsys, *argv) -> tuple[int, str]:
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_help_answers_at_once_and_names_every_command():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "actors.commands.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "prepare", "eval", "ledger", "bench", "doctor"))
    assert "import vllm" not in done.stderr and "| torch" not in done.stderr


def test_a_missing_configuration_file_is_named(capsys, tmp_path):
    code, text = run(capsys, "train", str(tmp_path / "absent.yaml"))
    assert code == 2 and "absent.yaml" in text and "not found" in text


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["model.path=", "data.train=x.jsonl"], "model.path is not set"),
        (["model.path=/nowhere/model"], "/nowhere/model"),
        (["rollout.n=8"], "curriculum.rollouts_per_step"),
        (["curriculum.prompts_per_step=1000"], "1000 x 1"),
        (["checkpoint.dir=/proc/nothing"], "/proc/nothing"),
        (["curriculum.method=curse"], "curriculum.method"),
    ],
)
def test_bad_settings_are_explained(capsys, overrides, hint, tmp_path):
    settings = ["model.path=m", "data.train=x.jsonl", f"checkpoint.dir={tmp_path / 'run'}", *overrides]
    code, text = run(capsys, "train", "configs/demo.yaml", *settings)
    assert code == 2 and hint in text and "Traceback" not in text


def test_a_dry_run_shows_configuration_batch_and_placement(capsys):
    code, text = run(capsys, "train", "configs/demo.yaml", "--dry-run", "--no-data", "ray.num_cpus=8")
    assert code == 0
    assert all(part in text for part in ("# configuration", "prompts per step (m)", "wanted in all", "fits"))


def test_a_dry_run_refuses_what_does_not_fit(capsys):
    code, text = run(
        capsys, "train", "configs/demo.yaml", "--dry-run", "--no-data", "ray.num_cpus=2", "rollout.num_generators=40"
    )
    assert code == 2 and "available in all" in text


@pytest.mark.parametrize("given", [["rollout.no_such_key=1"], ["--set", "rollout.no_such_key=1"]])
def test_eval_takes_settings_with_and_without_set(given, capsys):
    code, text = run(capsys, "eval", "MODEL", "--data", "F.jsonl", *given)
    assert code == 2 and "unknown key rollout.no_such_key" in text
