"""The one learner step, with torch's AdamW on a tiny model: updates, mini-batches, and steps without a gradient."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.inprocess.costs import Costs
from benchmarks.inprocess.local_learner import LocalLearner
from cures_ray.config import Config
from cures_ray.learning.packing import mini_batches
from cures_ray.learning.policy import learner_threads
from cures_ray.loop.chunks import pack
from cures_ray.messages import LeaseChunk, Rollout, RunError, TrainingBatch, TrainingGroup

LEASES, ROLLOUTS = 8, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("step") / "model"
    Qwen2ForCausalLM(settings).save_pretrained(folder)
    return folder


def learner(model, *, sigma="bernoulli", algo=None, **settings) -> LocalLearner:
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "algo": algo or {},
            "curriculum": {"allocation": "sigma", "sigma": sigma},
            "trainer": {"steps": 10},
            "learner": {"dtype": "float32", "lr": 3e-3, "max_tokens_per_rank": 120} | settings,
        }
    )
    return LocalLearner(config, Costs())


def one_lease(lease_id: int, n: int) -> LeaseChunk:
    one = np.ones(1, np.int64)
    return LeaseChunk(lease_id=lease_id * one, attempt=0 * one, prompt_index=0 * one, n=n * one, seed=0 * one)


def make_batch(step: int, advantages: float = 1.0, scorer: LocalLearner | None = None) -> TrainingBatch:
    """``scorer``: whose log-probabilities are those of sampling; else random ones."""
    rng = np.random.default_rng(step)
    groups = []
    for lease_id in range(LEASES):
        prompt = rng.integers(3, 40, 5).astype(np.int32)
        rollouts = []
        for _ in range(ROLLOUTS):
            ids = rng.integers(3, 40, int(rng.integers(3, 12))).astype(np.int32)
            logprobs = rng.normal(-3.5, 0.5, len(ids)) if scorer is None else score(scorer, prompt, ids)
            rollouts.append(
                Rollout(
                    token_ids=ids,
                    logprobs=np.asarray(logprobs, np.float32),
                    finish_reason="stop",
                    min_version=step,
                    max_version=step,
                    text="",
                )
            )
        _, payload = pack(one_lease(lease_id, ROLLOUTS), [prompt], [rollouts], "g", [0.0])
        groups.append(
            TrainingGroup(
                lease_id=lease_id,
                payload=payload,
                place=0,
                rollout_index=np.arange(ROLLOUTS, dtype=np.int32),
                rewards=(rng.random(ROLLOUTS) < 0.5).astype(np.float32),
                advantages=(advantages * rng.normal(size=ROLLOUTS)).astype(np.float32),
                weights=np.full(ROLLOUTS, 1 / LEASES / ROLLOUTS / 10, np.float32),
                prompt_tokens=len(prompt),
                completion_tokens=np.array([len(r.token_ids) for r in rollouts], np.int32),
            )
        )
    return TrainingBatch(step=step, groups=tuple(groups))


def score(scorer: LocalLearner, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    ids = torch.as_tensor(np.concatenate([prompt, completion]), dtype=torch.long)
    index = torch.arange(len(prompt) - 1, len(ids) - 1)
    with torch.no_grad():
        return scorer.policy(ids[None], index, ids[index + 1], 1.0, 1, None)[0].numpy()


def train(learner: LocalLearner, batch: TrainingBatch) -> dict[str, float]:
    return asyncio.run(learner.train(batch)).metrics


def weights(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in learner.policy.lm.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def spo(model) -> LocalLearner:
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "curriculum": {"method": "spo", "prompts_per_step": 32, "rollouts_per_step": 32},
            "algo": {"advantage": "posterior_whitened"},
            "trainer": {"steps": 10},
            "learner": {"dtype": "float32", "lr": 3e-3, "max_tokens_per_rank": 60},
        }
    )
    return LocalLearner(config, Costs())


def single(batch: TrainingBatch) -> TrainingBatch:
    """One rollout a lease."""
    first = slice(0, 1)
    fields = ("rollout_index", "rewards", "advantages", "weights", "completion_tokens")
    return replace(batch, groups=tuple(replace(g, **{f: getattr(g, f)[first] for f in fields}) for g in batch.groups))


def test_drift_is_the_change_of_log_probabilities_on_a_prompts_last_response(model):
    """Measured before the update, where a response of the prompt was trained before, and charged."""
    ours = spo(model)
    first = single(make_batch(0, scorer=ours))
    report = asyncio.run(ours.train(first))
    assert report.drift == {} and report.metrics["drift_tokens"] == 0  # nothing to compare with
    seen, tokens = {}, 0
    for group in first.groups[:3]:
        ids, then = group.payload.tokens(0)
        prompt = group.payload.prompt(group.place)
        seen[group.lease_id] = float(np.abs(then - score(ours, prompt, ids)).mean())
        tokens += len(prompt) + len(ids)
    again = single(make_batch(1, scorer=ours))
    report = asyncio.run(ours.train(replace(again, groups=(*first.groups[:3], *again.groups[3:]))))
    assert report.drift == pytest.approx(seen, rel=1e-3) and min(seen.values()) > 1e-3
    assert report.metrics["drift_tokens"] == tokens == ours.costs.prompt_tokens


def test_other_methods_measure_no_drift(model):
    report = asyncio.run(learner(model).train(make_batch(0)))
    assert report.drift == {} and "drift_tokens" not in report.metrics


@pytest.mark.parametrize("sigma", ["bernoulli", "last_layer"])
def test_a_batch_without_any_gradient_leaves_every_weight_where_it_was(model, sigma):
    """GRPO where no group is mixed: after real steps Adam's momentum would move nearly all weights."""
    ours = learner(model, sigma=sigma)
    for step in range(2):
        metrics = train(ours, make_batch(step))
        assert metrics["updates"] == 1 and metrics["skipped"] == 0
    before = weights(ours)
    momentum = [s["exp_avg"] for s in ours.engine.optimizer.state.values()]
    assert sum(float((m != 0).float().mean()) for m in momentum) > 0.5 * len(momentum)
    idle = make_batch(2, advantages=0.0)
    report = asyncio.run(ours.train(idle))
    assert same(weights(ours), before)
    assert report.metrics["skipped"] == 1 and report.metrics["updates"] == 0 and report.metrics["grad_norm"] == 0
    assert (report.metrics["computed_tokens"] > 0) == (sigma == "last_layer") == bool(report.gradient_statistics)
    nothing = train(ours, TrainingBatch(step=3, groups=()))  # every rollout of the batch was discarded
    assert same(weights(ours), before) and nothing["skipped"] == 1 and nothing["computed_tokens"] == 0
    assert report.metrics["computed_share"] == float(sigma == "last_layer")
    train(ours, make_batch(3))
    assert not same(weights(ours), before)


def test_a_kl_term_moves_the_policy_without_any_advantage(model):
    ours = learner(model, algo={"kl_coef": 0.1})
    train(ours, make_batch(0))  # away from the reference, where the KL's gradient is 0
    before = weights(ours)
    metrics = train(ours, make_batch(1, advantages=0.0))
    assert metrics["skipped"] == 0 and metrics["computed_share"] == 1 and not same(weights(ours), before)


def test_the_learning_rate_goes_by_the_policy_version_also_over_skipped_steps(model):
    settings = {"lr_schedule": "linear", "lr": 1e-2}
    steady, skipping = learner(model, **settings), learner(model, **settings)
    for step in range(3):
        rate = train(steady, make_batch(step))["lr"]
        assert train(skipping, make_batch(step, advantages=float(step != 1)))["lr"] == rate
    assert rate == pytest.approx(1e-2 * (1 - 2 / 10))


def test_mini_batches_are_disjoint_and_each_has_the_gradient_of_the_batch_in_expectation():
    batch = make_batch(0)
    parts = mini_batches(batch, 3, seed=1)
    assert [len(p.groups) for p in parts] == [3, 3, 2]
    assert sorted(g.lease_id for p in parts for g in p.groups) == list(range(LEASES))
    assert parts[2].groups[0].weights[0] == pytest.approx(batch.groups[0].weights[0] * LEASES / 2)
    seen = np.zeros(LEASES)
    for seed in range(3000):
        for group in mini_batches(batch, 3, seed)[0].groups:
            seen[group.lease_id] += group.weights[0] / batch.groups[0].weights[0]
    assert seen / 3000 == pytest.approx(np.ones(LEASES), abs=0.1)
    assert mini_batches(batch, 1, seed=0) == [batch]
    assert len(mini_batches(batch, 100, seed=0)) == LEASES


@pytest.mark.parametrize("loss", ["clip", "decoupled"])
def test_the_clip_acts_on_the_later_mini_batches_and_only_there(model, loss):
    algo = {"loss": loss} | ({"is_correction": "none"} if loss == "decoupled" else {})
    narrow = {"clip_eps_low": 0.02, "clip_eps_high": 0.02}
    batch = make_batch(0, scorer=learner(model))
    once = train(learner(model, algo=algo | (narrow if loss == "clip" else {})), batch)
    assert once["updates"] == 1 and once["clip_fraction"] == 0 and once["is_ratio"] == pytest.approx(1, abs=1e-4)
    four = train(learner(model, algo=algo | narrow | {"mini_batches": 4}), batch)
    assert four["updates"] == 4 and four["clip_fraction"] > 0.05
    unlimited = {"clip_eps_low": 0.9999, "clip_eps_high": 1e6}
    free = learner(model, algo=algo | {"mini_batches": 4} | unlimited)
    clipped = learner(model, algo=algo | narrow | {"mini_batches": 4})
    assert train(free, batch)["clip_fraction"] == 0
    train(clipped, batch)
    assert not same(weights(free), weights(clipped))


def test_the_proximal_policy_is_that_before_the_batchs_first_update(model):
    """Sampled by the policy itself, prox is behaviour: the decoupled loss without correction is PPO's clip."""
    settings = {"clip_eps_low": 0.02, "clip_eps_high": 0.02, "mini_batches": 4}
    kinds = {"clip": {"loss": "clip"}, "decoupled": {"loss": "decoupled", "is_correction": "none"}}
    batch = make_batch(0, scorer=learner(model))
    for epochs in (1, 2):
        both = [learner(model, algo=settings | kind | {"updates_per_batch": epochs}) for kind in kinds.values()]
        reports = [train(one, batch) for one in both]
        assert reports[0]["updates"] == reports[1]["updates"] == 4 * epochs
        assert reports[0]["clip_fraction"] == pytest.approx(reports[1]["clip_fraction"], abs=0.01)
        clip, decoupled = (weights(one) for one in both)
        assert max(float((clip[k] - decoupled[k]).abs().max()) for k in clip) < 1e-3


def test_a_loss_that_is_not_finite_updates_nothing(model):
    ours = learner(model)
    before = weights(ours)
    batch = make_batch(0)
    broken = replace(batch.groups[0], weights=np.full(ROLLOUTS, np.nan, np.float32))
    with pytest.raises(RunError, match="nothing was updated"):
        train(ours, replace(batch, groups=(broken, *batch.groups[1:])))
    assert same(weights(ours), before)


@pytest.mark.parametrize(
    ("setting", "parameters", "cores", "ranks", "threads"),
    [
        ("auto", 135_000_000, 2, 1, 2),  # a real model on a small machine: both cores
        ("auto", 135_000_000, 2, 4, 1),
        ("auto", 1_500_000_000, 64, 4, 16),
        ("auto", 140_000, 64, 1, 1),  # the demo's model: threads would only wait for each other
        (3.0, 140_000, 2, 1, 3),
        (0.5, 135_000_000, 8, 1, 1),
    ],
)
def test_threads_follow_the_work(setting, parameters, cores, ranks, threads):
    assert learner_threads(setting, parameters, cores, ranks) == threads
