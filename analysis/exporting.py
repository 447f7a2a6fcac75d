# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace export`: writes rows of a query as CSV, a time line for Perfetto, or events in forms of other tools."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from analysis.queries.registry import named, queries
from analysis.reading.guest_files import GuestFile, use_guest
from analysis.reading.result_source import Result
from analysis.reading.sources import Recording, open_source
from analysis.reading.symbols import NO_NAMING, Naming
from analysis.reporting import use_symbols
from traces.command_line.progress import Progress
from traces.command_line.screen import Page
from traces.errors import Problem
from traces.outputs import FTRACE_TEXT, PERF_TEXT, TRACE_DAT, FileKind, Output
from traces.selection import ALL, Selection
from traces.text import printable, some

if TYPE_CHECKING:
    from traces.kernels import Kernel
    from traces.reader import Trace

_NEWEST = "7.x"


def listing(path: Path, recorded_policy: str = "") -> str:
    """Return a list of the queries for this type of file, with the kinds of event that some of them lack here."""
    source = open_source(path, recorded_policy)
    page = Page()
    page.say(f"queries of {path}:")
    facts = []
    for name, query in queries().items():
        if isinstance(source, query.source):
            lacking = query.lacking(source)
            facts.append((f"  {name}", query.about + (f" Not here: needs {', '.join(lacking)}." if lacking else "")))
    page.facts(facts)
    return page.text


def csv(
    path: Path,
    name: str,
    out: Path | None,
    selection: Selection = ALL,
    naming: Naming = NO_NAMING,
    guest: GuestFile | None = None,
    *,
    force: bool = False,
    recorded_policy: str = "",
) -> None:
    """Write all rows of a query as CSV, streamed, to `out` or to standard output; null is an empty field."""
    query = named(name)
    source = open_source(path, recorded_policy, selection)
    if isinstance(source, Recording):
        source.note(*use_symbols(source, naming), *use_guest(source, guest))
    elif guest is not None:
        raise Problem(f"{path}: a result has no rows of a guest: --guest is for traces")
    rows = query(source)
    if selection.vcpus and "vcpu" in rows.collect_schema():
        rows = rows.filter(pl.col("vcpu").is_in(list(selection.vcpus)))
    header = ",".join(rows.collect_schema().names()) + "\n"
    kind = FileKind(f"the rows of query {name}", re.compile(rb"\A" + re.escape(header.encode())))
    with nullcontext() if out is None else Output(out, kind, [path], force=force) as output, Progress(f"query {name}"):
        try:
            rows.sink_csv(sys.stdout.buffer if output is None else output.written, engine="streaming")
        except OSError as error:
            if "Broken pipe" in str(error):  # polars raises it without errno: the reader closed its end
                raise BrokenPipeError from None
            why = re.sub(r" \(os error \d+\)$", "", error.strerror or str(error))
            raise Problem(f"{out or 'standard output'}: cannot be written: {why}") from None
    if isinstance(source, Recording):
        for note in source.notes:
            print(f"kvmtrace: {path}: {printable(note)}", file=sys.stderr)


def text(path: Path, out: Path | None, selection: Selection = ALL, *, perf: bool, force: bool = False) -> None:
    """Write a recording's events as ftrace or perf prints them, to `out` or to standard output.

    Rows that have no such text are counted on standard error.
    """
    from traces.imports.printing import printed
    from traces.reader import Trace

    trace = selection.of(Trace.open(path))
    kernel, known = _kernel_of(trace)
    pieces, left_out = printed(trace, kernel, perf=perf)
    kind = PERF_TEXT if perf else FTRACE_TEXT
    with (
        nullcontext() if out is None else Output(out, kind, [path], force=force) as output,
        Progress(f"printing {path}"),
    ):
        for piece in pieces:
            (sys.stdout.buffer if output is None else output).write(piece)
    if not known:
        print(f"kvmtrace: {path}: the trace does not say its kernel: printed as {kernel.name} does", file=sys.stderr)
    _say_left_out(path, left_out, "have no such text")


def trace_dat(path: Path, out: Path, selection: Selection = ALL, *, force: bool = False) -> None:
    """Write a recording's events as a trace.dat file; rows of no tracepoint are counted on standard error."""
    from traces.imports.trace_dat_writer import write_trace_dat
    from traces.reader import Trace

    trace = selection.of(Trace.open(path))
    kernel, _ = _kernel_of(trace)
    with Output(out, TRACE_DAT, [path], force=force) as output, Progress(f"writing {out}"):
        left_out = write_trace_dat(trace, kernel, output.write)
    _say_left_out(path, left_out, "are no events of tracepoints")
    print(f"{out}: {out.stat().st_size:,} bytes", file=sys.stderr)


def _kernel_of(trace: Trace) -> tuple[Kernel, bool]:
    """Return the kernel in whose form the events of a trace are written, and whether the trace names it."""
    from traces import kernels

    known = bool(trace.metadata.kernel)
    return (kernels.recorded(trace.metadata) if known else kernels.at(_NEWEST)), known


def _say_left_out(path: Path, left_out: dict[str, int], why: str) -> None:
    if left_out:
        most = sorted(left_out.items(), key=lambda item: -item[1])
        lines = some([f"{printable(name)} {rows:,}" for name, rows in most])
        print(f"kvmtrace: {path}: {sum(left_out.values()):,} rows {why}: {lines}", file=sys.stderr)


def perfetto(
    path: Path,
    out: Path,
    selection: Selection = ALL,
    guest: GuestFile | None = None,
    *,
    force: bool = False,
    recorded_policy: str = "",
) -> None:
    """Write the time line of a recording or a replay for ui.perfetto.dev; remarks go to standard error."""
    from analysis.perfetto import export

    source = open_source(path, recorded_policy, selection)
    if isinstance(source, Result) and guest is not None:
        raise Problem(f"{path}: a result has no rows of a guest: --guest is for traces")
    told = use_guest(source, guest) if isinstance(source, Recording) else []
    remarks = [*told, *export(source, out, force=force)]
    for remark in remarks:
        print(f"kvmtrace: {path}: {remark}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size:,} bytes", file=sys.stderr)
