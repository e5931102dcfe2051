"""Learner checkpoints across numbers of ranks: the cuts that DeepSpeed makes, made again."""

from types import SimpleNamespace

import pytest
import torch

from actors.deepspeed_engine import _slice


def cut(values: torch.Tensor, ranks: int, padding: int = 0) -> list[torch.Tensor]:
    """``ranks`` even cuts of ``values``, padded to a multiple of them and ``padding`` more a rank."""
    length = -(-len(values) // ranks) + padding
    return list(torch.nn.functional.pad(values, (0, length * ranks - len(values)), value=-1.0).split(length))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2), (3, 5)])
def test_shards_of_other_ranks_are_cut_again_without_their_padding(before, after):
    sizes = [7, 10, 1, 24]
    tensors = [torch.arange(n, dtype=torch.float32) + 100 * n for n in sizes]
    by_parameter = [torch.cat(part) for part in zip(*(cut(t, before) for t in tensors), strict=True)]  # ZeRO 3
    whole = torch.cat(tensors)
    as_group = cut(whole, before, padding=2)  # ZeRO 1 and 2 align a group
    for rank in range(after):
        engine = SimpleNamespace(rank=rank, ranks=after)
        expected = torch.cat([cut(t, after)[rank].clamp(min=0) for t in tensors])
        assert torch.equal(_slice(by_parameter, torch.zeros_like(expected), sizes, engine), expected)
        expected = cut(whole, after, padding=1)[rank].clamp(min=0)
        assert torch.equal(_slice(as_group, torch.zeros_like(expected), [sum(sizes)], engine), expected)


def test_shards_of_another_model_fit_nowhere_and_a_step_count_is_everybodys():
    engine = SimpleNamespace(rank=0, ranks=1)
    parts = [torch.ones(9), torch.ones(9)]
    assert len(_slice(parts, torch.zeros(10), [3, 7], engine)) == 0
    assert _slice([torch.tensor(5.0)] * 2, torch.zeros(10), [3, 7], engine) == 5
