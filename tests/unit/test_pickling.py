"""Messages survive a pickle, whatever is in them."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
from test_assemble import entry, group, run

from cures_ray.messages import BatchPlan, Discard, LeaseChunk, TrainingBatch, VerdictChunk


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(type(a) is type(b) and a == b)


ENTRIES = (
    entry(1, [1, 0, 1]),
    entry(2, [0], prompt="b", keep=[False], reason=Discard.PILOT),
    entry(3, [], prompt="c"),
)
PLAN = BatchPlan(batch=3, prompts=2, entries=ENTRIES, metrics={"tau": 0.5})
BATCH, _ = run(ENTRIES, {1: group(1, 3), 2: group(2, 1)})


@pytest.mark.parametrize(
    "message",
    [
        PLAN,
        BatchPlan(batch=0, prompts=1, entries=(), metrics={}),
        BATCH,
        TrainingBatch(step=1, groups=()),
        LeaseChunk.of([e.lease for e in ENTRIES]),
        VerdictChunk.of([]),
        ENTRIES[0].lease,
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_message_comes_back_as_it_was(message):
    back = pickle.loads(pickle.dumps(message, protocol=5))
    assert same(message, back)
    with pytest.raises(AttributeError):  # and is frozen
        setattr(back, fields(back)[0].name, 1)


def test_a_batch_is_sent_by_column_and_not_lease_by_lease():
    many = BatchPlan(batch=0, prompts=1, entries=ENTRIES[:1] * 1000, metrics={})
    assert len(pickle.dumps(many, protocol=5)) < 150 * 1000
    assert same(many, pickle.loads(pickle.dumps(many, protocol=5)))
