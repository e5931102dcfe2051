"""The learner on real Ray actors and DeepSpeed: one group of one rank and one of two, started once.

A tiny float32 Qwen2 with tied embeddings; groups of unequal size, one of them without variance. The oracle is
plain autograd over the whole batch at once.
"""

import asyncio
import os
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner import LearnerGroup
from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.local_learner import LocalLearner
from cures_ray.config import Config
from cures_ray.messages import ConfigError, Rollout, RolloutGroup, RunError, TrainingBatch, TrainingGroup

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CANARY = [np.arange(3, 20), np.arange(30, 12, -1)]
TEMPERATURE = 0.8


class World:
    """Both groups, a model, two batches; ``build`` gives a group new settings without new processes."""

    def __init__(self, folder) -> None:
        self.folder, self.model = folder, write_tiny_model(folder / "model", scale=0.15)
        self.groups = {n: LearnerGroup(self.config(n), [{"num_cpus": 0.5}] * n) for n in (1, 2)}
        self.batches = [make_batch(step) for step in range(2)]

    def config(self, ranks=1, *, algo=None, sigma="last_layer", **learner) -> Config:
        return Config.model_validate(
            {
                "model": {"path": str(self.model)},
                "rollout": {"max_new_tokens": 40, "temperature": TEMPERATURE},
                "algo": algo or {},
                "curriculum": {"sigma": sigma},
                "trainer": {"steps": 10, "no_progress_timeout_s": 60.0},
                "learner": {
                    "num_ranks": ranks,
                    "dtype": "float32",
                    "lr": 1e-3,
                    "max_tokens_per_rank": 200,
                    "weight_decay": 0.01,
                    **learner,
                },
            }
        )

    async def start(self) -> None:
        await asyncio.gather(*(g.start(self.folder / "shm", "shm", CANARY) for g in self.groups.values()))

    def build(self, ranks=1, resume=None, **settings) -> LearnerGroup:
        group = self.groups[ranks]
        config = self.config(ranks, **settings)
        asyncio.run(group.build(config, self.folder / f"shm{ranks}", "shm", CANARY, resume))
        return group

    def train(self, group, batches=None):
        return [asyncio.run(group.train(b)) for b in (self.batches if batches is None else batches)]


def make_batch(step: int) -> TrainingBatch:
    rng = np.random.default_rng(step)
    groups = []
    for lease_id, n in enumerate([5, 1, 3, 8, 2]):
        lengths, prompt = rng.integers(3, 30, n), int(rng.integers(4, 12))
        rollouts = tuple(
            Rollout(
                token_ids=rng.integers(3, 50, length).astype(np.int32),
                logprobs=(-4 + rng.normal(size=length)).astype(np.float32),
                finish_reason="stop",
                min_version=step,
                max_version=step,
                text="",
            )
            for length in lengths
        )
        payload = RolloutGroup(
            lease_id=lease_id,
            attempt=0,
            prompt_token_ids=rng.integers(3, 50, prompt).astype(np.int32),
            rollouts=rollouts,
        )
        index = np.flatnonzero(np.arange(n) != 1).astype(np.int32)  # rollout 1 of a group was a fault
        k = len(index)
        groups.append(
            TrainingGroup(
                lease_id=lease_id,
                payload=ray.put(payload),
                rollout_index=index,
                rewards=(rng.random(k) < 0.5).astype(np.float32),
                advantages=(np.zeros(k) if lease_id == 2 else rng.normal(size=k)).astype(np.float32),
                weights=np.full(k, 1 / 5 / k / 20, np.float32),
                prompt_tokens=prompt,
                completion_tokens=lengths[index].astype(np.int32),
            )
        )
    return TrainingBatch(step=step, groups=tuple(groups))


def oracle(folder, batch):
    """Loss and gradient norm of reinforce without correction, one rollout at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for group in batch.groups:
        payload = ray.get(group.payload)
        for slot, j in enumerate(group.rollout_index):
            completion = payload.rollouts[j].token_ids
            ids = torch.as_tensor(np.concatenate([payload.prompt_token_ids, completion]), dtype=torch.long)
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
    algo = {"loss": "clip", "is_correction": "none"}
    group = world.build(1, algo=algo, **settings)
    theirs = world.train(group)
    local = LocalLearner(world.config(1, algo=algo, **settings), Costs())
    unwrapped = [
        replace(b, groups=tuple(replace(g, payload=ray.get(g.payload)) for g in b.groups)) for b in world.batches
    ]
    ours = [asyncio.run(local.train(batch)) for batch in unwrapped]
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


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_a_resumed_learner_is_bit_identical(world, tmp_path, ranks, stage):
    settings = {"zero_stage": stage, "warmup_steps": 2, "lr_schedule": "cosine"}
    group = world.build(ranks, **settings)
    world.train(group, world.batches[:1])
    asyncio.run(group.save(tmp_path))
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


def test_an_empty_batch_is_a_step_without_a_gradient(world):
    group = world.build(2, zero_stage=2)
    report = world.train(group, [TrainingBatch(step=0, groups=())])[0]
    assert report.metrics["grad_norm"] == 0 and report.metrics["trained_tokens"] == 0


def test_a_lost_payload_is_reported_by_all_ranks_and_trains_nothing(world):
    @ray.remote(max_retries=0)
    def lost():
        raise RuntimeError("gone")

    group = world.build(2)
    good = world.batches[0]
    broken = replace(good.groups[0], payload=lost.remote())
    with pytest.raises(RunError, match="payloads of the batch are lost"):
        world.train(group, [TrainingBatch(step=0, groups=(broken, *good.groups[1:]))])
    assert world.train(group, [good])[0].metrics["grad_norm"] > 0  # the ranks still agree


def test_a_dead_rank_ends_the_step_and_is_named(world):
    group = world.build(2)
    ray.kill(group.ranks[1])
    with pytest.raises(RunError, match="learner rank 1 died during train"):
        world.train(group, world.batches[:1])
