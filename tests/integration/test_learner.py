"""The learner on real Ray actors and DeepSpeed: one group of one rank and one of two, started once.

A tiny float32 Qwen2 with tied embeddings; groups of unequal size, one of them without variance. The oracle is
plain autograd over the whole batch at once.
"""

import asyncio
import os
import resource
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from learner_world import CANARY, TEMPERATURE, World
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.local_learner import LocalLearner
from cures_ray.messages import CheckpointError, ConfigError, PayloadsLost, RunError, TrainingBatch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def oracle(folder, batch):
    """Loss and gradient norm of reinforce without correction, one rollout at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for group in batch.groups:
        payload = ray.get(group.payload)
        for slot, j in enumerate(group.rollout_index):
            completion = payload.tokens(j)[0]
            ids = torch.as_tensor(np.concatenate([payload.prompt(0), completion]), dtype=torch.long)
            scores = torch.log_softmax(model(ids[None]).logits[0, :-1] / TEMPERATURE, -1)
            logprobs = scores.gather(1, ids[1:, None])[-len(completion) :, 0]
            total = total - float(group.weights[slot] * group.advantages[slot]) * logprobs.sum()
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return float(total.detach()), float(norm)


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("learner"))
    asyncio.run(world.start())
    yield world
    for group in world.groups.values():
        group.stop()


def publish(group, version=1):
    update = asyncio.run(group.publish(version))
    return update, load_file(update.info["path"])


def unwrapped(batches):
    return [replace(b, groups=tuple(replace(g, payload=ray.get(g.payload)) for g in b.groups)) for b in batches]


def test_loss_and_gradient_equal_plain_autograd_over_the_whole_batch(world):
    loss, norm = oracle(world.model, world.batches[0])
    algo = {"loss": "reinforce", "is_correction": "none"}
    for ranks, stage in ((1, 0), (2, 1), (2, 3)):
        group = world.build(ranks, algo=algo, zero_stage=stage)
        metrics = world.train(group, world.batches[:1])[0].metrics
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4), (ranks, stage)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4), (ranks, stage)


def test_the_benchmarks_learner_in_process_makes_the_same_updates(world):
    """Same batches, same weights after two AdamW steps with warm-up and clipping: DeepSpeed against torch."""
    settings = {"warmup_steps": 3, "adam_beta2": 0.999, "max_grad_norm": 0.5, "zero_stage": 1}
    algo = {"loss": "clip"}
    group = world.build(1, algo=algo, **settings)
    theirs = world.train(group)
    local = LocalLearner(world.config(1, algo=algo, **settings), Costs())
    ours = [asyncio.run(local.train(batch)) for batch in unwrapped(world.batches)]
    for a, b in zip(theirs, ours, strict=True):
        assert a.metrics["grad_norm"] == pytest.approx(b.metrics["grad_norm"], rel=1e-4)
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-3, abs=1e-6)
        assert a.metrics["lr"] == pytest.approx(b.metrics["lr"])
    weights = publish(group)[1]
    start = load_file(world.model / "model.safetensors")
    for name, value in local.policy.lm.state_dict().items():
        if name in weights and name in start:
            moved = (weights[name] - start[name]).abs().max()
            assert moved > 1e-4, name
            assert (weights[name] - value).abs().max() < 0.02 * moved, name


def test_two_ranks_of_every_zero_stage_equal_one_rank(world):
    one = world.build(1, zero_stage=0)
    expected, weights = world.train(one), publish(one)[1]
    for stage in (0, 1, 2, 3):
        two = world.build(2, zero_stage=stage)
        reports = world.train(two)
        for mine, other in zip(reports, expected, strict=True):
            for key in ("loss", "grad_norm", "entropy", "is_ratio", "is_ratio_max", "logprob_diff", "trained_tokens"):
                assert mine.metrics[key] == pytest.approx(other.metrics[key], rel=2e-3, abs=1e-6), (stage, key)
            for a, b in zip(mine.gradient_statistics, other.gradient_statistics, strict=True):
                assert (a.lease_id, a.n_plus, a.n_minus) == (b.lease_id, b.n_plus, b.n_minus)
                assert a.sq_sum_plus == pytest.approx(b.sq_sum_plus, rel=2e-3), stage
        update, own = publish(two)
        assert own.keys() == weights.keys() and "lm_head.weight" not in own
        # Adam turns the sign of a gradient near 0 into a full step: compare all, and the mass tightly
        difference = torch.cat([(own[k] - weights[k]).abs().flatten() for k in own])
        assert difference.mean() < 1e-6 and difference.max() < 4e-3, stage
        assert update.canary_logprobs[0].shape == (len(CANARY[0]) - 1,)


def test_the_split_into_micro_batches_changes_nothing(world):
    algo = {"updates_per_batch": 2, "kl_coef": 0.1, "loss": "decoupled"}
    whole = world.train(world.build(1, algo=algo, max_tokens_per_rank=100_000))
    split = world.train(world.build(1, algo=algo, max_tokens_per_rank=40, gradient_checkpointing=True))
    for a, b in zip(whole, split, strict=True):
        for key in ("loss", "grad_norm", "kl", "entropy", "clip_fraction"):
            assert a.metrics[key] == pytest.approx(b.metrics[key], rel=1e-3, abs=1e-6), key
    assert whole[0].metrics["kl"] > 0  # the second update has left the reference


def test_kl_in_the_reward_is_whitened_over_ranks(world):
    algo = {"advantage": "reinforce_pp", "kl_coef": 0.05, "kl_in_reward": True}
    one, two = (world.train(world.build(n, algo=algo, zero_stage=1), world.batches[:1])[0].metrics for n in (1, 2))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_rollouts_that_cannot_move_the_policy_cost_nothing_and_change_nothing(world):
    everything = world.train(world.build(1), world.batches[:1])[0]
    skipping = world.train(world.build(1, sigma="bernoulli"), world.batches[:1])[0]
    assert skipping.gradient_statistics == ()
    assert skipping.metrics["computed_tokens"] < everything.metrics["computed_tokens"]
    assert skipping.metrics["trained_tokens"] == everything.metrics["trained_tokens"]
    assert skipping.metrics["grad_norm"] == pytest.approx(everything.metrics["grad_norm"], rel=1e-4)
    nothing = world.train(world.groups[1], [TrainingBatch(step=1, groups=())])[0]  # every rollout was discarded
    assert nothing.metrics["skipped"] == 1 and nothing.metrics["computed_tokens"] == 0


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_a_resumed_learner_is_bit_identical(world, tmp_path, ranks, stage):
    settings = {"zero_stage": stage, "warmup_steps": 2, "lr_schedule": "cosine"}
    group = world.build(ranks, **settings)
    world.train(group, world.batches[:1])
    asyncio.run(group.save(tmp_path))
    saved, stored = publish(group)[1], load_file(tmp_path / "model" / "model.safetensors")  # what `cures export` copies
    assert stored and all(torch.equal(stored[k], saved[k]) for k in stored)
    onward = world.train(group, world.batches[1:])[0]
    weights = publish(group)[1]
    group = world.build(ranks, resume=tmp_path, **settings)
    again = world.train(group, world.batches[1:])[0]
    assert again.metrics["loss"] == onward.metrics["loss"] and again.metrics["lr"] == onward.metrics["lr"] == 1e-3
    resumed = publish(group)[1]
    assert all(torch.equal(resumed[k], weights[k]) for k in weights)
    with pytest.raises(ConfigError, match="zero_stage"):
        world.build(ranks, resume=tmp_path, zero_stage=(stage + 1) % 4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_trains_saves_and_resumes(world, tmp_path, stage):
    group = world.build(2, dtype="bfloat16", zero_stage=stage)
    metrics = world.train(group, world.batches[:1])[0].metrics
    exact = world.train(world.build(1), world.batches[:1])[0].metrics
    assert metrics["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    asyncio.run(group.save(tmp_path))
    before = publish(group)[1]
    after = publish(world.build(2, resume=tmp_path, dtype="bfloat16", zero_stage=stage))[1]
    assert before["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_the_export_is_a_plain_hugging_face_folder(world, tmp_path, ranks, stage):
    group = world.build(ranks, zero_stage=stage)
    world.train(group)
    asyncio.run(group.export(tmp_path / "model"))
    update, _ = publish(group)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for ids, logprobs in zip(update.canary_token_ids, update.canary_logprobs, strict=True):
        row = torch.as_tensor(ids, dtype=torch.long)[None]
        expected = torch.log_softmax(model(row).logits[0, :-1], -1).gather(1, row[0, 1:, None])[:, 0]
        assert logprobs == pytest.approx(expected.detach().numpy(), abs=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("1+2") != []
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(os.listdir(tmp_path / "model"))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_a_batch_without_a_gradient_moves_no_weight_after_momentum_has_built_up(world, ranks, stage):
    group = world.build(ranks, sigma="bernoulli", zero_stage=stage)
    world.train(group)
    before = publish(group, 1)[1]
    zero = [replace(g, advantages=np.zeros_like(g.advantages)) for g in world.batches[0].groups]
    for groups in (tuple(zero), ()):
        metrics = world.train(group, [TrainingBatch(step=2, groups=groups)])[0].metrics
        assert metrics["skipped"] == 1 and metrics["grad_norm"] == metrics["computed_tokens"] == 0
    after = publish(group, 2)[1]
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert world.train(group, world.batches[:1])[0].metrics["skipped"] == 0
    assert any(not torch.equal(value, before[k]) for k, value in publish(group, 3)[1].items())


def test_mini_batches_are_the_same_on_both_learners(world):
    algo = {"loss": "decoupled", "mini_batches": 3, "updates_per_batch": 2}
    theirs = world.train(world.build(2, algo=algo, zero_stage=2), world.batches[:1])[0]
    local = LocalLearner(world.config(1, algo=algo), Costs())
    (batch,) = unwrapped(world.batches[:1])
    ours = asyncio.run(local.train(batch))
    assert theirs.metrics["updates"] == ours.metrics["updates"] == 6
    for key in ("loss", "grad_norm", "clip_fraction", "entropy"):
        assert theirs.metrics[key] == pytest.approx(ours.metrics[key], rel=0.02, abs=1e-4), key


# -- LoRA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "stage", "dtype"), [(1, 0, "float32"), (2, 2, "bfloat16"), (2, 3, "float32")])
def test_what_is_published_with_lora_is_what_the_learner_trains(world, tmp_path, ranks, stage, dtype):
    """Adapters that never arrive at the generators would leave the published tensors at the base model's."""
    settings = {"lora": {"rank": 4, "alpha": 8}, "zero_stage": stage, "dtype": dtype, "lr": 2e-2}
    group = world.build(ranks, **settings)
    world.train(group)
    update, published = publish(group)
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=getattr(torch, dtype))
    start = [canary_logprobs(base, ids) for ids in update.canary_token_ids]
    assert set(published) == {n for n, _ in base.named_parameters()}
    base.load_state_dict(published, strict=False)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    for ids, logprobs, before in zip(update.canary_token_ids, update.canary_logprobs, start, strict=True):
        assert logprobs == pytest.approx(canary_logprobs(base, ids), abs=tolerance)
        assert np.abs(logprobs - before).max() > 3 * tolerance
    asyncio.run(group.export(tmp_path / "model"))
    asyncio.run(group.save(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=getattr(torch, dtype))
    assert canary_logprobs(merged, CANARY[0]) == pytest.approx(update.canary_logprobs[0], abs=tolerance)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "model" / "adapter"))
    small = (tmp_path / "rank-0.safetensors").stat().st_size
    assert small < (world.model / "model.safetensors").stat().st_size  # adapters and their moments only
    onward = world.train(group, world.batches[:1])[0]
    again = world.train(world.build(ranks, resume=tmp_path, **settings), world.batches[:1])[0]
    assert again.metrics["loss"] == onward.metrics["loss"]
    with pytest.raises(ConfigError, match="lora"):
        world.build(ranks, resume=tmp_path, **settings | {"lora": None})


def canary_logprobs(model, ids) -> np.ndarray:
    row = torch.as_tensor(ids, dtype=torch.long)[None]
    with torch.no_grad():
        scores = torch.log_softmax(model(row).logits[0, :-1].float(), -1)
    return scores.gather(1, row[0, 1:, None])[:, 0].numpy()


# -- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_back(world, tmp_path, stage, dtype):
    two = world.build(2, zero_stage=stage, dtype=dtype)
    world.train(two, world.batches[:1])
    (tmp_path / "two").mkdir()
    asyncio.run(two.save(tmp_path / "two"))
    onward, weights = world.train(two, world.batches[1:])[0], publish(two)[1]
    one = world.build(1, zero_stage=stage, dtype=dtype, resume=tmp_path / "two")
    (tmp_path / "one").mkdir()
    asyncio.run(one.save(tmp_path / "one"))
    for group in (one, world.build(2, zero_stage=stage, dtype=dtype, resume=tmp_path / "one")):
        report = world.train(group, world.batches[1:])[0]
        exact = dtype == "float32"
        assert report.metrics["loss"] == pytest.approx(onward.metrics["loss"], rel=1e-5 if exact else 1e-2)
        resumed = publish(group)[1]
        difference = torch.cat([(resumed[k] - weights[k]).float().abs().flatten() for k in weights])
        assert difference.mean() < (1e-7 if exact else 1e-5), stage  # Adam's moments came along: a step is 1e-3


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(world, tmp_path):
    group = world.build(2)
    world.train(group, world.batches[:1])
    for rank in group.ranks:  # as a full disk: no file may grow beyond 1 KiB
        ray.get(rank.__ray_call__.remote(lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, -1))))
    try:
        with pytest.raises(CheckpointError, match=r"rank \d could not write its checkpoint to .*checkpoint.dir"):
            asyncio.run(group.save(tmp_path))
    finally:
        for rank in group.ranks:
            ray.get(rank.__ray_call__.remote(lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))))
    world.train(group, world.batches[1:])
    asyncio.run(group.save(tmp_path))
    assert (tmp_path / "rank-1.safetensors").exists()


def test_lost_payloads_are_named_by_all_ranks_and_nothing_is_trained(world):
    @ray.remote(max_retries=0)
    def lost():
        raise RuntimeError("gone")

    group = world.build(2)
    before, good = publish(group)[1], world.batches[0]
    broken = tuple(replace(g, payload=lost.remote()) if g.lease_id in (0, 3) else g for g in good.groups)
    with pytest.raises(PayloadsLost, match=r"leases \[0, 3\] are lost .*gone") as error:
        world.train(group, [replace(good, groups=broken)])
    assert error.value.lease_ids == (0, 3)
    after = publish(group, 2)[1]
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert world.train(group, [good])[0].metrics["grad_norm"] > 0  # the ranks still agree


def test_a_dead_rank_is_named_and_the_group_starts_again_from_its_checkpoint(world, tmp_path):
    group = world.build(2, zero_stage=2)
    world.train(group, world.batches[:1])
    asyncio.run(group.save(tmp_path))
    onward, weights = world.train(group, world.batches[1:])[0], publish(group, 1)[1]
    dead = list(group.ranks)
    ray.kill(group.ranks[1])
    with pytest.raises(RunError, match="learner rank 1 died during train"):
        world.train(group, world.batches[:1])
    asyncio.run(group.restart(tmp_path))
    assert not set(dead) & set(group.ranks)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(dead[0].address.remote(), timeout=30)  # the living rank was ended too
    again = world.train(group, world.batches[1:])[0]
    assert again.metrics["loss"] == onward.metrics["loss"]
    resumed = publish(group, 2)[1]
    assert all(torch.equal(resumed[k], weights[k]) for k in weights)
