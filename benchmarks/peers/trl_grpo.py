"""TRL's GRPOTrainer on a prompt file, in TRL's own environment: rollouts, seconds and held-out accuracy.

    TRL_PYTHON -m benchmarks.peers.trl_grpo --model DIR --train F.jsonl --eval F.jsonl --steps 40 --out curve.json

Seconds are those of ``trainer.train()`` without the evaluations; importing and loading are not in them. The reward is
this project's verifier, called in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="trl_grpo", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--train", type=Path, required=True)
    p.add_argument("--eval", type=Path, required=True)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--prompts", type=int, default=32, help="a step")
    p.add_argument("--generations", type=int, default=8, help="a prompt")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--max-new-tokens", type=int, default=12)
    p.add_argument("--eval-every", type=int, default=5, help="steps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--reward", choices=["math", "reasoning_gym"], default="math")
    p.add_argument("--out", type=Path, required=True)
    return p


def judge_of(name: str) -> Any:
    """(completion, row) -> reward."""
    if name == "math":
        from cures_ray.verify.mathematics import verify_math

        return lambda completion, row: verify_math(completion, str(row["answer"])).reward
    from cures_ray.verify.reasoning_gym import ReasoningGymJudge

    verdict = ReasoningGymJudge()
    return lambda completion, row: verdict({"completion": completion, "answer": row["answer"], "row": row}).reward


def main() -> None:
    args = parser().parse_args()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    rows, held_out = ([json.loads(x) for x in path.read_text().splitlines()] for path in (args.train, args.eval))
    judge = judge_of(args.reward)

    def text_of(row: dict[str, Any]) -> str:
        asked = row["prompt"]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def accuracy() -> float:
        right = 0.0
        model.eval()
        with torch.no_grad():
            for i in range(0, len(held_out), 128):
                part = held_out[i : i + 128]
                asked = tokenizer(
                    [text_of(r) for r in part], return_tensors="pt", padding=True, add_special_tokens=False
                )
                out = model.generate(**asked, max_new_tokens=args.max_new_tokens, do_sample=False)
                texts = tokenizer.batch_decode(out[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
                right += sum(judge(t, r) for t, r in zip(texts, part, strict=True))
        model.train()
        return right / len(held_out)

    curve: list[dict[str, float]] = []
    clock = {"away": 0.0, "began": 0.0}

    def mark(step: int) -> None:
        now = time.perf_counter()
        found = accuracy()
        spent = now - clock["began"] - clock["away"]
        clock["away"] += time.perf_counter() - now
        rollouts = step * args.prompts * args.generations
        curve.append({"step": step, "rollouts": rollouts, "seconds": spent, "accuracy": found})
        print(f"step {step}: {found:.3f} after {spent:.1f} s", flush=True)

    class Marks(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % args.eval_every == 0:
                mark(state.global_step)

    def reward(completions: list[str], row: list[str], **_: Any) -> list[float]:
        return [judge(c, json.loads(r)) for c, r in zip(completions, row, strict=True)]

    batch = args.prompts * args.generations
    config = GRPOConfig(
        output_dir=str(args.out.parent / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=batch,
        num_generations=args.generations,
        gradient_accumulation_steps=1,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        adam_beta2=0.999,
        temperature=args.temperature,
        max_completion_length=args.max_new_tokens,
        beta=0.0,
        use_cpu=True,
        bf16=args.bf16,
        save_strategy="no",
        report_to=[],
        logging_steps=args.steps,
        disable_tqdm=True,
        seed=args.seed,
    )
    data = Dataset.from_list([{"prompt": text_of(r), "row": json.dumps(r)} for r in rows])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Marks()],
    )
    clock["began"] = time.perf_counter()
    mark(0)
    clock["began"], clock["away"] = time.perf_counter(), 0.0
    trainer.train()
    seconds = curve[-1]["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"curve": curve, "seconds": seconds, "rollouts_per_s": args.steps * batch / seconds, "peak_gib": peak}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
