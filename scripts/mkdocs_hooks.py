"""Takes files of the repository that the pages link to (``../benchmarks/...``) into the site, under ``repository/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./((?!\.\.)[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a top-level page links to."""
    pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page.read_text())}):
        if (ROOT / name).is_file():
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of top-level pages there; a link to a folder becomes its name."""
    if "/" in page.file.src_uri:
        return markdown
    folders = re.compile(r"\[([^\]]*)\]\(\.\./((?!\.\.)[^)#\s]+)\)")
    named = folders.sub(lambda m: m[0] if (ROOT / m[2]).is_file() else f"`{m[2]}`", markdown)
    return OUTSIDE.sub(r"](repository/\1", named)
