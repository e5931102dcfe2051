"""``cures bench lm-eval``: an exported model in EleutherAI's lm-eval, beside ``cures eval`` on the same prompts.

    python -m venv lmeval
    lmeval/bin/pip install "lm-eval[hf]==0.4.13" torch==2.13.0 transformers==5.19.0
    cures bench lm-eval --python lmeval/bin/python --model RUN/model --data eval.jsonl --max-new-tokens 12

A task of lm-eval is a YAML file; this one reads a local file (``task``) and asks for greedy answers in the model's chat
template. lm-eval generates with Hugging Face's ``generate`` and compares the text in the last box with the gold as a
string; ``cures eval`` generates with vLLM and judges by ``verifier.fn``. Both in float32. Where they differ the result
says which item, both completions, and who was right.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.results_file import ROOT, write_result

NAME = "cures_local"
LAST_BOX = r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"
SHOWN = 20  # differing items in the result file


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cures bench lm-eval", description=__doc__.splitlines()[0])
    p.add_argument("--python", required=True, help="interpreter of lm-eval's environment")
    p.add_argument("--model", required=True, help="an exported folder: RUN/model")
    p.add_argument(
        "--data", type=Path, required=True, help="rows with prompt (text or messages) and answer, JSON lines"
    )
    p.add_argument("--max-new-tokens", type=int, default=512)
    p.add_argument("--pattern", default=LAST_BOX, help="what lm-eval takes as the answer: the last match's first group")
    p.add_argument("--system", help="system prompt of both")
    p.add_argument("--verifier", default="math", help="verifier.fn of cures eval")
    p.add_argument("--batch-size", type=int, default=64, help="of lm-eval")
    p.add_argument("--out", type=Path, default=Path("runs/bench/lm-eval"))
    p.add_argument("--name", default="lm_eval", help="of the result file")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    out = args.out.resolve()
    (out / "task").mkdir(parents=True, exist_ok=True)
    settings = task(args.data.resolve(), args.pattern, args.max_new_tokens)
    (out / "task" / f"{NAME}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = lm_eval_command(args, out)
    print(shlex.join(command), flush=True)
    done = out / "lm_eval" / "command"
    if not (done.exists() and done.read_text() == shlex.join(command)):  # else only the comparison is made again
        subprocess.run(command, check=True)
        done.write_text(shlex.join(command))
    theirs = read_lm_eval(out / "lm_eval")
    ours = read_ours(run_ours(args, out))
    figures, different = compare(ours, theirs)
    versions = {"lm_eval": package_version(args.python, "lm_eval"), "transformers": package_version(args.python)}
    rows = [{"what": "lm-eval", "command": shlex.join(command), "task": settings, "versions": versions}, *different]
    write_result(args.name, figures, rows)
    print(json.dumps(figures, indent=1))
    return 0


def task(data: Path, pattern: str, max_new_tokens: int) -> dict[str, Any]:
    """lm-eval's description of a local file with ``prompt`` and ``answer``."""
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt if prompt is string else prompt[-1].content}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": max_new_tokens, "until": []},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def lm_eval_command(args: argparse.Namespace, out: Path) -> list[str]:
    return [
        args.python, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={args.model},dtype=float32",
        "--tasks", NAME, "--include_path", str(out / "task"), "--apply_chat_template", "--device", "cpu",
        *(["--system_instruction", args.system] if args.system else []),
        "--batch_size", str(args.batch_size), "--log_samples", "--output_path", str(out / "lm_eval"),
    ]  # fmt: skip


def run_ours(args: argparse.Namespace, out: Path) -> Path:
    """The answers of ``cures eval``."""
    settings = [f"rollout.max_new_tokens={args.max_new_tokens}", "rollout.dtype=float32", "rollout.kv_cache_mib=256"]
    settings += [f"verifier.fn={args.verifier}", *([f"data.system_prompt={args.system}"] if args.system else [])]
    command = [sys.executable, "-m", "actors.commands.cli", "eval", args.model, "--data", str(args.data.resolve())]
    command += ["--out", str(out / "cures"), "--json", str(out / "cures.json")]
    subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))], check=True, cwd=ROOT)
    return max((out / "cures").rglob("*.answers.jsonl"), key=lambda path: path.stat().st_mtime)


def read_ours(path: Path) -> list[dict[str, Any]]:
    """One item a prompt, in the file's order: completion, right."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{"completion": r["completion"], "gold": r["gold"], "right": r["outcome"] == "correct"} for r in lines]


def read_lm_eval(folder: Path) -> list[dict[str, Any]]:
    """The same of lm-eval's newest sample file."""
    path = max(folder.rglob(f"samples_{NAME}_*.jsonl"), key=lambda found: found.stat().st_mtime)
    lines = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda r: r["doc_id"])
    return [
        {"completion": r["resps"][0][0], "gold": str(r["doc"]["answer"]), "right": r["exact_match"] == 1.0}
        for r in lines
    ]


def compare(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(figures, the items that differ). Raises ValueError: the two did not answer the same items."""
    if [item["gold"] for item in ours] != [item["gold"] for item in theirs]:
        raise ValueError("cures eval and lm-eval answered different items: prompts were left out on one side")
    pairs = list(zip(ours, theirs, strict=True))
    same_text = [a["completion"].strip() == b["completion"].strip() for a, b in pairs]
    same_verdict = [a["right"] == b["right"] for a, b in pairs]
    figures = {
        "items": len(pairs),
        "accuracy_cures": sum(a["right"] for a in ours) / len(pairs),
        "accuracy_lm_eval": sum(b["right"] for b in theirs) / len(pairs),
        "same_completion": sum(same_text) / len(pairs),
        "same_verdict": sum(same_verdict) / len(pairs),
        "same_completion_other_verdict": sum(t and not v for t, v in zip(same_text, same_verdict, strict=True)),
    }
    different = [
        {"item": i, "gold": a["gold"], "cures": a["completion"], "cures_right": a["right"], "lm_eval": b["completion"],
         "lm_eval_right": b["right"]}
        for i, (a, b) in enumerate(pairs)
        if not (same_text[i] and same_verdict[i])
    ]  # fmt: skip
    return figures, different[:SHOWN]


def package_version(python: str, package: str = "transformers") -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
