import asyncio
import errno
import json
import threading
from pathlib import Path

import pytest

from cures_ray.messages import CheckpointError, ConfigError
from cures_ray.run import checkpoint
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
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
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


async def test_any_flipped_bit_of_the_manifest_is_damage_and_the_one_before_is_used(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        await store.save(step, fill)
    path = tmp_path / "checkpoints/step-00000020/manifest.json"
    data = path.read_bytes()
    assert len(data) > 200
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        folder, problems = store.newest_intact()
        assert folder.name == "step-00000010" and len(problems) == 1, f"bit {bit}: {flipped!r}"


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '{"format": 2}', '{"format": 2, "files": 1}', "\x00" * 40])
async def test_a_manifest_of_any_other_content_is_damage(text, tmp_path):
    target = await CheckpointStore(tmp_path).save(5, fill)
    (target / "manifest.json").write_text(text)
    assert "manifest.json is damaged" in check(target) or "is not supported" in check(target)


async def test_a_full_disk_leaves_the_checkpoints_before_as_they_were_and_nothing_behind(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    await store.save(10, fill)

    async def full(folder):
        await fill(folder)
        (folder / "learner" / "rank-1.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with pytest.raises(CheckpointError, match="No space left on device; free disk space"):
            await store.save(20, full)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert store.newest_intact()[1] == [] and step_of(store.newest_intact()[0]) == 10
    await store.save(20, fill)
    assert step_of(store.newest_intact()[0]) == 20


async def test_a_disk_that_fills_up_while_the_manifest_is_written_is_a_failed_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    await store.save(10, fill)
    write, calls = Path.write_bytes, []

    def full(path, data):
        if path.name == "manifest.json":
            calls.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space"):
        await store.save(20, fill)
    assert calls and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


async def test_damaged_newer_folders_take_no_place_from_new_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (80, 90):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    for step in (1, 2, 3):
        target = await store.save(step, fill)
        assert check(target) is None, "the new one vanished"
    assert [step_of(p) for p in store.folders() if check(p) is None] == [3, 2]


async def test_a_damaged_older_one_takes_no_place_either(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        await store.save(step, fill)
    (tmp_path / "checkpoints/step-00000002/driver.json").unlink()
    await store.save(3, fill)
    assert [step_of(p) for p in store.folders()] == [3, 1]


async def test_hashing_leaves_the_event_loop_free(tmp_path, monkeypatch):
    hashing, ticked = threading.Event(), threading.Event()
    plain = checkpoint._sha256

    def slow(path):
        hashing.set()
        assert ticked.wait(10), "the event loop stands still while files are hashed"
        return plain(path)

    async def tick():
        while not hashing.is_set():
            await asyncio.sleep(0.001)
        ticked.set()

    monkeypatch.setattr(checkpoint, "_sha256", slow)
    await asyncio.gather(CheckpointStore(tmp_path).save(1, fill), tick())
