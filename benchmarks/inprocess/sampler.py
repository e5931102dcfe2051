"""Batched sampling from a small Hugging Face model, and the exact probability of given answers.

    prompts --by length--> batches: common prefix once, rest of the distinct prompts, then one token a turn

Every rollout has its own stream of uniform numbers, a hash of (request seed, rollout, token): what is drawn does not
depend on which requests share a batch, but for the rounding of the model's arithmetic. Rollouts that have stopped leave
the batch once they are a quarter of it: a trained model answers in two tokens where the longest answer takes sixteen.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch

Sampled = tuple[np.ndarray, np.ndarray, bool, str]  # ids int32 [L], log-probabilities float32 [L], stopped, text


class Request(NamedTuple):
    """``n`` completions of one prompt."""

    prompt: np.ndarray  # int32 [P]
    n: int
    seed: int
    greedy: bool = False


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LARGE = 10_000_000  # parameters from which a padded token costs more than another call
MOST_PADDING = 1.25  # longest over shortest rest of a prompt in a batch of a large model
LEAST_PREFIX = 8  # tokens that all prompts share, from which on they are computed once
LEAVE_AT = 0.75  # share of rollouts that go on, below which the others leave the batch


class Sampler:
    """A copy of ``model``, in ``dtype``, that changes only in ``load``."""

    def __init__(
        self, model: Any, tokenizer: Any, temperature: float, max_new_tokens: int, dtype: torch.dtype | None = None
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype=dtype).eval().requires_grad_(False)
        self.device = next(self.model.parameters()).device
        self.tokenizer, self.temperature, self.max_new_tokens = tokenizer, temperature, max_new_tokens
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.end, self.pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)

    @torch.no_grad()
    def load(self, model: Any) -> None:
        for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(new)

    @torch.inference_mode()
    def sample(self, requests: list[Request]) -> list[list[Sampled]]:
        """One list a request, one ``Sampled`` a rollout. The stop token is part of the ids."""
        found: list[list[Sampled]] = [[] for _ in requests]
        for batch in self._batches(requests):
            for i, rollouts in zip(batch, self._sample([requests[i] for i in batch]), strict=True):
                found[i] = rollouts
        return found

    def _batches(self, requests: list[Request]) -> list[list[int]]:
        """Requests of similar length together, for a large model."""
        if self.parameters < LARGE:
            return [list(range(len(requests)))] if requests else []
        shared = _common([r.prompt for r in requests])
        lengths = [len(r.prompt) - shared for r in requests]
        batches: list[list[int]] = []
        for i in sorted(range(len(requests)), key=lambda i: lengths[i]):
            if batches and lengths[i] <= MOST_PADDING * lengths[batches[-1][0]]:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _sample(self, requests: list[Request]) -> list[list[Sampled]]:
        counts = [r.n for r in requests]
        prompts = [r.prompt for r in requests for _ in range(r.n)]
        greedy = np.repeat([r.greedy for r in requests], counts)
        streams = np.concatenate([_streams(r.seed, r.n) for r in requests])
        ids, logprobs = self._decode(prompts, streams, greedy)
        found = ids == self.end
        stopped = found.any(1)
        lengths = np.where(stopped, found.argmax(1) + 1, ids.shape[1])
        lines = [ids[i, : lengths[i]] for i in range(len(prompts))]
        texts = self.tokenizer.batch_decode([line.tolist() for line in lines], skip_special_tokens=True)
        flat = [
            (line, logprobs[i, : len(line)].copy(), bool(stopped[i]), text)
            for i, (line, text) in enumerate(zip(lines, texts, strict=True))
        ]
        starts = [0, *np.cumsum(counts).tolist()]
        return [flat[a:b] for a, b in itertools.pairwise(starts)]

    def _decode(
        self, prompts: list[np.ndarray], streams: np.ndarray, greedy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [B, T] and log-probabilities float32 [B, T]; what follows a stop token means nothing."""
        first: dict[bytes, int] = {}  # a prompt -> its row in the prefill, which computes it once
        which = torch.as_tensor([first.setdefault(p.tobytes(), len(first)) for p in prompts], device=self.device)
        distinct = [np.frombuffer(key, prompts[0].dtype) for key in first]
        logits, cache, seen = self._prefill(distinct)
        logits, seen = logits[which], seen[which]
        cache.batch_select_indices(which)
        ids = np.full((len(prompts), self.max_new_tokens), self.end, np.int32)
        scores = np.zeros((len(prompts), self.max_new_tokens), np.float32)
        rows = np.arange(len(prompts))  # those of ``ids`` that are still in the batch
        goes_on = np.ones(len(prompts), bool)  # of these, those without a stop token
        for t in range(self.max_new_tokens):
            step, logprob = self._draw(logits, _uniforms(streams[rows], t), greedy[rows])
            ids[rows, t], scores[rows, t] = step.cpu().numpy(), logprob.cpu().numpy()
            goes_on &= ids[rows, t] != self.end
            if not goes_on.any() or t + 1 == self.max_new_tokens:
                return ids[:, : t + 1], scores[:, : t + 1]
            if goes_on.mean() < LEAVE_AT:
                stay = torch.as_tensor(np.flatnonzero(goes_on), device=self.device)
                cache.batch_select_indices(stay)
                rows, seen, step, goes_on = rows[goes_on], seen[stay], step[stay], goes_on[goes_on]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], 1)
            logits = self._forward(step[:, None], seen, seen.sum(1, keepdim=True) - 1, cache).logits[:, -1]
        raise AssertionError("max_new_tokens is at least 1")

    def _draw(
        self, logits: torch.Tensor, uniforms: np.ndarray, greedy: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B] and their log-probabilities float32 [B]."""
        logprobs = torch.log_softmax(logits.float() / self.temperature, -1)
        if greedy.all():
            step = logprobs.argmax(-1, keepdim=True)
        else:
            cumulative = logprobs.exp().cumsum(-1)
            u = torch.as_tensor(uniforms).float().to(self.device)[:, None] * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, u).clamp(max=logprobs.shape[1] - 1)
            best = torch.as_tensor(greedy, device=self.device)[:, None]
            step = torch.where(best, logprobs.argmax(-1, keepdim=True), drawn) if greedy.any() else drawn
        return step[:, 0], logprobs.gather(1, step)[:, 0]

    def _prefill(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Logits after each prompt [P, V], the cache, and which of its places hold tokens, int64 [P, S]."""
        shared = _common(prompts) if self.parameters >= LARGE else 0
        shared, cache = (shared, None) if shared >= LEAST_PREFIX else (0, None)
        if shared:
            prefix = torch.as_tensor(prompts[0][None, :shared].astype(np.int64), device=self.device)
            ones = torch.ones_like(prefix)
            cache = self._forward(prefix, ones, ones.cumsum(1) - 1, None).past_key_values
            cache.batch_repeat_interleave(len(prompts))
        rest = [p[shared:] for p in prompts]
        width = max(map(len, rest))
        ids = np.full((len(rest), width), self.pad, np.int64)
        mask = np.zeros((len(rest), width), np.int64)
        for i, tokens in enumerate(rest):
            ids[i, width - len(tokens) :] = tokens
            mask[i, width - len(tokens) :] = 1
        seen = torch.as_tensor(np.pad(mask, ((0, 0), (shared, 0)), constant_values=1), device=self.device)
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, shared:]
        out = self._forward(torch.as_tensor(ids, device=self.device), seen, position, cache)
        return out.logits[:, -1], out.past_key_values, seen

    def _forward(self, ids: torch.Tensor, attention: torch.Tensor, position: torch.Tensor, cache: Any) -> Any:
        return self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def probability(self, prompts: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
        """P(the completion starts with answer | prompt) at the sampling temperature. float64 [N].

        For a task with one right completion this is the exact accuracy, without sampling noise.
        """
        return np.exp([scores.sum(dtype=np.float64) for scores in self.token_logprobs(prompts, answers)])

    @torch.inference_mode()
    def token_logprobs(self, prompts: list[np.ndarray], answers: list[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of every token of the answers after their prompts, at the sampling temperature: float32 [L]
        each."""
        result: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            by_shape[len(prompt), len(answer)].append(i)
        for (p, _), rows in by_shape.items():
            together = np.array([np.concatenate([prompts[i], answers[i]]) for i in rows]).astype(np.int64)
            ids = torch.as_tensor(together, device=self.device)
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits[:, p - 1 :].float()
            scores = torch.log_softmax(logits / self.temperature, -1).gather(2, ids[:, p:, None])
            for i, line in zip(rows, scores.squeeze(2).cpu().numpy(), strict=True):
                result[i] = line
        return result


def _common(prompts: list[np.ndarray]) -> int:
    """Leading tokens that all prompts share; at least one token of each is left."""
    shortest = min(map(len, prompts)) - 1
    together = np.stack([p[:shortest] for p in prompts])
    same = (together == together[0]).all(0)
    return shortest if same.all() else int(same.argmin())


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, uint64 [B] -> uint64 [B]."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _streams(seed: int, n: int) -> np.ndarray:
    """One stream a rollout of a request: uint64 [n]."""
    with np.errstate(over="ignore"):
        base = _mix(np.full(n, seed % 2**64, np.uint64) + GOLDEN)
        return _mix(base + GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


def _uniforms(streams: np.ndarray, t: int) -> np.ndarray:
    """Uniform in [0, 1) for token ``t`` of every stream."""
    with np.errstate(over="ignore"):
        mixed = _mix(streams + GOLDEN * np.uint64(t + 1))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
