"""Policy losses: gradients, corrections, masks, and independence of how tokens are split."""

import math

import pytest
import torch

from cures_ray.config import AlgoConfig
from cures_ray.learning.losses import (
    LOSSES,
    LossInputs,
    SampledLogprobs,
    k3,
    mean_metrics,
    policy_loss,
    token_advantages,
    whitened,
)

torch.set_num_threads(1)


def inputs(theta=None, behaviour=None, prox=None, reference=None, advantages=None, weights=None, row=None):
    generator = torch.Generator().manual_seed(0)
    n = 12 if theta is None else len(theta)
    noise = [torch.randn(n, generator=generator) for _ in range(3)]
    base = -1 - noise[0].abs()
    row = torch.arange(n) // 4 if row is None else row
    return LossInputs(
        logprobs=(base if theta is None else torch.as_tensor(theta)).clone().requires_grad_(),
        behaviour=base + 0.3 * noise[1] if behaviour is None else torch.as_tensor(behaviour),
        prox=None if prox is None else torch.as_tensor(prox),
        reference=reference,
        advantages=noise[2] if advantages is None else torch.as_tensor(advantages),
        weights=torch.linspace(0.01, 0.1, n) if weights is None else torch.as_tensor(weights),
        row=row,
        rollouts=int(row.max()) + 1,
    )


def gradient(x, **algo):
    loss, sums = policy_loss(x, AlgoConfig(**algo))
    (grad,) = torch.autograd.grad(loss, x.logprobs)
    return grad, loss.detach(), sums


def test_on_policy_every_loss_has_the_policy_gradient():
    base = inputs()
    x = inputs(behaviour=base.logprobs.detach())
    for loss in LOSSES:
        grad, *_ = gradient(x, loss=loss)
        if loss == "gspo":  # the sequence ratio spreads a rollout's weight evenly over its tokens
            for r in range(3):
                rows = x.row == r
                mean = (x.weights * x.advantages)[rows].sum() / rows.sum()
                assert torch.allclose(grad[rows], -mean.expand(4), atol=1e-6)
        else:
            assert torch.allclose(grad, -x.weights * x.advantages, atol=1e-6), loss


def test_the_loss_is_a_sum_so_splitting_the_tokens_changes_nothing():
    for loss in LOSSES:
        x = inputs()
        whole, value, _ = gradient(x, loss=loss, kl_coef=0.0)
        parts, values = [], []
        for rows in (x.row == 0, x.row > 0):
            part = LossInputs(
                logprobs=x.logprobs.detach()[rows].requires_grad_(),
                behaviour=x.behaviour[rows],
                prox=None,
                reference=None,
                advantages=x.advantages[rows],
                weights=x.weights[rows],
                row=x.row[rows] - x.row[rows].min(),
                rollouts=int(x.row[rows].max() - x.row[rows].min()) + 1,
            )
            grad, own, _ = gradient(part, loss=loss)
            parts.append(grad)
            values.append(own)
        assert torch.allclose(torch.cat(parts), whole, atol=1e-7), loss
        assert sum(values) == pytest.approx(float(value), abs=1e-6)


def test_clip_stops_the_gradient_only_where_it_would_leave_the_trust_region_further():
    x = inputs(theta=[0.0, 0, 0, 0], behaviour=[-0.5, -0.5, 0.5, 0.5], advantages=[1.0, -1, 1, -1], weights=[1.0] * 4)
    grad, _, sums = gradient(x, loss="clip")
    assert grad.tolist() == pytest.approx([0, math.exp(0.5), -math.exp(-0.5), 0])
    assert sums["clipped"] == 2


def test_clip_higher_moves_only_the_upper_bound():
    x = inputs(theta=[0.0], behaviour=[-math.log(1.25)], advantages=[1.0], weights=[1.0])
    assert gradient(x, loss="clip")[0] == 0
    assert gradient(x, loss="clip", clip_eps_high=0.28)[0] == pytest.approx(-1.25)


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_a_loss_whose_ratio_is_the_correction_takes_no_is_correction(loss):
    with pytest.raises(ValueError, match="is_correction has no effect with loss"):
        gradient(inputs(), loss=loss, is_correction="mis")


def test_decoupled_clips_around_prox_and_corrects_for_the_sampler_once():
    x = inputs(theta=[-1.0, -1], prox=[-1.1, -2], behaviour=[-1.5, -2.1], advantages=[1.0, 1], weights=[1.0, 1])
    grad, _, sums = gradient(x, loss="decoupled", is_correction="tis", is_cap=3)
    # token 0: ratio e^.1 inside the clip, correction e^.4; token 1: ratio e clipped away
    assert grad.tolist() == pytest.approx([-math.exp(0.4) * math.exp(0.1), 0])
    assert float(sums["max_ratio"]) == pytest.approx(math.exp(1.1))


def test_tis_truncates_and_mis_masks_and_both_keep_the_denominator():
    theta, behaviour = [-1.0, -1, -1], [-3.0, -1.5, 0.5]
    x = inputs(theta, behaviour, advantages=[1.0] * 3, weights=[1.0] * 3)
    for loss in ("decoupled", "reinforce"):
        tis, *_ = gradient(x, loss=loss, is_correction="tis", is_cap=2)
        mis, _, sums = gradient(x, loss=loss, is_correction="mis", is_cap=2)
        assert tis.tolist() == pytest.approx([-2, -math.exp(0.5), -math.exp(-1.5)])
        assert mis.tolist() == pytest.approx([0, -math.exp(0.5), 0])
        assert sums["clipped"] == 2
    assert gradient(x, loss="reinforce", is_correction="none")[0].tolist() == pytest.approx([-1] * 3)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    x = inputs([-1.0], [-3.0], advantages=[1.0], weights=[1.0])
    assert gradient(x, loss="cispo")[0] == pytest.approx(-1.2)


def test_gspo_clips_whole_rollouts():
    x = inputs([0.0] * 4, [-0.6, 0, 0, 0], advantages=[1.0] * 4, weights=[1.0] * 4, row=torch.tensor([0, 0, 1, 1]))
    grad, _, sums = gradient(x, loss="gspo")
    assert grad.tolist() == pytest.approx([0, 0, -1, -1]) and sums["clipped"] == 2


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    p = torch.tensor([-1.0, -2, -3])
    assert k3(p, p).tolist() == [0, 0, 0]
    assert (k3(p, p - 0.5) > 0).all() and (k3(p, p + 0.5) > 0).all()


def test_kl_enters_the_loss_with_the_token_weights_unless_it_is_in_the_reward():
    x = inputs(reference=inputs().behaviour)
    plain, with_kl = gradient(x)[1], gradient(x, kl_coef=0.5)[1]
    expected = 0.5 * (x.weights * k3(x.logprobs, x.reference)).sum()
    assert float(with_kl - plain) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert gradient(x, kl_coef=0.5, kl_in_reward=True)[1] == plain


def test_kl_in_the_reward_is_a_reward_to_go_within_each_rollout():
    kl = torch.tensor([1.0, 2, 4, 10, 20])
    row, position = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([5, 6, 7, 2, 3])
    result = token_advantages(torch.tensor([1.0, 1, 1, 0, 0]), kl, row, position, 0.1)
    assert result.tolist() == pytest.approx([1 - 0.7, 1 - 0.6, 1 - 0.4, -3, -2])
    with pytest.raises(ValueError, match="ordered"):
        token_advantages(torch.zeros(2), torch.zeros(2), torch.tensor([0, 0]), torch.tensor([1, 0]), 0.1)


def test_whitening_uses_the_sums_of_the_global_batch():
    whole = torch.randn(50, generator=torch.Generator().manual_seed(1))
    sums = torch.tensor([50.0, whole.double().sum(), (whole.double() ** 2).sum()], dtype=torch.float64)
    result = torch.cat([whitened(part, sums, 0.0) for part in whole.split(20)])
    assert float(result.mean()) == pytest.approx(0, abs=1e-6)
    assert float(result.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_log_softmax_and_its_gradient(temperature):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 11, generator=generator).requires_grad_()
    target, weight = torch.randint(0, 11, (7,), generator=generator), torch.randn(7, generator=generator)
    logprobs, entropy, probs = SampledLogprobs.apply(logits, target, temperature)
    expected = torch.log_softmax(logits / temperature, 1)
    assert torch.allclose(logprobs, expected.gather(1, target[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(entropy, -(expected.exp() * expected).sum(1), atol=1e-6)
    assert torch.allclose(probs.sum(1), torch.ones(7))
    (own,) = torch.autograd.grad((weight * logprobs).sum(), logits)
    (other,) = torch.autograd.grad((weight * expected.gather(1, target[:, None])[:, 0]).sum(), logits)
    assert torch.allclose(own, other, atol=1e-6)


def test_metrics_are_means_over_tokens_of_all_updates():
    one = dict.fromkeys(("ratio", "kl", "entropy", "clipped", "logprob_diff", "max_logprob_diff"), 4.0)
    reports = [one | {"loss": 1.0, "tokens": 2.0, "max_ratio": 3.0, "grad_norm": 1.0, "lr": 0.1}] * 2
    metrics = mean_metrics(reports)
    assert metrics["is_ratio"] == 2 and metrics["loss"] == 1 and metrics["is_ratio_max"] == 3
