"""Rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from cures_ray.config_reference import PAGE, reference

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "cures_ray").rglob("*.py"))
ACTORS = sorted((ROOT / "actors").rglob("*.py"))
# what starts actors, and the commands, may import them; actors may not import each other
ACTOR_MODULES = {"ledger", "generator", "verifier", "learner"}


def imported(path: Path) -> set[str]:
    """Every module that ``path`` imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_imports_no_ray_vllm_or_deepspeed(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"ray", "vllm", "deepspeed", "actors"}


@pytest.mark.parametrize("name", sorted(ACTOR_MODULES))
def test_actors_do_not_import_each_other(name):
    others = {f"actors.{other}" for other in ACTOR_MODULES - {name}}
    assert not imported(ROOT / "actors" / f"{name}.py") & others


def test_no_python_file_is_longer_than_400_lines():
    files = [p for folder in ("cures_ray", "actors", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    assert {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 400} == {}


def test_nothing_on_disk_is_pickled():
    """torch.load, pickle and numpy's allow_pickle read code, not data."""
    pattern = re.compile(r"\bpickle\.(load|dump)|allow_pickle=True|torch\.(load|save)\(")
    found = [p.name for p in LIBRARY + ACTORS if pattern.search(p.read_text())]
    assert found == []


def test_no_package_registry_is_named_in_the_repository():
    hosts = ["pypi" + ".org", "pytorch" + ".org", "pythonhosted" + ".org", "npmjs" + ".org"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix not in {".png", ".gif"} and path.is_file():
            text = path.read_text(errors="replace")
            assert not [h for h in hosts if h in text], name


def test_documents_have_no_placeholders_and_no_dead_links():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        assert "@@" not in text, page.name
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_configuration_reference_is_up_to_date():
    assert PAGE.read_text() == reference(), "run python -m cures_ray.config_reference"
