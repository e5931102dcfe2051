import json

import pytest
from fakes import small_config

from cures_ray.messages import ConfigError
from cures_ray.run.folder import changed_settings
from cures_ray.run.folder import claim as lock_and_check


def config(folder, **checkpoint):
    return small_config(
        model={"path": "m"}, data={"train": "d"}, checkpoint={"dir": str(folder), "interval": 0, **checkpoint}
    )


def claim(folder, config):
    """As the start of a run that ends at once: (checkpoint to resume, remarks)."""
    claimed = lock_and_check(folder, config)
    claimed.begin()
    claimed.lock.release()
    return claimed.resume, claimed.notes


STEP = '{"step": 1, "rollout/reward": 0.5}\n'


def begun(folder) -> None:
    """A run that trained a step."""
    claim(folder, config(folder))
    (folder / "metrics.jsonl").write_text(STEP)


def test_a_fresh_folder_is_claimed_and_says_what_runs_in_it(tmp_path):
    assert claim(tmp_path / "run", config(tmp_path / "run")) == (None, [])
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["identity"]["model.path"] == "m" and record["config"]["trainer"]["steps"] == 6


def test_a_folder_that_holds_another_run_is_refused_and_says_what_differs(tmp_path):
    begun(tmp_path)
    other = small_config(model={"path": "other"}, data={"train": "d"}, checkpoint={"dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.path: m there, other here"):
        claim(tmp_path, other)


def test_a_run_is_never_overwritten_without_resume(tmp_path):
    begun(tmp_path)
    with pytest.raises(ConfigError, match="holds a run already"):
        claim(tmp_path, config(tmp_path, resume="none"))


def test_a_folder_with_files_of_an_unknown_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(STEP)
    with pytest.raises(ConfigError, match="unknown run"):
        claim(tmp_path, config(tmp_path))


def test_a_file_in_the_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        claim(tmp_path / "run", config(tmp_path / "run"))


def test_a_run_that_died_before_its_first_checkpoint_starts_over_and_keeps_its_logs(tmp_path):
    claim(tmp_path, config(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "ledger").mkdir()
    assert claim(tmp_path, config(tmp_path))[0] is None
    assert not (tmp_path / "ledger").exists()
    assert sorted(p.name for p in (tmp_path / "abandoned-1").iterdir()) == ["ledger", "metrics.jsonl"]


def test_a_try_that_trained_nothing_leaves_the_folder_free_for_other_settings(tmp_path):
    claim(tmp_path, config(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "note": "all actors are up"}\n')
    other = small_config(model={"path": "other"}, data={"train": "d"}, checkpoint={"dir": str(tmp_path)})
    assert claim(tmp_path, other)[0] is None
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["model.path"] == "other"
    assert (tmp_path / "abandoned-1" / "metrics.jsonl").exists()


def test_a_resumed_run_says_which_settings_changed(tmp_path):
    record = json.loads(json.dumps(config(tmp_path).model_dump(mode="json")))
    assert changed_settings(record, config(tmp_path).model_dump(mode="json")) == []
    other = small_config(learner={"lr": 0.5}, checkpoint={"dir": str(tmp_path), "interval": 0})
    assert "resumed with another learner.lr: 1e-06 before, 0.5 now" in changed_settings(record, other.model_dump())
