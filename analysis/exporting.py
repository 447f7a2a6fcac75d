"""`kvmtrace export`: a named query's rows as CSV, a recording's course for Perfetto."""

from __future__ import annotations

import sys
from pathlib import Path

from analysis.progress import Progress
from analysis.queries.registry import named, queries
from analysis.sources import open_source
from traces.errors import Problem


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
    progress = Progress()
    rows = query(open_source(path))
    progress(f"query {name}")
    try:
        rows.sink_csv(sys.stdout.buffer if out is None else out, engine="streaming")
    except OSError as error:
        if "Broken pipe" in str(error):  # polars raises it without its number: whoever read has enough
            raise BrokenPipeError from None
        raise Problem(f"{out or 'standard output'}: cannot be written: {error.strerror or error}") from None
    finally:
        progress.close()


def perfetto(path: Path, out: Path) -> None:
    """A recording's course, or a replay's, as a trace for ui.perfetto.dev; remarks on stderr."""
    from analysis.perfetto import export

    source = open_source(path)
    progress = Progress()
    try:
        remarks = export(source, out, lambda rows: progress(f"{out}: {rows:,} rows"))
    finally:
        progress.close()
    for remark in remarks:
        print(f"kvmtrace: {path}: {remark}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size:,} bytes", file=sys.stderr)
