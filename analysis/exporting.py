"""`kvmtrace export`: a named query's rows as CSV, a recording's course for Perfetto."""

from __future__ import annotations

import sys
from pathlib import Path

from analysis.queries.registry import named, queries
from analysis.sources import open_source
from traces.errors import Problem
from traces.progress import Progress


def listing(path: Path) -> str:
    """The queries that this file can answer, and why it cannot answer the others of its sort."""
    source = open_source(path)
    lines = []
    for name, query in queries().items():
        if isinstance(source, query.source):
            lacking = query.lacking(source)
            lines.append(f"{name:<10} {query.about}" + (f" Not here: needs {', '.join(lacking)}." if lacking else ""))
    return "\n".join(lines) + "\n"


def csv(path: Path, name: str, out: Path | None) -> None:
    """All rows of a query, streamed to a file or to standard output; null is empty."""
    query = named(name)
    rows = query(open_source(path))
    try:
        with Progress(f"query {name}"):
            rows.sink_csv(sys.stdout.buffer if out is None else out, engine="streaming")
    except OSError as error:
        if "Broken pipe" in str(error):  # polars raises it without its number: whoever read has enough
            raise BrokenPipeError from None
        raise Problem(f"{out or 'standard output'}: cannot be written: {error.strerror or error}") from None


def perfetto(path: Path, out: Path) -> None:
    """A recording's course, or a replay's, as a trace for ui.perfetto.dev; remarks on stderr."""
    from analysis.perfetto import export

    source = open_source(path)
    remarks = export(source, out)
    for remark in remarks:
        print(f"kvmtrace: {path}: {remark}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size:,} bytes", file=sys.stderr)
