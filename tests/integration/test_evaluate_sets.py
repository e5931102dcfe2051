"""``cures eval`` on local files in the formats of the eight published sets, with a real vLLM; killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

SETS = {
    "math500": {"problem": "what is 1+1?", "solution": "it is \\boxed{2}", "answer": "2", "level": 5, "subject": "a"},
    "gsm8k": {"question": "tom has 2 apples and 3 pears?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    "gaokao2023en": {"question": "solve x=4", "answer": "$4$"},
    "minerva": {"problem": "mass of it?", "solution": "we find \\boxed{3.5}", "type": "physics", "idx": 1},
    "olympiadbench": {"question": "find n", "final_answer": ["7"], "solution": ["n = 7"], "subfield": "algebra"},
    "aime24": {"id": 60, "problem": "find m+n", "solution": "\\boxed{204}", "answer": "204", "year": "2024"},
    "aime25": {"problem": "find k", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "how many?", "answer": 27.0, "url": "x"},
}
LONG = {"question": "why " * 400, "answer": "9"}  # does not fit the context


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_model(folder / "one")
    write_tiny_model(folder / "two", seed=1)
    for name, row in SETS.items():
        prompt = "problem" if "problem" in row else "question"
        rows = [row | {prompt: f"{row[prompt]} {i}"} for i in range(3)]
        if name == "amc23":
            rows.append(LONG)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    sets = ["--sets", ",".join(SETS), "--sets-dir", str(folder), "--out", str(folder / "out")]
    settings = ["rollout.max_new_tokens=8", "rollout.dtype=float32", "verifier.processes_per_worker=1"]
    return [sys.executable, "-m", "actors.commands.cli", "eval", *more, *sets, *settings]


@pytest.mark.timeout(600)
def test_a_killed_evaluation_of_eight_sets_continues_and_two_models_are_compared(folder):
    models = [str(folder / "one"), str(folder / "two")]
    process = subprocess.Popen(command(folder, *models), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        answered = [p for p in (folder / "out").rglob("*.answers.jsonl") if len(p.read_text().splitlines()) > 1]
        if answered:
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out" / "result.json").exists()  # the kill came before the end
    before = {p: p.read_bytes() for p in (folder / "out").rglob("*.answers.jsonl")}
    done = subprocess.run(command(folder, *models), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for path, content in before.items():
        whole = content[: content.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole), "answers from before the kill are kept"
    result = json.loads((folder / "out" / "result.json").read_text())
    for model in models:
        scores = result["scores"][model]
        assert list(scores) == list(SETS)
        assert all(s["prompts"] == 3 + (name == "amc23") for name, s in scores.items())
        assert scores["aime24"]["answers"] == 48 and scores["gsm8k"]["answers"] == 3
        assert set(scores["aime24"]["pass_at"]) == {"1", "2", "4", "8", "16"}
        assert scores["amc23"]["faults"] == 16 and scores["amc23"]["accuracy"]["mean"] == 0.0
        assert scores["gsm8k"]["best_constant"] == 1.0
    assert len(result["paired"]) == 8 and (folder / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    draws = [json.loads(line) for line in sampled_file(folder, "aime24").read_text().splitlines()[1:]]
    texts = {(d["prompt_id"], d["completion"]) for d in draws}
    assert len(texts) > 24, "every answer has a seed of its own"


@pytest.mark.timeout(300)
def test_a_finished_evaluation_starts_no_engine(folder):
    began = time.monotonic()
    done = subprocess.run(command(folder, str(folder / "one")), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "0 to come" in done.stdout and time.monotonic() - began < 60


def sampled_file(folder: Path, name: str) -> Path:
    return next(p for p in sorted((folder / "out").rglob(f"{name}-*.answers.jsonl")) if "one" in str(p))
