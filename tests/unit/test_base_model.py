import json

import numpy as np
import pytest
import torch

from cures_ray.config import DataConfig, ModelConfig
from cures_ray.data.table import check_disjoint, load_prompts, load_tokenizer
from cures_ray.messages import ConfigError
from cures_ray.synthetic.base_model import (
    BaseModelSpec,
    accuracies,
    build_model,
    build_tokenizer,
    main,
    prepare,
    sample,
)
from cures_ray.synthetic.tasks import TASKS, generate

TINY = {"prompts": 24, "eval_prompts": 8, "sft_steps": 3, "sft_batch": 4, "hidden": 32, "layers": 1, "heads": 1}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_tokenizer_returns_any_printable_text_and_the_tasks_are_short():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    for text in ("Any text: (x%2)+3, 100 & more\n\ttabs", "\\boxed{0708}<|end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for name, task in TASKS.items():
        for problem in generate(name, seed=0, count=60):
            completion = tokenizer(task.solve(problem, None, rng) + "<|end|>")["input_ids"]
            assert len(completion) <= task.max_new_tokens and tokenizer.unk_token_id not in completion
            prompt = tokenizer(problem.text)["input_ids"]
            assert len(prompt) + len(completion) + 2 <= 64 and tokenizer.unk_token_id not in prompt


def test_the_demo_model_is_a_qwen3_of_one_to_five_million_parameters_with_tied_embeddings():
    model = build_model(build_tokenizer(), BaseModelSpec())
    assert model.config.architectures in (None, ["Qwen3ForCausalLM"]) and type(model).__name__ == "Qwen3ForCausalLM"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 5e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.head_dim in (32, 64, 128)


@pytest.mark.parametrize("task", list(TASKS))
def test_prepare_writes_a_plain_folder_that_loads_without_our_code(tmp_path, task):
    from transformers import AutoModelForCausalLM

    spec = BaseModelSpec(task=task, **TINY)
    lines: list[str] = []
    summary = prepare(tmp_path, spec, log=lines.append)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "model")))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == build_tokenizer().eos_token_id
    assert (tmp_path / "model" / "model.safetensors").is_file()
    tables = {
        which: load_prompts(DataConfig(**{which: str(tmp_path / f"{which}.jsonl")}), tokenizer, which)
        for which in ("train", "eval")
    }
    assert (len(tables["train"]), len(tables["eval"])) == (24, 8)
    check_disjoint(tables["train"], tables["eval"])
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert sum(summary["histogram"].values()) == pytest.approx(1, abs=1e-3)
    assert any("warm start" in line for line in lines)


def test_the_supervised_phase_lowers_the_loss_and_a_seed_repeats_it(tmp_path):
    spec = {**TINY, "sft_steps": 30, "sft_batch": 16}
    first = prepare(tmp_path / "a", BaseModelSpec(**spec), log=lambda _: None)
    again = prepare(tmp_path / "b", BaseModelSpec(**spec), log=lambda _: None)
    short = prepare(tmp_path / "c", BaseModelSpec(**TINY), log=lambda _: None)
    assert first["sft_loss"] == again["sft_loss"] < 0.8 * short["sft_loss"]
    weights = [(tmp_path / n / "model" / "model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]


def test_sampling_keeps_the_order_and_stops_at_the_end_token():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(tokenizer, BaseModelSpec(**TINY))
    prompts = [[4, 6], [4, 7, 8], [4, 6]]
    out = sample(model, prompts, max_new_tokens=5, temperature=0.0, end=tokenizer.eos_token_id)
    assert out[0] == out[2] and all(len(o) <= 5 and tokenizer.eos_token_id not in o for o in out)
    logits = model(input_ids=torch.tensor([prompts[1]])).logits[0, -1]
    assert not out[1] or out[1][0] == int(logits.argmax())


def test_accuracy_counts_only_the_right_derivation():
    tokenizer = build_tokenizer()
    problems = generate("chain", seed=0, count=4)
    model = build_model(tokenizer, BaseModelSpec(**TINY))
    assert accuracies(model, tokenizer, problems, BaseModelSpec(**TINY), greedy=True).tolist() == [0, 0, 0, 0]


def test_prepare_explains_what_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(tmp_path / "file", BaseModelSpec(**TINY))


def test_the_command_takes_its_options(tmp_path, capsys):
    sizes = ["--prompts", "12", "--eval-prompts", "6", "--sft-steps", "2", "--hidden", "96", "--layers", "1"]
    assert main(["--out", str(tmp_path), "--task", "program", "--variant", "N", "--seed", "3", *sizes]) == 0
    assert "task program variant N" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 3
