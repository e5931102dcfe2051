"""Write docs/configuration.md from cures_ray/config.py: key, type, default, and the comment behind it.

python scripts/config_reference.py           # rewrite the page
python scripts/config_reference.py --check   # exit 1 when it is out of date
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "cures_ray" / "config.py", ROOT / "docs" / "configuration.md"
ALIASES: dict[str, str] = {}  # Method, Advantage -> their values

HEADER = """# Configuration

Every key with its type and default. Written by `python scripts/config_reference.py` from `cures_ray/config.py`.
Set keys in a YAML or TOML file, or on the command line: `cures train configs/demo.yaml learner.lr=3e-4`.
Unknown keys are errors that name the nearest known key; spellings of other trainers are translated.
"""


def reference() -> str:
    """The page."""
    text = SOURCE.read_text()
    lines, classes = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
            ALIASES[ast.unparse(node.targets[0])] = ast.unparse(node.value).removeprefix("Literal[").removesuffix("]")
    parts = [HEADER]
    for field in classes["Config"].body:
        if isinstance(field, ast.AnnAssign):
            name, section = ast.unparse(field.target), classes[ast.unparse(field.annotation)]
            parts += [f"\n## {name}\n", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            parts += _rows(name, section, lines, classes)
    return "\n".join(parts) + "\n"


def _rows(name: str, section: ast.ClassDef, lines: list[str], classes: dict[str, ast.ClassDef]) -> list[str]:
    """One line a key; a section within the section follows its key."""
    rows = []
    for field in section.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        rows.append(_row(name, field, lines))
        kind = ast.unparse(field.annotation)
        inner = kind.removeprefix("list[").removesuffix("]")
        if inner in classes:
            key = f"{name}.{ast.unparse(field.target)}{'[]' if kind != inner else ''}"
            rows += _rows(key, classes[inner], lines, classes)
    return rows


def _row(section: str, field: ast.AnnAssign, lines: list[str]) -> str:
    comment = lines[(field.end_lineno or 1) - 1][field.end_col_offset or 0 :].strip().removeprefix("#").strip()
    kind = re.sub(r"Literal\[(.*?)\]", r"\1", ast.unparse(field.annotation)).replace("|", "or")
    kind = ALIASES.get(kind, kind)
    default, bounds = field.value, ""
    if isinstance(default, ast.Call) and default.args:
        signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        bounds = ", ".join(f"{signs[k.arg]} {ast.unparse(k.value)}" for k in default.keywords if k.arg in signs)
        default = default.args[0]
    meaning = "; ".join(part for part in (comment.replace("|", "\\|"), bounds) if part)
    shown = ast.unparse(default) if default else "required"
    return f"| `{section}.{ast.unparse(field.target)}` | {kind} | `{shown}` | {meaning} |"


if __name__ == "__main__":
    page = reference()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.exists() and TARGET.read_text() == page else f"{TARGET} is out of date: run {__file__}")
    TARGET.write_text(page)
