"""Output-layer statistics against per-sample autograd on the output layer's weight."""

import pytest
import torch

from cures_ray.learning import gradient_norms
from cures_ray.learning.gradient_norms import LastLayerStatistics
from cures_ray.learning.losses import SampledLogprobs

torch.set_num_threads(1)

LEASES = [3, 3, 5, 3, 5, 9, 3]
PLUS = [True, False, True, True, True, False, False]
LENGTHS = [5, 9, 1, 3, 12, 4, 7]


def rollouts(vocabulary, d=16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, d, generator=generator) / d**0.5
    hidden = [torch.randn(n, d, generator=generator) for n in LENGTHS]
    target = [torch.randint(0, vocabulary, (n,), generator=generator) for n in LENGTHS]
    return weight, hidden, target


def measured(weight, hidden, target, order, temperature):
    """Statistics with the rollouts in micro-batches of the given numbers."""
    statistics = LastLayerStatistics(temperature)
    for numbers in order:
        h, t = torch.cat([hidden[i] for i in numbers]), torch.cat([target[i] for i in numbers])
        row = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor([LENGTHS[i] for i in numbers]))
        probs = SampledLogprobs.apply(h @ weight.T, t, temperature)[2]
        residual = statistics.residual(probs, t, h.shape[1])
        statistics.add(h, residual, row, [LEASES[i] for i in numbers], [PLUS[i] for i in numbers])
    return {s.lease_id: s for s in statistics.result()}


def scores(weight, hidden, target, temperature):
    """Per-sample autograd: the gradient of each rollout's log-probability with respect to the weight."""
    weight = weight.double().requires_grad_()
    result = []
    for h, t in zip(hidden, target, strict=True):
        logprobs = torch.log_softmax(h.double() @ weight.T / temperature, 1).gather(1, t[:, None]).sum()
        result.append(torch.autograd.grad(logprobs, weight)[0])
    return result


def expected(s, lease):
    plus = [x for x, owner, p in zip(s, LEASES, PLUS, strict=True) if owner == lease and p]
    minus = [x for x, owner, p in zip(s, LEASES, PLUS, strict=True) if owner == lease and not p]
    up, down = (sum(x, torch.zeros_like(s[0])) for x in (plus, minus))
    return {
        "n_plus": len(plus),
        "n_minus": len(minus),
        "sum_sq_plus": float(sum((x**2).sum() for x in plus)),
        "sum_sq_minus": float(sum((x**2).sum() for x in minus)),
        "sq_sum_plus": float((up**2).sum()),
        "sq_sum_minus": float((down**2).sum()),
        "dot": float((up * down).sum()),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("order", [[range(7)], [[6, 4, 0], [1, 5], [3, 2]]], ids=["one", "split"])
def test_statistics_equal_per_sample_autograd_however_leases_are_split(temperature, order):
    weight, hidden, target = rollouts(50)
    result = measured(weight, hidden, target, order, temperature)
    s = scores(weight, hidden, target, temperature)
    assert sorted(result) == [3, 5, 9]
    for lease, one in result.items():
        for name, value in expected(s, lease).items():
            assert getattr(one, name) == pytest.approx(value, rel=1e-4, abs=1e-9), (lease, name)


def test_the_gradient_is_that_of_the_training_loss_through_the_output_layer():
    weight, hidden, target = rollouts(50)
    weight.requires_grad_()
    logprobs = SampledLogprobs.apply(hidden[1] @ weight.T, target[1], 0.7)[0]
    (grad,) = torch.autograd.grad(logprobs.sum(), weight)
    s = scores(weight.detach(), hidden, target, 0.7)
    assert torch.allclose(grad.double(), s[1], rtol=1e-4, atol=1e-6)


def test_a_large_vocabulary_is_sketched_without_bias(monkeypatch):
    monkeypatch.setattr(gradient_norms, "MAX_CLASS_ENTRIES", 16 * 256)
    weight, hidden, target = rollouts(5003)
    s = scores(weight, hidden, target, 1.0)
    exact = expected(s, 3)
    runs = []
    for seed in range(40):
        monkeypatch.setattr(LastLayerStatistics.__init__, "__defaults__", (1.0, seed))
        one = measured(weight, hidden, target, [range(7)], 1.0)[3]
        runs.append([one.sum_sq_plus / exact["sum_sq_plus"], one.sq_sum_minus / exact["sq_sum_minus"]])
    values = torch.tensor(runs)
    assert (values.std(0) < 0.2).all()
    assert ((values.mean(0) - 1).abs() < 4 * values.std(0) / 40**0.5 + 0.01).all()


def test_no_rollouts_no_statistics():
    assert LastLayerStatistics().result() == ()
