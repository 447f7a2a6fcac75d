# SPDX-License-Identifier: Apache-2.0
"""The data of trace-cmd and perf to rows: read as they are, no tool is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from traces.columns import kind_name
from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.imports.event_fields import SYSTEMS, RawFields
from traces.imports.findings import Findings
from traces.imports.form_program import RUNS_GUEST
from traces.imports.other_events import OTHER
from traces.imports.perf_data import PerfData
from traces.imports.row_spool import RowSpool
from traces.imports.source_bytes import Damaged, SourceBytes
from traces.imports.thread_vms import TextThread, threads_of
from traces.imports.time_order import Rows
from traces.imports.trace_dat import TraceDat
from traces.record import Columns

TRACE_DAT: Final = "trace.dat"
PERF_DATA: Final = "perf.data"
_RUNS_GUEST: Final = np.isin(np.arange(256), RUNS_GUEST)


def read_binary(kind: str, source: SourceBytes, spool: RowSpool, progress: Progress) -> Findings:
    """Put the rows of a trace.dat or perf.data into the spool; what else was found. Raises Problem."""
    reader: TraceDat | PerfData | None = None
    seen, cut = _Threads(), ""
    try:
        reader = TraceDat(source, spool.texts) if kind == TRACE_DAT else PerfData(source, spool.texts)
        for rows in reader.batches():
            seen.see(rows)
            spool.add(_columns(rows))
            progress.at(spool.rows)
    except (Damaged, IndexError, OverflowError) as damage:  # numbers out of range, which every access is checked for
        if not spool.known:
            raise Problem(f"nothing to import, but a damaged {kind}: {damage}") from None
        cut = f"the {kind} is damaged: {damage}"
    except Problem as problem:
        raise Problem(f"nothing to import: {problem}") from None
    assert reader is not None
    decoder, facts = reader.decoder, reader.facts
    counts = {
        reader.fields.names.get(int(n), f"event {n}"): int(decoder.others[n]) for n in np.flatnonzero(decoder.others)
    }
    found = Findings(
        kind=kind,
        threads=seen.threads(reader.threads),
        others=counts,
        lines=spool.rows,
        raw=spool.known,
        odd=decoder.odd,
        lost=decoder.lost,
        uncounted=decoder.uncounted,
        backwards=reader.order.late,
        vendors=decoder.vendors,
        release=facts.release,
        clock=facts.clock,
        cut=cut,
        watched=_watched(reader.fields, counts),
    )
    if isinstance(reader, TraceDat):
        found.overrun, found.synced = reader.facts.overrun, reader.synced
        found.odd += reader.odd_pages
        found.vm_of = {tid: name for name, tids in reader.facts.guests.items() for tid in tids if tid}
        found.how = [f"buffer {name}" for name in reader.facts.buffers if name]
    else:
        found.odd += reader.odd_samples
        found.how = [how for how, so in (("stream", reader.facts.piped), ("zstd", reader.facts.compressed)) if so]
    return found


def _watched(fields: RawFields, others: Mapping[str, int]) -> frozenset[str]:
    """The kinds whose events were switched on: a file has the formats of the events that it was to have.

    `trace-cmd extract` writes those of all that the kernel has, instead: then some whole system has no event.
    """
    seen = {system for system, names in fields.systems.items() if any(name in others for name in names)}
    if any(system not in seen for system in fields.systems if system not in (*SYSTEMS, "ftrace")):
        return frozenset()
    return frozenset(kind_name(int(code)) for code in fields.kinds[:, 0])


def _columns(rows: Rows) -> Columns:
    assert rows.dtype.names is not None
    return {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names}


class _Threads:
    """Which threads there are, their processes and vCPUs, as rows say."""

    def __init__(self) -> None:
        self._facts: dict[int, tuple[int, int, bool, bool]] = {}  # process, vCPU, runs a guest, has an event of KVM

    def see(self, rows: Rows) -> None:
        guest = _RUNS_GUEST[rows["kind"]] | (rows["vcpu"] >= 0)
        other = rows["kind"] == OTHER
        for chosen in (guest, ~guest & ~other, other):
            keys = rows[["tid", "tgid", "vcpu"]][chosen]
            if not len(keys):
                continue
            change = np.append(True, (keys["tid"][1:] != keys["tid"][:-1]) | (keys["vcpu"][1:] != keys["vcpu"][:-1]))
            for tid, tgid, vcpu in set(keys[change].tolist()):
                before = self._facts.get(tid, (0, -1, False, False))
                runs, acted = before[2] or chosen is guest, before[3] or chosen is not other
                self._facts[tid] = (tgid or before[0], vcpu if vcpu >= 0 else before[1], runs, acted)

    def threads(self, named: dict[int, tuple[int, bytes]]) -> list[TextThread]:
        nobody = (0, b"")
        return threads_of(
            (tid, named.get(tid, nobody)[1], tgid or named.get(tid, nobody)[0], vcpu, runs, acted)
            for tid, (tgid, vcpu, runs, acted) in self._facts.items()
            if tid
        )
