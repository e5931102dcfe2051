"""Generators on real Ray and vLLM: sampling, versions, weight syncs in mid-generation, the canary, deadlines.

Two engines start side by side, once: "generator-0" with a Qwen2 (tied embeddings) at temperature 1, and
"generator-1" with a Llama (untied) at temperature 0.7 with a stop string, which drains before a sync. The last
test breaks and kills the second.
"""

import os
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import ray
import torch
from tiny_model import CHARACTERS, write_tiny_model
from transformers import AutoModelForCausalLM

from actors.generator import GeneratorActor
from actors.weights import shm
from actors.weights.backend import Settings
from actors.weights.shm import shm_folder
from actors.weights.stream import Source
from cures_ray.config import Config
from cures_ray.loop.chunks import unpacked
from cures_ray.loop.ports import CanaryFailed, WorkerLost
from cures_ray.messages import LeaseChunk, PromptRow, WeightUpdate

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
TEMPERATURE = (1.0, 0.7)  # by engine
EXACT = 1e-4  # nats, float32 engine against float32 Hugging Face


def tokens(text: str) -> np.ndarray:
    return np.asarray([3 + CHARACTERS.index(c) for c in text], np.int32)


PROMPT = PromptRow(prompt_id="0" * 16, text="compute 12+34=", token_ids=tokens("compute 12+34="), answer="46")


def leases(n: list[int], seeds: list[int], **more) -> LeaseChunk:
    """One lease a seed, which is its id."""
    zero = np.zeros(len(n), np.int64)
    return LeaseChunk(lease_id=zero + seeds, attempt=zero, prompt_index=zero, n=zero + n, seed=zero + seeds, **more)


def rollouts(chunk) -> list:
    return [unpacked(chunk, row) for row in range(len(chunk))]


def log_probabilities(model, ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of tokens 1.. of ``ids`` under a Hugging Face model."""
    row = torch.as_tensor(ids, dtype=torch.long)[None]
    with torch.no_grad():
        scores = torch.log_softmax(model(row).logits[0, :-1].float() / temperature, -1)
    return scores.gather(1, row[0, 1:, None])[:, 0].numpy()


def one_prompt():
    """A prompt table of PROMPT alone. The class is local, so that it travels by value."""

    class OnePrompt:
        def rows(self, index, *, tokenize=True):
            return [PROMPT for _ in index]

    return {"train": OnePrompt()}


class World:
    """The two engines, and the models whose weights are published to them."""

    def __init__(self, folder) -> None:
        self.models = []  # by engine, then by seed
        for name, tied in (("qwen2", True), ("llama", False)):
            paths = [write_tiny_model(folder / f"{name}-{seed}", seed=seed, tied=tied) for seed in (0, 1, 2)]
            self.models.append([AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in paths])
        self.shm = shm_folder(folder)
        self.version = [0, 0]
        self.current = [models[0] for models in self.models]

        class Adjustable(GeneratorActor):  # a local class travels by value
            async def set_timeout(self, seconds: float) -> None:
                self.config.rollout.timeout_s = seconds

            async def pid(self) -> int:
                return os.getpid()

            async def unfinished(self) -> int:
                return self._engine.output_processor.get_num_unfinished_requests()

        rollout = {"max_new_tokens": 200, "kv_cache_mib": 64, "max_concurrent_rollouts": 128, "timeout_s": 60}
        second = rollout | {"temperature": TEMPERATURE[1], "stop": ["("]}
        self.handles = [
            ray.remote(Adjustable)
            .options(num_cpus=1, max_concurrency=1000)
            .remote(f"generator-{i}", settings, self.current[i].name_or_path, one_prompt())
            for i, settings in enumerate(
                [small(rollout, max_staleness=0), small(second, in_flight_updates=False, max_staleness=1)]
            )
        ]
        self.start_seconds = ray.get([h.start.remote() for h in self.handles])

    def submit(self, n: int, seed: int, which: int = 0, greedy: bool = False):
        return self.handles[which].generate.options(num_returns=2).remote(leases([n], [seed], greedy=greedy))

    def generate(self, *args, **kwargs):
        return ray.get(self.submit(*args, **kwargs))

    def update(self, published, expected, version: int) -> WeightUpdate:
        """``published``: the model whose weights travel; ``expected``: whose log-probabilities the canary has."""
        settings = Settings(backend="shm", folder=self.shm / expected.config.model_type)
        info = shm.Publisher(settings).publish(Source(published), version)
        ids = [tokens(text) for text in ("1+1=", "the answer is 7", "x" * 90)]
        logprobs = tuple(log_probabilities(expected, i).astype(np.float32) for i in ids)
        return WeightUpdate(version=version, info=info, canary_token_ids=tuple(ids), canary_logprobs=logprobs)

    def publish(self, seed: int, which: int = 0) -> WeightUpdate:
        self.version[which] += 1
        self.current[which] = model = self.models[which][seed]
        return self.update(model, model, self.version[which])

    def check(self, group, which: int = 0, tolerance: float = EXACT) -> None:
        """The rollouts' log-probabilities are those of the current weights at the engine's temperature."""
        for rollout in rollouts(group):
            assert len(rollout.logprobs) == len(rollout.token_ids) > 0
            error = rollout.logprobs - expected(group, rollout, self.current[which], TEMPERATURE[which])
            assert np.abs(error).max() < tolerance


def expected(group, rollout, model, temperature: float = 1.0) -> np.ndarray:
    ids = np.concatenate([group.prompt(0), rollout.token_ids])
    return log_probabilities(model, ids, temperature)[len(group.prompt(0)) - 1 :]


def small(rollout: dict, **async_rl) -> Config:
    return Config.model_validate(
        {
            "data": {"max_prompt_tokens": 100},
            "rollout": rollout,
            "learner": {"dtype": "float32"},
            "placement": {"use_gpu": "no"},
            "async_rl": async_rl,
        }
    )


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    world = World(tmp_path_factory.mktemp("models"))
    yield world
    for handle in world.handles:
        ray.kill(handle)
    shutil.rmtree(world.shm)


def same(a, b) -> bool:
    return np.array_equal(a.token_ids, b.token_ids)


def test_a_rollout_depends_on_its_seed_and_index_alone(world):
    _, four = world.generate(4, seed=7)
    others = [world.submit(8, seed=s) for s in (100, 101, 102)]  # company in the batch changes nothing
    _, two = world.generate(2, seed=7)
    _, neighbour = world.generate(4, seed=8)
    ray.get([summary for summary, _ in others])
    assert [same(a, b) for a, b in zip(rollouts(four), rollouts(two), strict=False)] == [True, True]
    assert len({r.token_ids.tobytes() for r in (*rollouts(four), *rollouts(neighbour))}) == 8


def collected(world, chunks: list[LeaseChunk]) -> dict[int, list]:
    """Rollouts by lease, of chunks that are submitted one after the other."""
    for chunk in chunks:
        ray.get(world.handles[0].submit.remote(chunk))
    found: dict[int, list] = {}
    while len(found) < sum(len(chunk) for chunk in chunks):
        summary, group = ray.get(list(world.handles[0].collect.options(num_returns=2).remote()))
        rows = iter(rollouts(group))
        found |= {lease: [next(rows) for _ in range(n)] for lease, n in zip(summary.lease_id, summary.n, strict=True)}
    return found


def test_in_synchronous_training_the_same_chunk_gives_the_same_bits(world):
    """Requests that share a step of the engine change each other's rounding: those of a chunk start together."""
    seeds = list(range(40))
    whole, again = (collected(world, [leases([2] * 40, seeds)]) for _ in range(2))
    pairs = [pair for s in seeds for pair in zip(whole[s], again[s], strict=True)]
    assert len(pairs) == 80 and all(same(a, b) and np.array_equal(a.logprobs, b.logprobs) for a, b in pairs)


def test_the_summary_tells_what_the_payload_holds(world):
    summary, group = world.generate(5, seed=3)
    assert (summary.keys, summary.generator) == ([(3, 0)], "generator-0")
    assert summary.prompt_tokens.tolist() == [len(PROMPT.token_ids)]
    assert summary.completion_tokens.tolist() == [len(r.token_ids) for r in rollouts(group)]
    assert summary.truncated.tolist() == [r.finish_reason == "length" for r in rollouts(group)]
    for rollout in rollouts(group):
        if rollout.finish_reason == "length":
            assert len(rollout.token_ids) == 200
        else:
            assert rollout.token_ids[-1] == 1  # the end token belongs to the completion, not to its text
        text = "".join(CHARACTERS[t - 3] for t in rollout.token_ids if t >= 3)
        assert rollout.text == text


@pytest.mark.parametrize("which", [0, 1])
def test_log_probabilities_are_those_of_the_sampling_policy(world, which):
    summary, group = world.generate(6, seed=11, which=which)
    world.check(group, which)
    assert summary.max_version.tolist() == summary.min_version.tolist() == [world.version[which]] * 6


def test_generation_ends_at_a_stop_string(world):
    _, group = world.generate(16, seed=5, which=1)
    stopped = [r for r in rollouts(group) if "(" in r.text]
    assert stopped
    assert all(r.finish_reason == "stop" and r.text.index("(") == len(r.text) - 1 for r in stopped)
    assert all(r.token_ids[-1] == tokens("(")[0] for r in stopped)


def test_greedy_takes_the_likeliest_token(world):
    _, group = world.generate(1, seed=1, greedy=True)
    (rollout,) = rollouts(group)
    ids = torch.as_tensor(np.concatenate([PROMPT.token_ids, rollout.token_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        best = world.current[0](ids).logits[0, len(PROMPT.token_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == rollout.token_ids.tolist()


def test_after_a_sync_both_engines_hold_the_new_weights_and_say_so(world):
    _, before = world.generate(4, seed=21)
    updates = [world.publish(seed=1, which=which) for which in (0, 1)]
    syncs = [h.update_weights.remote(u) for h, u in zip(world.handles, updates, strict=True)]
    for report in ray.get(syncs):
        assert report.version == 1
        assert report.canary_max_error < EXACT
        assert 0 < report.seconds_paused <= report.seconds
    for which in (0, 1):
        summary, group = world.generate(4, seed=21, which=which)
        world.check(group, which)  # the tied embedding included: lm_head is packed anew
        assert summary.min_version.tolist() == [1] * 4
    _, after = world.generate(4, seed=21)
    assert not all(same(a, b) for a, b in zip(rollouts(before), rollouts(after), strict=True))


def test_requests_in_flight_continue_through_a_sync_under_the_new_weights(world):
    for _ in range(4):
        old = world.current[0]
        pending = [world.submit(16, seed=s) for s in range(40, 46)]
        time.sleep(0.4)
        update = world.publish(seed=2 if old is world.models[0][1] else 1)
        report = ray.get(world.handles[0].update_weights.remote(update))
        groups = ray.get([payload for _, payload in pending])
        assert report.canary_max_error < EXACT
        mixed = 0
        for group in groups:
            for rollout in rollouts(group):
                assert world.version[0] - 1 <= rollout.min_version <= rollout.max_version <= world.version[0]
                if rollout.min_version < rollout.max_version:
                    mixed += 1
                    check_one_switch(group, rollout, old, world.current[0])
        if mixed:
            return
    pytest.fail("no rollout was in flight during a sync")


def check_one_switch(group, rollout, old, new) -> None:
    """A prefix of the tokens has the old weights' log-probabilities, the rest the new weights' on the whole text."""
    was_old = np.abs(rollout.logprobs - expected(group, rollout, old)) < 10 * EXACT
    is_new = np.abs(rollout.logprobs - expected(group, rollout, new)) < 10 * EXACT
    assert any(was_old[:k].all() and is_new[k:].all() for k in range(1, len(was_old)))


def test_what_is_finished_comes_out_in_chunks_and_each_lease_once(world):
    handle, asked = world.handles[0], {seed: 1 + seed % 3 for seed in range(200, 230)}
    for part in (slice(0, 20), slice(20, 30)):
        ray.get(handle.submit.remote(leases(list(asked.values())[part], list(asked)[part])))
    seen, chunks, tokens = [], 0, {}
    while len(seen) < len(asked):
        summary, payload = ray.get(handle.collect.options(num_returns=2).remote())
        chunks += 1
        assert len(payload) == summary.n.sum() and not summary.failed.any() and (summary.seconds > 0).all()
        seen += zip(summary.lease_id.tolist(), summary.n.tolist(), strict=True)
        first = dict(zip(summary.lease_id.tolist(), (summary.n.cumsum() - summary.n).tolist(), strict=True))
        tokens |= {lease_id: payload.tokens(row)[0].tolist() for lease_id, row in first.items()}
        world.check(payload, tolerance=10 * EXACT)  # many tokens: the least likely one is rounded most
    assert dict(seen) == asked and len(seen) == len(asked)
    assert chunks < len(asked), "finished leases travel together"
    summary, _ = ray.get(handle.collect.options(num_returns=2).remote())
    assert len(summary) == 0, "nothing is handed out twice"
    _, alone = world.generate(asked[203], seed=203)
    assert alone.tokens(0)[0].tolist() == tokens[203], "a lease gets its own rollouts, whatever its chunk"


def test_a_missed_deadline_aborts_the_requests(world):
    handle = world.handles[0]
    ray.get(handle.set_timeout.remote(0.05))
    ray.get(handle.submit.remote(leases([32], [60])))
    summary, payload = ray.get(handle.collect.options(num_returns=2).remote())
    assert summary.keys == [(60, 0)] and summary.failed.tolist() == [True]
    assert summary.completion_tokens.tolist() == [0] * 32 and payload.texts == ("",) * 32
    ray.get(handle.set_timeout.remote(60.0))
    assert ray.get(handle.unfinished.remote()) == 0
    world.check(world.generate(2, seed=61)[1])


def test_a_wrong_sync_is_caught_and_a_dead_engine_ends_its_actor(world):
    """The output layer of the old weights under the new layers: only a canary can tell."""
    handle = world.handles[1]
    right = world.models[1][0]
    wrong = AutoModelForCausalLM.from_pretrained(right.name_or_path, dtype=torch.float32)
    wrong.lm_head.weight.data.copy_(world.current[1].lm_head.weight.data)
    pending, _ = world.submit(8, seed=80, which=1)
    with pytest.raises(
        CanaryFailed, match=r"canary failed: after loading weights version 99, generator generator-1"
    ) as e:
        ray.get(handle.update_weights.remote(world.update(wrong, right, 99)))
    assert e.value.cause.reproducible and "A second transfer measured the same" in str(e.value)
    with pytest.raises(WorkerLost, match="canary failed"):
        ray.get(world.submit(2, seed=81, which=1)[0])
    with pytest.raises(WorkerLost, match="canary failed"):  # not even the right weights make it usable again
        ray.get(handle.update_weights.remote(world.update(right, right, 100)))
    assert ray.get(pending).max_version.tolist() == [1] * 8  # async_rl.in_flight_updates = false: they finished first
    pid = ray.get(handle.pid.remote())
    engine = next(c for c in psutil.Process(pid).children() if "EngineCore" in "".join(c.cmdline()))
    os.kill(engine.pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < deadline:
            ray.get(handle.pid.remote(), timeout=10)
            time.sleep(0.2)
    world.check(world.generate(2, seed=82)[1])  # the other engine is untouched
