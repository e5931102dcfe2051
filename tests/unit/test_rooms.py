"""The rooms of the house and the arrows between them (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVES = {
    "cures_ray.boxes",
    "cures_ray.messages",
    "cures_ray.config",
    "cures_ray.config_data",
    "cures_ray.config_load",
    "cures_ray.config_sections",
    "cures_ray.config_curriculum",
    "cures_ray.pickling",
    "cures_ray.snapshot",
}
ROOMS = ["curriculum", "ledger", "data", "evaluation", "verify", "learning", "loop", "run", "synthetic"]
LIBRARY = {f"cures_ray.{room}" for room in ROOMS}
ACTORS = {"actors", "actors.weights", "actors.cluster"}
PRODUCT = LIBRARY | ACTORS | {"actors.commands"}
MAY_IMPORT = {
    "cures_ray": set(),
    "cures_ray.curriculum": set(),
    "cures_ray.ledger": {"cures_ray.curriculum", "cures_ray.data"},
    "cures_ray.data": set(),
    "cures_ray.evaluation": set(),
    "cures_ray.verify": set(),
    "cures_ray.learning": set(),
    "cures_ray.loop": {"cures_ray.learning", "cures_ray.evaluation"},
    "cures_ray.run": {"cures_ray.data", "cures_ray.verify"},
    "cures_ray.synthetic": set(),
    "actors": LIBRARY | {"actors.weights"},
    "actors.weights": LIBRARY,
    "actors.cluster": LIBRARY | {"actors", "actors.weights"},
    "actors.commands": LIBRARY | ACTORS | {"benchmarks"},
    "benchmarks": set(),
    "benchmarks.inprocess": PRODUCT,
    "benchmarks.harness": PRODUCT | {"benchmarks.inprocess"},
    "benchmarks.micro": PRODUCT | {"benchmarks.harness"},
    "benchmarks.peers": PRODUCT | {"benchmarks.harness"},
    "benchmarks.research": PRODUCT | {"benchmarks.harness", "benchmarks.inprocess"},
}
FILES = sorted(p for top in ("cures_ray", "actors", "benchmarks") for p in (ROOT / top).rglob("*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The folder that a module lies in."""
    path = ROOT.joinpath(*name.split("."))
    return name if path.is_dir() else name.rpartition(".")[0]


def imports(path: Path) -> set[str]:
    """This project's modules that ``path`` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = ROOT.joinpath(*node.module.split(".")).is_dir()
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return {name for name in names if name.split(".")[0] in ("cures_ray", "actors", "benchmarks")}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_imports_only_what_its_room_may(path):
    own = room(module(path))
    allowed = MAY_IMPORT[own] | {own}
    wrong = {name for name in imports(path) - LEAVES if room(name) not in allowed}
    assert wrong == set(), f"{own} may import {sorted(allowed)}"


def test_the_arrows_between_rooms_have_no_circle():
    """A circle of two files is one room in two places. The cluster starts actors; actors only read its settings."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        arrows.setdefault(module(path), set()).update(imports(path))
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"circle of imports: {' -> '.join((*way, name))}"
        if name in arrows and name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def test_every_room_says_what_it_promises_and_what_it_may_import():
    assert {room(module(path)) for path in FILES} == set(MAY_IMPORT)
    for name in MAY_IMPORT:
        text = ast.get_docstring(ast.parse(ROOT.joinpath(*name.split("."), "__init__.py").read_text())) or ""
        assert len(text) > 60, name
