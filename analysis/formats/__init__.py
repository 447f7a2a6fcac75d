# SPDX-License-Identifier: Apache-2.0
"""The formats of a report: each module renders the same model, and none computes a figure of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from analysis.queries.drawn import PICTURED
from analysis.queries.registry import Query
from analysis.sources import Recording
from traces import outputs
from traces.errors import Problem

_KINDS: Final = {"json": outputs.DOCUMENT, "junit": outputs.JUNIT, "html": outputs.PAGE}
# Format -> module; each has `render(*reports) -> str`.
FORMATS: Final = {
    "text": "plain_text",
    "md": "markdown",
    "mail": "mail",
    "json": "json",
    "junit": "junit",
    "html": "html",
}


def renderer(name: str) -> Callable[..., str]:
    """The function that renders reports in this format; a Problem where there is none."""
    if name not in FORMATS:
        raise Problem(f"--format {name}: give {', '.join(FORMATS)}")
    render: Callable[..., str] = import_module(f"analysis.formats.{FORMATS[name]}").render
    return render


def kind(name: str) -> outputs.FileKind:
    """What a file in this format is."""
    return _KINDS.get(name, outputs.PROSE)


def drawn(name: str) -> tuple[Query[Recording], ...]:
    """The queries of a recording that this format makes itself; its module, of 30 MiB, is loaded when it renders."""
    return PICTURED if name == "html" else ()
