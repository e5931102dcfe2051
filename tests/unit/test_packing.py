"""Rows to ranks and micro-batches."""

import numpy as np
import pytest

from cures_ray.learning.packing import Row, collate, pack

TOKENS = np.random.default_rng(0).integers(5, 200, size=157)


def balance(plan: list[list[np.ndarray]]) -> float:
    """Tokens of the mean rank / tokens of the busiest."""
    loads = [sum(int(TOKENS[rows].sum()) for rows in rank) for rank in plan]
    return float(np.mean(loads) / max(loads))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_is_computed_exactly_once_within_the_padded_budget(ranks):
    plan = pack(TOKENS, ranks, 1024)
    rows = np.concatenate([b for rank in plan for b in rank])
    assert sorted(rows) == list(range(len(TOKENS)))
    assert all(len(b) * TOKENS[b].max() <= 1024 for rank in plan for b in rank if len(b))


def test_all_ranks_have_the_same_number_of_micro_batches():
    plan = pack(np.array([100, 1, 1, 1]), 2, 100)
    assert len({len(rank) for rank in plan}) == 1
    assert pack(np.array([10]), 3, 100)[2][0].tolist() == []


def test_the_plan_is_deterministic_and_balanced():
    assert balance(pack(TOKENS, 2, 512)) > 0.99
    again = pack(TOKENS.copy(), 2, 512)
    for a, b in zip(pack(TOKENS, 2, 512), again, strict=True):
        assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_rows_that_belong_together_share_a_rank():
    lease = np.arange(len(TOKENS)) // 7 * 13
    plan = pack(TOKENS, 3, 512, together=lease)
    homes = [set(lease[np.concatenate(rank)]) for rank in plan]
    assert sum(len(h) for h in homes) == len(set(lease))
    assert balance(plan) > 0.8


def test_a_row_longer_than_the_budget_goes_alone():
    plan = pack(np.array([50, 300, 40]), 1, 100)
    assert [b.tolist() for b in plan[0]] == [[1], [0, 2]]


def test_an_empty_batch_still_has_one_dummy_a_rank():
    assert [len(rank) for rank in pack(np.zeros(0, int), 2, 100)] == [1, 1]
    dummy = collate([])
    assert dummy.weight.tolist() == [0.0] and dummy.tokens == 0


def test_collate_points_each_completion_token_at_the_position_that_predicts_it():
    rows = [
        Row(1, np.array([5, 6, 7]), np.array([8, 9]), np.array([-0.1, -0.2]), 1.0, 0.5, 0.01),
        Row(1, np.array([5]), np.array([4, 3, 2]), np.array([-1.0, -2, -3]), 0.0, -0.5, 0.02),
    ]
    batch = collate(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 4, 3, 2, 0]]
    assert batch.position.tolist() == [2, 3, 0, 1, 2] and batch.row.tolist() == [0, 0, 1, 1, 1]
    assert (batch.input_ids[batch.row, batch.position + 1] == batch.target).all()
    assert batch.advantage.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5]
    assert batch.tokens == 9
