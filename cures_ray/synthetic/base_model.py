"""``cures prepare``: a small base model in the Qwen3 architecture, warm-started on a task of ``tasks.py``.

Writes FOLDER/model (a plain Hugging Face folder), FOLDER/train.jsonl, FOLDER/eval.jsonl (disjoint) and
FOLDER/summary.json (accuracies of the warm start by sampling). The supervised phase teaches *partly wrong* tables,
so that the start looks like real data: many prompts near accuracy 0, many near 1, and room to repair.

Tokens are characters, digit pairs, operators with a digit pair, and the task's fixed phrases; the chat template costs
one token a message. So prompt and completion of the demo task stay below 32 tokens and rollouts are cheap.
(Qwen3 rather than Qwen2: transformers 5 loads every tokenizer of a Qwen2 folder as Qwen2's own byte-level one.)
"""

from __future__ import annotations

import argparse
import json
import re
import string
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.messages import ConfigError
from cures_ray.synthetic.tasks import (
    BOX,
    CODE_CLOSE,
    CODE_OPEN,
    EXAMPLES,
    TASKS,
    TERMS,
    Problem,
    Skill,
    Task,
    generate,
    to_row,
)

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelSpec:
    """What is made. The defaults are the demo's."""

    task: str = "chain"
    variant: str = "T"
    seed: int = 0
    levels: tuple[int, ...] | None = None  # difficulty mix of the prompts, None: every level; the model is the same
    prompts: int = 2048
    eval_prompts: int = 400
    sft_steps: int = 240
    sft_batch: int = 64  # completions per supervised step
    sft_lr: float = 1e-2  # embeddings and norms, AdamW
    sft_muon_lr: float = 0.02  # the matrices
    hidden: int = 192
    layers: int = 2
    heads: int = 6
    samples: int = 8  # completions per prompt when the accuracy is measured


def build_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast``: characters, digit pairs, phrases; pad and end tokens; chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = [BOX, EXAMPLES, CODE_OPEN, CODE_CLOSE, *TERMS.values()]
    pairs = [f"{n:02d}" for n in range(100)]
    operations = [f"{op}{n:02d}" for op in "+-*" for n in range(100)]
    vocabulary = [PAD, END, "<|unk|>", *ROLES, *phrases, *pairs, *operations, *string.printable]
    pattern = "|".join([*map(re.escape, phrases), "[-+*]?[0-9][0-9]", r"[\s\S]"])
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unk|>",
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Any, spec: BaseModelSpec) -> Any:
    """A freshly initialised ``Qwen3ForCausalLM`` in float32 with tied embeddings."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(spec.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 16) * 16,
            hidden_size=spec.hidden,
            intermediate_size=3 * spec.hidden,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            head_dim=spec.hidden // spec.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.02,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            dtype="float32",
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, 0.0, weight.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def prompt_ids(tokenizer: Any, problems: list[Problem]) -> list[list[int]]:
    texts = [
        tokenizer.apply_chat_template(to_row(p, "")["prompt"], tokenize=False, add_generation_prompt=True)
        for p in problems
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def supervise(model: Any, tokenizer: Any, task: Task, skill: Skill, spec: BaseModelSpec, log: Any = print) -> float:
    """The supervised phase, loss on completions only; a batch has one length. Returns the last mean loss in nats."""
    import torch

    batches = _sft_batches(tokenizer, task, skill, spec)
    optimizers = _optimizers(model, spec)
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    mean_loss, started = float("nan"), time.monotonic()
    for step in range(spec.sft_steps):
        ids, mask = batches()
        chosen = mask[:, 1:]
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), ids[:, 1:][chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / spec.sft_steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == spec.sft_steps:
            seconds = time.monotonic() - started
            log(f"warm start: step {step + 1}/{spec.sft_steps}, loss {mean_loss:.3f}, {seconds:.0f} s")
    return mean_loss


def _optimizers(model: Any, spec: BaseModelSpec) -> list[Any]:
    """Muon for the matrices: half the steps of AdamW alone to the same loss on this task."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=spec.sft_muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=spec.sft_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _sft_batches(tokenizer: Any, task: Task, skill: Skill, spec: BaseModelSpec) -> Any:
    """A function -> (ids [B, T], completion mask [B, T]), right padded; fresh problems at each call."""
    import torch

    rng = np.random.default_rng([spec.seed, 13])
    levels = np.array(task.levels)
    share = levels / levels.sum()  # longer derivations show more facts per sample

    def batch() -> tuple[Any, Any]:
        problems = [task.draw(rng, int(level), 1.0) for level in rng.choice(levels, spec.sft_batch, p=share)]
        prompts = prompt_ids(tokenizer, problems)
        completions = [task.solve(p, skill, rng) + END for p in problems]
        answers = tokenizer(completions, add_special_tokens=False)["input_ids"]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((spec.sft_batch, width), tokenizer.pad_token_id)
        mask = torch.zeros((spec.sft_batch, width), dtype=torch.bool)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            mask[i, len(prompt) : len(prompt) + len(answer)] = True
        return ids, mask

    return batch


def sample(
    model: Any, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, end: int, seed: int = 0
) -> list[list[int]]:
    """One completion per prompt (token ids, the end token excluded); temperature 0 is greedy. Order is kept."""
    import torch

    model.eval()
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)
    out: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for rows in by_length.values():
            step_ids, cache, done, tokens = torch.tensor([prompts[i] for i in rows]), None, None, []
            for _ in range(max_new_tokens):
                result = model(input_ids=step_ids, past_key_values=cache, use_cache=True)
                cache, logits = result.past_key_values, result.logits[:, -1]
                if temperature == 0:
                    step_ids = logits.argmax(-1, keepdim=True)
                else:
                    step_ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                tokens.append(step_ids)
                ended = step_ids[:, 0] == end
                done = ended if done is None else done | ended
                if bool(done.all()):
                    break
            for i, line in zip(rows, torch.cat(tokens, 1).tolist(), strict=True):
                out[i] = line[: line.index(end)] if end in line else line
    return out


def accuracies(model: Any, tokenizer: Any, problems: list[Problem], spec: BaseModelSpec, *, greedy: bool) -> np.ndarray:
    """Share of completions per problem that are the mistake-free derivation. float64 [P].

    Compares text with the only derivation that the task has, so it needs no verifier and runs in this process.
    """
    task, rng = TASKS[spec.task], np.random.default_rng(0)
    k = 1 if greedy else spec.samples
    prompts = [ids for ids in prompt_ids(tokenizer, problems) for _ in range(k)]
    completions = sample(
        model,
        prompts,
        max_new_tokens=task.max_new_tokens,
        temperature=0.0 if greedy else 1.0,
        end=tokenizer.eos_token_id,
        seed=spec.seed,
    )
    gold = [task.solve(p, None, rng) for p in problems for _ in range(k)]
    right = [t == g for t, g in zip(tokenizer.batch_decode(completions), gold, strict=True)]
    return np.array(right, dtype=float).reshape(len(problems), k).mean(1)


def prepare(folder: str | Path, spec: BaseModelSpec, log: Any = print) -> dict[str, Any]:
    """Make everything in ``folder`` and return the summary.

    Raises:
        ConfigError: ``folder`` cannot be written, or the task does not hold that many prompts.
    """
    folder, started = Path(folder), time.monotonic()
    try:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        train = generate(spec.task, seed=spec.seed, count=spec.prompts, levels=spec.levels)
        held_out = generate(
            spec.task,
            seed=spec.seed + 1_000_003,
            count=spec.eval_prompts,
            levels=spec.levels,
            exclude={p.text for p in train},
        )
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}; choose another folder") from None
    except ValueError as error:
        raise ConfigError(f"cures prepare: {error}") from None
    _write_rows(folder / "train.jsonl", train, spec.task)
    _write_rows(folder / "eval.jsonl", held_out, spec.task)
    task, tokenizer = TASKS[spec.task], build_tokenizer()
    model = build_model(tokenizer, spec)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"base model: Qwen3, {parameters / 1e6:.2f} M parameters, task {spec.task} variant {spec.variant}")
    skill = task.skill(np.random.default_rng([spec.seed, 17]), spec.variant)  # type: ignore[arg-type]
    loss = supervise(model, tokenizer, task, skill, spec, log)
    model.eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    summary = {**asdict(spec), "parameters": parameters, "sft_loss": round(loss, 4)}
    summary |= measure(model, tokenizer, held_out, spec)
    summary["seconds"] = round(time.monotonic() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    log(
        f"base model: held-out accuracy {summary['accuracy']:.3f} sampled, {summary['greedy_accuracy']:.3f} greedy; "
        f"shares at {' '.join(f'{k} {v:.2f}' for k, v in summary['histogram'].items())}; {summary['seconds']} s"
    )
    return summary


def measure(model: Any, tokenizer: Any, problems: list[Problem], spec: BaseModelSpec) -> dict[str, Any]:
    """Accuracy at temperature 1 and greedy, its histogram over prompts, and by level."""
    sampled = accuracies(model, tokenizer, problems, spec, greedy=False)
    greedy = accuracies(model, tokenizer, problems, spec, greedy=True)
    levels = np.array([p.level for p in problems])
    counts = np.histogram(sampled, [0, 1e-9, 0.2500001, 0.5000001, 0.7500001, 0.9999999, 1.1])[0]
    names = ("0", "(0, 1/4]", "(1/4, 1/2]", "(1/2, 3/4]", "(3/4, 1)", "1")
    return {
        "accuracy": round(float(sampled.mean()), 4),
        "greedy_accuracy": round(float(greedy.mean()), 4),
        "histogram": {n: round(c / len(sampled), 4) for n, c in zip(names, counts.tolist(), strict=True)},
        "by_level": {
            str(level): [
                round(float(sampled[levels == level].mean()), 4),
                round(float(greedy[levels == level].mean()), 4),
            ]
            for level in sorted(set(levels.tolist()))
        },
    }


def _write_rows(path: Path, problems: list[Problem], task: str) -> None:
    path.write_text("".join(json.dumps(to_row(p, task)) + "\n" for p in problems))


def main(argv: list[str]) -> int:
    """``cures prepare``. Returns the exit code."""
    default = BaseModelSpec()
    parser = argparse.ArgumentParser(prog="cures prepare", description="Make a small base model and its prompts.")
    parser.add_argument("--out", default="runs/demo/base", help="folder for model/, train.jsonl, eval.jsonl")
    parser.add_argument("--task", choices=list(TASKS), default=default.task)
    parser.add_argument(
        "--variant", choices=["N", "T"], default=default.variant, help="N: wrong facts; T: wrong skills (transfer)"
    )
    for name, text in (
        ("seed", "of the prompts, the mistakes and the weights"),
        ("prompts", "training prompts"),
        ("eval_prompts", "held-out prompts, never among the training prompts"),
        ("sft_steps", "supervised steps; default: as many as the task takes"),
        ("hidden", "hidden size"),
        ("layers", "transformer layers"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, type=int, default=getattr(default, name), help=text)
    parser.add_argument("--levels", default="", help="difficulty mix, such as 5,6 or 1,1,2; default: all levels once")
    parser.set_defaults(sft_steps=None)
    args = vars(parser.parse_args(argv))
    out, levels = args.pop("out"), args.pop("levels")
    if args["sft_steps"] is None:
        args["sft_steps"] = TASKS[args["task"]].sft_steps
    try:
        mix = tuple(int(level) for level in levels.split(",") if level) or None
    except ValueError:
        raise ConfigError(f"--levels {levels}: not numbers separated by commas") from None
    prepare(out, BaseModelSpec(levels=mix, **args), log=lambda line: print(line, flush=True))
    return 0
