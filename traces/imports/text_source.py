# SPDX-License-Identifier: Apache-2.0
"""A text to rows: pieces of it to the scanner, the scanner's rows to the spool."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from traces.background import read_ahead
from traces.command_line.progress import Progress
from traces.imports.findings import Findings
from traces.imports.form_program import program
from traces.imports.opening import STANDARD_INPUT, Opened
from traces.imports.other_events import OTHER
from traces.imports.row_spool import RowSpool
from traces.imports.scan import Scanner
from traces.imports.thread_vms import threads_of

_MOST_LEFT: Final = 1 << 20  # bytes: no line is so long
# The kernel, as the headings of a latency tracer's text and of `perf script --header` name it.
_RELEASE: Final = re.compile(rb"^# (?:.{0,40} latency trace v\S+ on|os release :) (\d+\.\d+[\w.+~-]{0,100})\s*$", re.M)


def read_text(opened: Opened, spool: RowSpool, progress: Progress) -> Findings:
    """Put a text's rows into the spool; what else was found."""
    scanner, left = Scanner(), b""
    pieces = opened.pieces()
    for piece in pieces if opened.path == STANDARD_INPUT else read_ahead(pieces):  # a pipe may never say more
        left = _lines(scanner, left + piece, spool, final=False)
        progress.at(spool.rows)
    _lines(scanner, left, spool, final=True)
    _move(scanner, spool, scanner.rows)
    release = _RELEASE.search(opened.head)
    rows = zip(program().order, scanner.forms.tolist(), strict=True)
    return Findings(
        threads=threads_of(
            (tid, comm, tgid - 1, vcpu - 1, bool(guest), bool(acted))
            for (tid, comm), (tgid, vcpu, guest, acted) in zip(
                scanner.threads, scanner.thread_facts[: len(scanner.threads)].tolist(), strict=True
            )
        ),
        others=scanner.others(),
        forms={form: count for form, count in rows if count},
        lines=scanner.lines,
        raw=scanner.raw,
        odd=scanner.odd,
        first_odd=scanner.first_odd,
        joined=scanner.joined,
        lost=scanner.lost,
        uncounted=scanner.uncounted,
        backwards=scanner.backwards,
        bare=scanner.bare,
        ticks=scanner.ticks,
        relative=scanner.relative,
        vendors=scanner.by_vendor,
        cut=opened.cut,
        release=release[1].decode() if release else "",
        cut_short=scanner.cut,
    )


def _lines(scanner: Scanner, data: bytes, spool: RowSpool, *, final: bool) -> bytes:
    """Read whole lines; what is left of them."""
    at = 0
    while True:
        before, rows = at, scanner.rows
        at = scanner.take(data, at, final)
        if scanner.full:
            _move(scanner, spool, scanner.rows - 1)
        elif at >= len(data) or (at == before and scanner.rows == rows):
            break
    if len(data) - at > _MOST_LEFT:
        scanner.too_long(data[at : at + 200])
        return b""
    return data[at:]


def _move(scanner: Scanner, spool: RowSpool, count: int) -> None:
    """Put the first rows into the spool; the last one stays, as long as the next line may change it."""
    columns = {name: values[:count].copy() for name, values in scanner.columns.items()}
    others = np.flatnonzero(columns["kind"] == OTHER)
    if len(others):
        columns["w0"][others], columns["w1"][others] = spool.texts.add(scanner.texts[: len(others)])
        del scanner.texts[: len(others)]
    spool.add(columns)
    for values in scanner.columns.values():
        values[: scanner.rows - count] = values[count : scanner.rows]
    scanner.rows -= count
