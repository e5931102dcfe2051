"""The documents: code that runs, and prose that a newcomer can read."""

import re
from pathlib import Path

import numpy as np
import pytest
from simulated import Run

from cures_ray.curriculum import methods
from cures_ray.verify.functions import load_reward_function

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDE = {"configuration.md", "metrics.md"}  # written by programs: tables


def code(page: str) -> str:
    """The Python of a page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks, page
    return "\n".join(blocks)


def prose(text: str) -> list[str]:
    """Lines outside code, tables, comments and links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [line for line in text.splitlines() if not line.startswith(("|", "    ", "`cures bench"))]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in WIDE], ids=lambda p: p.name)
def test_no_line_of_prose_is_longer_than_120_characters(page):
    assert [line for line in prose(page.read_text()) if len(line) > 120] == []


def test_the_readme_is_read_in_a_minute():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    rows = [sum(1 for _ in block) for block in tables(lines)]
    assert rows and max(rows) <= 6 + 2  # heading and rule


def tables(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append(line)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/questions.md"])
def test_no_label_of_an_arm_reaches_a_reader(page):
    text = re.sub(r"<!-- command.*?<!-- end command -->|```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    shown = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    assert re.findall(r"cures_wide\S*|rpp_single\S*|@\w+=\S*", shown) == []


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/questions.md"])
def test_no_table_compares_optimizer_steps_of_unequal_batches(page):
    assert "speedup/optimizer_steps" not in (ROOT / page).read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f": {page.relative_to(ROOT / 'docs')}" in navigation, page.name


def test_the_reward_of_the_page_judges_as_it_says(tmp_path):
    (tmp_path / "my_reward.py").write_text(code("write-a-reward.md"))
    reward = load_reward_function(f"{tmp_path / 'my_reward.py'}:near")
    for completion, row, expected in (
        ("it is 42", {}, 1.0),
        ("about 42.1, I think", {"tolerance": 0.01}, 1.0),
        ("about 44", {}, 0.5),
        ("1,000", {}, 0.0),
        ("no idea", {}, 0.0),
    ):
        verdict = reward("What is 17 + 25?", completion, "42", row)
        assert verdict.reward == pytest.approx(expected), completion


def test_the_method_of_the_page_draws_what_was_practised_least(monkeypatch):
    space: dict = {}
    exec(code("write-a-method.md"), space)
    monkeypatch.setitem(methods.METHODS, "uniform", space["METHOD"])
    run = Run(np.full(24, 0.5), method="uniform")
    drawn = [sorted({e.lease.prompt_index for e in run.step().entries}) for _ in range(3)]
    visited = sorted(index for batch in drawn for index in batch)
    assert visited == list(range(24)), "three batches of 8 visit each of 24 prompts once"
    assert all(len(batch) == 8 for batch in drawn) and run.accounting.trained == 3 * 32
