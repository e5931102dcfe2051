"""The durable ledger: killed at any byte it comes back as it was."""

import itertools
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from fakes import small_config

from cures_ray.ledger.journal import Journal, JournalError, intact_bytes, read
from cures_ray.ledger.ledger import Ledger, begin_session, generations, journal_path
from cures_ray.messages import CommitReport, Discard, Settlement

IDS = np.arange(1, 65, dtype=np.uint64)


def open_ledger(folder, session="a", **sections) -> Ledger:
    sections = {"async_rl": {"max_staleness": 0}, "trainer": {"steps": 50}, **sections}
    return Ledger(folder, small_config(**sections), IDS, (np.arange(64) % 4).astype(float), session=session)


def settlement(lease, rewards=None, **changes) -> Settlement:
    """A chunk of one lease."""
    rng = np.random.default_rng(lease.seed)
    rewards = (rng.random(lease.n) < 0.5).astype(np.float32) if rewards is None else np.asarray(rewards, np.float32)
    values = {
        "lease_id": np.array([lease.lease_id]),
        "attempt": np.array([lease.attempt]),
        "n": np.array([lease.n]),
        "failed": np.zeros(1, bool),
        "rewards": rewards,
        "fault": np.zeros(lease.n, bool),
        "completion_tokens": rng.integers(1, 9, lease.n).astype(np.int32),
        "min_version": np.full(lease.n, lease.batch, np.int32),
        "generate_seconds": rng.random(1),
        "verify_seconds": rng.random(1) / 7,
    }
    return Settlement(**values | changes)


CALLS = itertools.count()


def take(ledger: Ledger, worker: str, version: int) -> list:
    leases = []
    while more := ledger.lease(worker, 64, version, call=next(CALLS)):
        leases += more
    return leases


def work(ledger: Ledger, steps: int, *, start: int = 0, forget: int = 0) -> None:
    """``steps`` batches: lease, settle in random order, some given back, commit. ``forget``: leases left open."""
    rng = np.random.default_rng(start)
    for step in range(start, start + steps):
        while ledger.plan(step) is None:
            leases = take(ledger, "g0", step)
            back = leases[: len(leases) // 4]
            ledger.give_back([(lease.lease_id, lease.attempt) for lease in back], Discard.LOST)
            leases = leases[len(back) :] + take(ledger, "g1", step)
            for i in rng.permutation(len(leases)):
                ledger.settle(settlement(leases[i]))
        trained = {e.lease.lease_id: int(e.keep.sum()) for e in ledger.plan(step).entries}
        ledger.commit(CommitReport(batch=step, trained=trained, discarded={}))
    if forget:
        for lease in take(ledger, "g0", start + steps)[forget:]:
            ledger.settle(settlement(lease))


def state(ledger: Ledger, folder: Path) -> dict[str, bytes]:
    """Everything that the curriculum is, byte for byte."""
    ledger.save(folder)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def copy_cut(source: Path, target: Path, size: int) -> None:
    """The ledger folder as it was when the newest journal had ``size`` bytes."""
    shutil.copytree(source, target)
    path = journal_path(target, max(generations(target)))
    path.write_bytes(path.read_bytes()[:size])


CONFIGS = {
    "cures": {},
    "predictor": {"curriculum": {"prior_from": "predictor", "allocation": "cost_aware"}},
    "epochs": {"curriculum": {"method": "uniform", "draw": "epoch"}},
    "reset": {"curriculum": {"belief": "reset", "pilot_rollouts": 2, "subsets": 2, "subset_steps": 2}},
    "thompson": {"curriculum": {"belief_draw": "thompson"}},
    "mopps": {"curriculum": {"method": "mopps"}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_ledger_comes_back_with_the_same_counts_random_state_and_open_leases(name, tmp_path):
    config = CONFIGS[name]
    ledger = open_ledger(tmp_path / "ledger", **config)
    work(ledger, 3, forget=5)
    back = open_ledger(tmp_path / "ledger", **config)  # the first one is as good as dead
    assert back.recovered > 0
    assert sorted(back.curriculum.leased_keys()) == sorted(ledger.curriculum.leased_keys())
    assert state(back, tmp_path / "b") == state(ledger, tmp_path / "a")
    for one in (ledger, back):
        one._journal.close()
        one.folder = tmp_path / f"elsewhere-{id(one)}"
        one.folder.mkdir()
        one._journal = Journal(one.folder / "j", {})
        for lease_id, attempt in sorted(one.curriculum.leased_keys()):
            one.settle(settlement(one.curriculum.leased(lease_id, attempt)))
        work(one, 3, start=3)
    assert state(back, tmp_path / "d") == state(ledger, tmp_path / "c"), "it draws differently from here on"


def test_a_journal_cut_at_any_byte_gives_the_state_after_the_last_whole_record(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    work(ledger, 2, forget=3)
    path = journal_path(tmp_path / "ledger", 0)
    whole = path.read_bytes()
    ends = [offset for offset, _ in read(path)]
    rng = np.random.default_rng(0)
    cuts = sorted({ends[0], ends[0] - 1, ends[0] + 1, len(whole) - 1, *rng.integers(ends[0], len(whole), 25).tolist()})
    for cut in cuts:
        copy_cut(tmp_path / "ledger", tmp_path / f"cut-{cut}", cut)
        back = open_ledger(tmp_path / f"cut-{cut}")
        assert back.recovered == sum(end <= cut for end in ends)
        back.curriculum.accounting.check()
        size = journal_path(tmp_path / f"cut-{cut}", 0).stat().st_size
        assert size == max([e for e in ends if e <= cut], default=whole.index(b"\n") + 1)
        history = (tmp_path / f"cut-{cut}" / "history.jsonl").read_text().splitlines()
        assert len(history) == back.curriculum.committed


def test_damage_in_the_middle_is_refused_with_its_offset(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    work(ledger, 1)
    path = journal_path(tmp_path / "ledger", 0)
    ends = [offset for offset, _ in read(path)]
    data = bytearray(path.read_bytes())
    data[ends[2] + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalError, match=f"damaged at byte {ends[2]}"):
        open_ledger(tmp_path / "ledger")


def test_a_journal_of_another_format_is_refused(tmp_path):
    open_ledger(tmp_path / "ledger").close()
    path = journal_path(tmp_path / "ledger", 0)
    path.write_bytes(path.read_bytes().replace(b"journal 2 ", b"journal 9 "))
    with pytest.raises(JournalError, match="format 9"):
        open_ledger(tmp_path / "ledger")


def test_a_lease_call_whose_answer_was_lost_gets_the_same_leases_again(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    first = ledger.lease("g0", 16, 0, call=7)
    assert ledger.lease("g0", 16, 0, call=7) == first
    back = open_ledger(tmp_path / "ledger")
    assert back.lease("g0", 16, 0, call=7) == first
    back.settle(settlement(first[0]))
    assert back.lease("g0", 16, 0, call=7) == first[1:], "what is settled is not handed out again"
    assert not {x.lease_id for x in back.lease("g0", 16, 0, call=8)} & {x.lease_id for x in first}


def test_repeated_and_late_calls_change_nothing_and_are_not_journalled(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    lease, other, *_ = ledger.lease("g0", 64, 0, call=0)
    ledger.give_back([(other.lease_id, 0)], Discard.LOST)
    assert ledger.settle(settlement(lease)).accepted
    size = ledger.journal_bytes
    assert not ledger.settle(settlement(lease)).accepted
    assert not ledger.settle(settlement(other)).accepted, "its lease was given back"
    ledger.give_back([(other.lease_id, 0)], Discard.LOST)
    assert ledger.journal_bytes == size


def test_the_folder_stays_small_and_old_generations_go(tmp_path):
    sections = {"curriculum": {"snapshot_every": 3}}
    ledger = open_ledger(tmp_path / "ledger", **sections)
    work(ledger, 10, forget=2)
    assert generations(tmp_path / "ledger") == [2, 3]
    assert sorted(p.name for p in (tmp_path / "ledger").glob("snapshot-*")) == ["snapshot-000002", "snapshot-000003"]
    back = open_ledger(tmp_path / "ledger", **sections)
    assert state(back, tmp_path / "b") == state(ledger, tmp_path / "a")
    assert len((tmp_path / "ledger" / "history.jsonl").read_text().splitlines()) == 10


def test_a_crash_while_compacting_leaves_the_generation_before(tmp_path):
    sections = {"curriculum": {"snapshot_every": 3}}
    ledger = open_ledger(tmp_path / "ledger", **sections)
    work(ledger, 4)
    expected = state(ledger, tmp_path / "a")
    (tmp_path / "ledger" / "snapshot-000002").mkdir()  # written, but its journal was never begun
    (tmp_path / "ledger" / "snapshot-000002" / "state.safetensors").write_text("{")
    back = open_ledger(tmp_path / "ledger", **sections)
    assert state(back, tmp_path / "b") == expected
    work(back, 3, start=5)
    assert max(generations(tmp_path / "ledger")) == 2


def test_another_session_begins_anew_or_from_a_checkpoint_with_open_leases_returned(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    work(ledger, 2, forget=4)
    ledger.save(tmp_path / "checkpoint")
    take(ledger, "g0", 2)
    anew = open_ledger(tmp_path / "ledger", session="b")
    assert anew.curriculum.accounting.planned == 0 and anew.curriculum.committed == 0
    resumed = Ledger(
        tmp_path / "ledger",
        small_config(async_rl={"max_staleness": 0}, trainer={"steps": 50}),
        IDS,
        (np.arange(64) % 4).astype(float),
        session="c",
        checkpoint=tmp_path / "checkpoint",
    )
    assert resumed.curriculum.committed == 2 and not resumed.curriculum.leased_keys()
    resumed.curriculum.accounting.check()
    assert resumed.curriculum.accounting.discarded[Discard.INTERRUPTED] > 0


def test_rewards_that_are_no_numbers_are_faults_also_after_a_recovery(tmp_path):
    ledger = open_ledger(tmp_path / "ledger")
    lease = ledger.lease("g0", 64, 0)[0]
    rewards = np.full(lease.n, 0.25)
    rewards[0] = np.nan
    ledger.settle(settlement(lease, rewards))
    back = open_ledger(tmp_path / "ledger")
    assert state(back, tmp_path / "b") == state(ledger, tmp_path / "a")
    tracked = back.curriculum._tracked[lease.lease_id][1]
    assert not tracked.valid[0] and tracked.valid[1:].all() and np.all(tracked.rewards[1:] == 0.25)


def test_a_last_record_with_a_wrong_checksum_is_cut_off(tmp_path):
    journal = Journal(tmp_path / "j.log", {"session": "x"})
    journal.append(["a", 1])
    journal.append(["b", 2])
    end = intact_bytes(tmp_path / "j.log")
    text = json.dumps(["c", 3]).encode()
    with (tmp_path / "j.log").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text) ^ 1, text))
    again = Journal(tmp_path / "j.log")
    again.append(["d", 4])
    assert (tmp_path / "j.log").stat().st_size > end
    assert [record for _, record in read(tmp_path / "j.log")] == [["a", 1], ["b", 2], ["d", 4]]


def test_a_ledger_that_comes_back_after_a_newer_start_refuses_to_write(tmp_path):
    folder = tmp_path / "ledger"
    begin_session(folder, "a")
    old = open_ledger(folder, session="a", curriculum={"snapshot_every": 1})
    work(old, 1, forget=2)
    begin_session(folder, "b")
    new = open_ledger(folder, session="b", curriculum={"snapshot_every": 1})
    work(new, 2)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(JournalError, match=r"belongs to a newer start of the run \(session b\)"):
        open_ledger(folder, session="a")  # as Ray restarts it
    for lease_id, attempt in old.curriculum.leased_keys():  # and one that was never gone
        old.settle(settlement(old.curriculum.leased(lease_id, attempt)))
    with pytest.raises(JournalError, match="writes nothing more"):
        work(old, 1, start=1)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert open_ledger(folder, session="b").curriculum.committed == 2
