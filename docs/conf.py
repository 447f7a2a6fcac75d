# SPDX-License-Identifier: Apache-2.0
"""The documents as a site: `make site`, by Sphinx with MyST, which reads the same Markdown that GitHub shows.

The order of pages is that of docs/README.md; the reference of commands is made from the command line's own help.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]

project = "kvmtrace"
root_doc = "README"
extensions = ["myst_parser"]
include_patterns = ["*.md", "docs/*.md", "traces/*.md", "traces/*/*.md", "replay/*.md", "analysis/*.md"]
exclude_patterns = ["build", ".venv", "tests"]
myst_heading_anchors = 3
highlight_language = "none"  # blocks without a language are output
nitpicky = True
html_theme = "furo"
html_title = "kvmtrace"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

INDEX: Final = "docs/README"


def _trees() -> str:
    """Sphinx's table of contents: the sections and links of docs/README.md's tables, in their order."""
    trees = ["", "```{toctree}", ":hidden:", "", f"/{INDEX}", "```"]
    for section in (REPOSITORY / f"{INDEX}.md").read_text().split("\n## ")[1:]:
        pages = [Path("docs", name) for name in re.findall(r"^\| \[[^]]*\]\(([^)]+)\.md\)", section, re.M)]
        places = [(REPOSITORY / page).resolve().relative_to(REPOSITORY) for page in pages]
        trees += ["", "```{toctree}", ":hidden:", f":caption: {section.splitlines()[0]}", ""]
        trees += [*(f"/{place}" for place in places), "```"]
    return "\n".join(trees) + "\n"


def _reference() -> Iterator[str]:
    """What `--help` says of each verb, as Markdown."""
    from man import contexts

    for context in contexts():
        yield f"\n## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


def _completed(app: Any, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += _trees()
    elif name == "docs/commands":
        source[0] += "".join(_reference())


def _start_page(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _completed)
    app.connect("build-finished", _start_page)
