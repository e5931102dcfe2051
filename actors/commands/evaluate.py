"""``cures eval MODEL --data FILE``: held-out accuracy of a Hugging Face folder with plain ``vllm.LLM``.

No code of the trainer runs here but the data loader and the verifier, so it checks an exported model
independently.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config, VerifierConfig
from cures_ray.config_load import load_config
from cures_ray.data.table import PromptTable, load_prompts, load_tokenizer
from cures_ray.messages import ConfigError, Verdict


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures eval", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder or name")
    parser.add_argument("--data", required=True, help="JSONL, Parquet or data set name")
    parser.add_argument(
        "--samples", type=int, default=1, help="1: greedy; more: that many draws at rollout.temperature"
    )
    parser.add_argument("--config", type=Path, help="the configuration of the training run: prompts, lengths, verifier")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="such as data.system_prompt=..., rollout.max_new_tokens=256, verifier.fn=code",
    )
    args = parser.parse_intermixed_args(argv)
    if args.samples < 1:
        raise ConfigError(f"--samples = {args.samples}: at least 1 is needed")
    config = load_config(args.config, [*args.overrides, f"model.path={args.model}", f"data.eval={args.data}"])
    prompts = load_prompts(config.data, load_tokenizer(config.model), "eval")
    texts = _generate(config, prompts, args.samples)
    result = _score(prompts, texts, config.verifier)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _generate(config: Config, prompts: PromptTable, samples: int) -> list[list[str]]:
    """Completions per prompt."""
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams, TokensPrompt

    model, new = config.model.path, config.rollout.max_new_tokens
    limit = AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings
    cache: dict[str, Any] = {"kv_cache_memory_bytes": 256 << 20} if cpu else {}
    engine = LLM(
        model=model,
        dtype=config.rollout.dtype,
        max_model_len=min(config.data.max_prompt_tokens + new, limit),
        enforce_eager=cpu,
        disable_log_stats=True,
        **cache,
    )
    params = SamplingParams(
        temperature=0.0 if samples == 1 else config.rollout.temperature, n=samples, max_tokens=new, seed=0
    )
    rows = [prompts.row(i) for i in range(len(prompts))]
    outputs = engine.generate([TokensPrompt(prompt_token_ids=r.token_ids.tolist()) for r in rows], params)
    return [[c.text for c in o.outputs] for o in outputs]


def _score(prompts: PromptTable, texts: list[list[str]], verifier: VerifierConfig) -> dict[str, object]:
    from cures_ray.verify.pool import VerifyItem, VerifyPool

    items = [
        VerifyItem(prompt=prompts.row(i), completion=text)
        for i, completions in enumerate(texts)
        for text in completions
    ]
    pool = VerifyPool(verifier)
    try:
        verdicts: list[Verdict] = pool.verify(items)
    finally:
        pool.close()
    owner = [i for i, completions in enumerate(texts) for _ in completions]
    rewards = np.array([np.nan if v.is_fault else v.reward for v in verdicts])
    result: dict[str, object] = {
        "accuracy": float(np.nanmean(rewards)),
        "prompts": len(prompts),
        "completions": len(items),
        "faults": int(np.isnan(rewards).sum()),
    }
    if prompts.levels is not None:
        by_level: dict[str, list[float]] = defaultdict(list)
        for i, reward in zip(owner, rewards, strict=True):
            by_level[f"{prompts.levels[i]:g}"].append(float(reward))
        result["by_level"] = {k: float(np.nanmean(v)) for k, v in sorted(by_level.items())}
    return result
