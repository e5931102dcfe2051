"""Writes docs/configuration.md from the JSON schema of the configuration: `python -m cures_ray.config_reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cures_ray.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEADER = """# Configuration

Set keys in a YAML or TOML file, or on the command line, which wins: `cures train configs/demo.yaml learner.lr=3e-4`.

- An unknown key is an error that names the nearest known one. Spellings of other trainers are translated.
- A key that nothing would read beside the other settings is an error too. It says which setting leaves it out.
- `cures train FILE --dry-run` shows every setting that acts, and starts nothing.

This page is written by `python -m cures_ray.config_reference` from the classes in `cures_ray/config*.py`.
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """The page."""
    schema = Config.model_json_schema()
    parts = [HEADER]
    for section, field in schema["properties"].items():
        kinds = _methods(field) or {"": field["$ref"]}
        models = {name: schema["$defs"][ref.rpartition("/")[2]] for name, ref in kinds.items()}
        parts.append(f"\n## {section}\n\n{field['description']}")
        if len(models) > 1:
            parts.append(f"`{section}.method` decides which of these keys there are.\n")
            parts += [f"- `{name}`: {_line(model['description'])}" for name, model in models.items()]
        parts += ["\n| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        keys = dict.fromkeys(key for model in models.values() for key in model["properties"] if key != "method")
        parts += [_row(section, key, models) for key in keys]
        for key, one in models[""]["properties"].items() if "" in models else ():
            parts += _inner_rows(f"{section}.{key}", one, schema["$defs"])
    return "\n".join(parts) + "\n"


def _methods(field: dict[str, Any]) -> dict[str, str]:
    return field.get("discriminator", {}).get("mapping", {})


def _row(section: str, key: str, models: dict[str, Any]) -> str:
    owners = {name: model["properties"][key] for name, model in models.items() if key in model["properties"]}
    one = max(owners.values(), key=lambda field: len(json.dumps(field)))  # cures has the widest choice of `belief`
    defaults = dict.fromkeys(json.dumps(field.get("default")) for field in owners.values() if "$ref" not in field)
    shown = " or ".join(f"`{value}`" for value in defaults)
    only = f" Only {', '.join(owners)}." if len(owners) < len(models) else ""
    return f"| `{section}.{key}` | {_type(one)} | {shown} | {_line(one['description'])}{only} |"


def _inner_rows(where: str, field: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """Rows of the section that the key holds, if it holds one or a list of them."""
    rows: list[str] = []
    for option in (field, field.get("items", {}), *field.get("anyOf", [])):
        if "$ref" in option:
            model = models[option["$ref"].rpartition("/")[2]]
            for key, inner in model["properties"].items():
                rows.append(_row(where, key, {"": model}))
                rows += _inner_rows(f"{where}.{key}", inner, models)
    return rows


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if field["type"] == "object" and "additionalProperties" in field:
        return "map"
    choices = [str(value) for value in field.get("enum", [field["const"]] if "const" in field else [])]
    if choices:
        return ", ".join(choices)
    if "prefixItems" in field:
        return f"[{', '.join(map(_type, field['prefixItems']))}]"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    bounds = [f"{sign} {field[name]:g}" for name, sign in BOUNDS.items() if name in field]
    return " ".join([{"null": "null", "integer": "int", "number": "float"}.get(field["type"], field["type"]), *bounds])


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference())
