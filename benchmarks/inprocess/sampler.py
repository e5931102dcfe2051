"""Batched sampling from a small Hugging Face model on the CPU, and the exact probability of given answers.

Every rollout has its own stream of uniform numbers, a hash of (request seed, rollout, token): what is drawn does not
depend on which requests share a batch, but for the rounding of the model's arithmetic.
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


class Sampler:
    """A copy of ``model`` that changes only in ``load``."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float, max_new_tokens: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
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
        counts = [r.n for r in requests]
        prompts = [r.prompt for r in requests for _ in range(r.n)]
        greedy = np.repeat([r.greedy for r in requests], counts)
        streams = np.concatenate([_streams(r.seed, r.n) for r in requests])
        ids, logprobs = self._decode(prompts, streams, torch.as_tensor(greedy))
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
        self, prompts: list[np.ndarray], streams: np.ndarray, greedy: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [B, T] and log-probabilities float32 [B, T]; what follows a stop token means nothing."""
        first: dict[bytes, int] = {}  # a prompt -> its row in the prefill, which computes it once
        which = torch.as_tensor([first.setdefault(p.tobytes(), len(first)) for p in prompts], device=self.device)
        distinct = [np.frombuffer(key, prompts[0].dtype) for key in first]
        width = max(map(len, distinct))
        ids = np.full((len(distinct), width), self.pad, np.int64)
        mask = np.zeros((len(distinct), width), np.int64)
        for i, prompt in enumerate(distinct):
            ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        seen = torch.as_tensor(mask, device=self.device)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        out = self._forward(torch.as_tensor(ids, device=self.device), seen, position, None)
        cache, logits = out.past_key_values, out.logits[:, -1][which]
        cache.batch_select_indices(which)
        attention = torch.cat([seen[which], seen.new_ones(len(prompts), self.max_new_tokens)], 1)
        position = position[which, -1:]
        tokens, scores = [], []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        greedy = greedy.to(self.device)
        for t in range(self.max_new_tokens):
            logprobs = torch.log_softmax(logits.float() / self.temperature, -1)
            cumulative = logprobs.exp().cumsum(-1)
            u = torch.as_tensor(_uniforms(streams, t)).float().to(self.device)[:, None] * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, u).clamp(max=logprobs.shape[1] - 1)
            step = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), drawn)
            tokens.append(step)
            scores.append(logprobs.gather(1, step))
            done |= step[:, 0] == self.end
            if bool(done.all()) or t + 1 == self.max_new_tokens:
                break
            position = position + 1
            logits = self._forward(step, attention[:, : width + t + 1], position, cache).logits[:, -1]
        return torch.cat(tokens, 1).cpu().numpy().astype(np.int32), torch.cat(scores, 1).cpu().numpy()

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
