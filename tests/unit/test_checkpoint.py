import json

import pytest

from cures_ray.messages import ConfigError
from cures_ray.run.checkpoint import CheckpointStore, check, step_of


async def fill(folder):
    (folder / "learner").mkdir()
    (folder / "learner" / "rank-0.bin").write_bytes(b"weights" * 100)
    (folder / "driver.json").write_text("{}")


async def test_the_newest_intact_checkpoint_is_used(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        await store.save(step, fill)
    assert step_of(store.newest_intact()[0]) == 30
    (tmp_path / "checkpoints/step-00000030/learner/rank-0.bin").write_bytes(b"flipped")
    folder, problems = store.newest_intact()
    assert step_of(folder) == 20
    assert "rank-0.bin does not match its hash" in problems[0]


async def test_an_interrupted_write_is_never_taken_for_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    await store.save(10, fill)

    async def dies(folder):
        await fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await store.save(20, dies)
    assert step_of(store.newest_intact()[0]) == 10
    await store.save(30, fill)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000030"]


async def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        await store.save(step, fill)
    assert [step_of(p) for p in sorted((tmp_path / "checkpoints").iterdir())] == [3, 4]


async def test_resume_takes_auto_none_or_a_path(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.resolve("auto") == (None, [])
    target = await store.save(5, fill)
    assert store.resolve("none") == (None, [])
    assert store.resolve("auto")[0] == store.resolve(str(target))[0] == target
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        store.resolve(str(tmp_path / "elsewhere"))


async def test_a_missing_file_and_a_foreign_format_are_named(tmp_path):
    target = await CheckpointStore(tmp_path).save(5, fill)
    (target / "driver.json").unlink()
    assert check(target) == "driver.json is missing"
    manifest = json.loads((target / "manifest.json").read_text()) | {"format": 99}
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert "format 99 is not supported" in check(target)
