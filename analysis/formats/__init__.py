# SPDX-License-Identifier: Apache-2.0
"""The formats of a report: each module renders the same report model, and none computes a figure of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

from analysis.queries.drawn import PICTURED
from analysis.queries.registry import Query
from analysis.reading.sources import Recording
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
    """Return the function that renders reports in this format. Raises Problem for an unknown format."""
    if name not in FORMATS:
        raise Problem(f"--format {name}: give {', '.join(FORMATS)}")
    render: Callable[..., str] = import_module(f"analysis.formats.{FORMATS[name]}").render
    return render


def kind(name: str) -> outputs.FileKind:
    """Return the type of file of this format, by which an existing file is recognised before it is replaced."""
    return _KINDS.get(name, outputs.PROSE)


def drawn(name: str) -> tuple[Query[Recording], ...]:
    """Return the queries that this format makes of a recording, without loading its module, which takes 30 MiB."""
    return PICTURED if name == "html" else ()
