# SPDX-License-Identifier: Apache-2.0
"""From a recording's segments to one Parquet trace, on a clean end and after a crash alike.

Rows stream through in ring order; what is held is at most BUFFERED_ROWS rows, and one row group that is being written.
Rows of one VM share row groups, so that a reader of one VM reads nothing else and neighbouring values stay close to
each other.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces import kernels
from traces.background import read_ahead
from traces.columns import NamedBatch, common, to_named
from traces.encoding import ROW_GROUP_ROWS, TraceFile
from traces.errors import Problem
from traces.kernels import Kernel, stored
from traces.kernels.policy_rows import KINDS, PolicyRow, Watch
from traces.lives import Ints, dense
from traces.metadata import KEY
from traces.outputs import Unwritable
from traces.record import Columns
from traces.recording.bookkeeping import MAX_ENTRIES, Books
from traces.recording.identity import Identities, VmIdentity
from traces.recording.memslots import MAX_SLOTS, Memslots
from traces.recording.recording_summary import Summary
from traces.recording.segments import SegmentReader
from traces.schema import BY_CODE, BY_NAME, FORMAT_MAJOR, FORMAT_MINOR
from traces.text import printable
from traces.untrusted import object_at, text_at

BUFFERED_ROWS: Final = 2 * ROW_GROUP_ROWS
_TOGETHER: Final = 1 << 15  # rows: fewer wait for more of their VM, so that many VMs cost a row as much as one

_POLICY_CODES: Final = [BY_NAME[kind].code for kind in KINDS]

# What compaction uses up. Snapshots hold kernel addresses, which are not for a file that gets mailed around.
_WORKING_KEYS: Final = ("snapshot", "closed")


@dataclass
class _Partition:
    """Rows of one VM that wait for their row group, in ring order: batches of the trace, and what is none yet."""

    batches: list[NamedBatch] = field(default_factory=list)
    parts: list[tuple[Columns, Ints, Ints]] = field(default_factory=list)  # columns, row numbers, root ids
    in_parts: int = 0  # rows
    rows: int = 0  # of both

    def add(self, columns: Columns, seq: Ints, root: Ints, vm: int) -> None:
        self.parts.append((columns, seq, root))
        self.in_parts += len(seq)
        self.rows += len(seq)
        if self.in_parts >= _TOGETHER:
            self.name(vm)

    def name(self, vm: int) -> None:
        """Make a batch of what is none yet: while it is in the processor's cache, where it came as a batch."""
        if not self.parts:
            return
        columns, seq, root = self.parts[0]
        if len(self.parts) > 1:
            columns = {name: np.concatenate([part[0][name] for part in self.parts]) for name in columns}
            seq, root = (np.concatenate([part[index] for part in self.parts]) for index in (1, 2))
        self.batches.append(to_named(columns, seq, vm, root))
        self.parts, self.in_parts = [], 0


def compact(directory: Path, out: Path) -> Summary:
    """Write the recording in `directory` as the trace `out`; the directory is left as it is.

    Reads every sealed batch, so a killed or damaged recording yields what can be had, marked as not complete. `out`
    appears only when it is whole. Raises Problem where there is no recording, or where `out` cannot be written.
    """
    reader = SegmentReader(directory)
    try:
        file = TraceFile(out)
        try:
            return _Compaction(reader, file).run()
        finally:
            file.discard()
    except Unwritable as error:
        raise Problem(
            f"{error}: the recording is safe in {directory}; fix that and run `kvmtrace recover {directory}`"
        ) from error


class _Compaction:
    def __init__(self, reader: SegmentReader, file: TraceFile) -> None:
        self._reader = reader
        self._file = file
        self._snapshot = _snapshot(reader.manifest)
        self._identities = Identities(self._snapshot)
        self._books = Books()
        self._slots = Memslots()
        self._waiting: dict[int, _Partition] = {}
        self._buffered = 0
        self._row_groups: list[dict[str, Any]] = []
        self._missing = 0  # rows between batches that could be read
        self._kernel: Kernel | None = None  # a damaged manifest may not say which it was
        with contextlib.suppress(Problem):
            self._kernel = kernels.described(reader.manifest)
        policy, invalid = (self._kernel.policy, self._kernel.layout.invalid) if self._kernel else ("unknown", 0)
        self._watch = Watch(policy, invalid)

    def run(self) -> Summary:
        expected = 0
        for first, columns in read_ahead(self._reader.batches()):
            self._missing += first - expected
            expected = first + len(columns["time"])
            vm, root = self._identities.resolve(columns, first)
            self._see_policy(columns, root)
            self._books.add(columns, vm)
            self._slots.add(columns, vm)
            self._partition(columns, np.arange(first, expected), vm, root)
        for owner in sorted(self._waiting):
            self._write_row_group(owner)
        return self._finish()

    def _see_policy(self, columns: Columns, root: Ints) -> None:
        """Whether the rows bear out the root policy that the recorder took from the kernel's types."""
        if self._watch.settled:
            return
        begun = {vm.id for vm in self._identities.vms if vm.origin != "created"}
        self._watch.known |= {each.id for each in self._identities.uncreated if each.vm in begun}
        at = np.flatnonzero(np.isin(columns["kind"], _POLICY_CODES))
        values = (columns["kind"][at], columns["tid"][at], root[at], columns["role"][at], columns["n"][at])
        self._watch.see(
            PolicyRow(BY_CODE[kind].name, *rest)
            for kind, *rest in zip(*(part.tolist() for part in values), strict=True)
        )

    def _policy(self) -> dict[str, Any]:
        """The metadata's `policy` where the rows decide it: another one than by the kernel's types, or the same."""
        if self._watch.other:
            why = f"its rows: references on roots, and who zaps them ({self._watch.found} by the kernel's types)"
            return {"policy": {"name": self._watch.other, "why": why, "by": "rows"}}
        recorded = self._reader.manifest.get("policy")
        if self._watch.bears_out and isinstance(recorded, dict):
            return {"policy": {**recorded, "by": "rows"}}
        return {}

    def _partition(self, columns: Columns, seq: Ints, vm: Ints, root: Ints) -> None:
        owners = sorted(dense(vm)[1].tolist())
        for owner in owners:
            part = (columns, seq, root)
            if len(owners) > 1:
                rows = np.flatnonzero(vm == owner)
                part = ({name: values[rows] for name, values in columns.items()}, seq[rows], root[rows])
            waiting = self._waiting.setdefault(owner, _Partition())
            waiting.add(*part, owner)
            self._buffered += len(part[1])
            if waiting.rows >= ROW_GROUP_ROWS:
                self._write_row_group(owner)
        while self._buffered > BUFFERED_ROWS:
            self._write_row_group(max(self._waiting, key=lambda owner: self._waiting[owner].rows))

    def _write_row_group(self, vm: int) -> None:
        waiting = self._waiting.pop(vm)
        self._buffered -= waiting.rows
        waiting.name(vm)
        batches = waiting.batches
        self._row_groups.append(
            {
                "vm": vm or None,
                "rows": waiting.rows,
                "first_seq": batches[0].first_seq,
                "last_seq": batches[-1].last_seq,
                "first_time": min(batch.first_time for batch in batches),
                "last_time": max(batch.last_time for batch in batches),
                "constants": common(batches),
            }
        )
        self._file.write([batch.rows for batch in batches])

    def _finish(self) -> Summary:
        discrepancies = self._cuts()
        loss, unbalanced = self._books.loss(self._reader.manifest.get("loss"))
        if not discrepancies:  # of a killed recording the counts on disk are old
            discrepancies = unbalanced
        manifest = {key: value for key, value in self._reader.manifest.items() if key not in _WORKING_KEYS}
        metadata = manifest | {
            "format": {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR},
            "events": self._books.events,
            "kinds": self._books.kinds(),
            "complete": not discrepancies,
            "discrepancies": discrepancies,
            "cut": self._cut(),
            "vms": [self._vm(vm) for vm in self._identities.vms],
            "roots": self._roots(),
            "threads": self._books.threads(_comms(self._reader.manifest)),
            "loss": loss,
            "gaps": self._books.gaps,
            "gap_count": self._books.gap_count,
            **({"left_out": self._books.left_out} if self._books.left_out else {}),
            "row_groups": [group | place for group, place in zip(self._row_groups, self._file.places(), strict=True)],
        }
        metadata |= self._policy()
        if self._kernel is not None:
            metadata["kernel"] = stored.document(kernels.described(metadata))
        text = json.dumps(metadata, separators=(",", ":"), ensure_ascii=False)
        size = self._file.finish({KEY: text.encode(errors="backslashreplace")})  # lone surrogates stay JSON escapes
        lost = sum(sum(kind["lost"].values()) for kind in loss.values())
        return Summary(self._file.path, self._books.events, lost, size, not discrepancies, tuple(discrepancies))

    def _cut(self) -> dict[str, Any]:
        damaged = [segment for segment in self._reader.segments if segment.why]
        return {
            "rows_missing": self._missing,
            "bytes_unread": sum(segment.unread for segment in self._reader.segments),
            "segments": [{"name": s.name, "rows": s.rows, "unread": s.unread, "why": s.why} for s in damaged],
        }

    def _cuts(self) -> list[str]:
        """Why these rows are not all that the recorder took, one line each."""
        lines = [self._reader.manifest_problem] if self._reader.manifest_problem else []
        lines += [
            f"{segment.name}: {segment.why}: {segment.unread:,} bytes not read"
            for segment in self._reader.segments
            if segment.why
        ]
        closed = self._reader.manifest.get("closed")
        if not isinstance(closed, dict):
            lines.append("the recorder did not end: what came after its last flush is missing")
        elif closed.get("rows") != self._books.events:
            lines.append(f"the recorder took {printable(closed.get('rows'))} rows, {self._books.events} could be read")
        return lines

    def _vm(self, vm: VmIdentity) -> dict[str, Any]:
        given = self._snapshot[vm.id - 1] if vm.id <= len(self._snapshot) else {}
        extra = {key: value for key, value in given.items() if key not in ("kvm", "tgid", "slots", "vcpus", "roots")}
        slots = self._slots.of_vm(vm.id, given.get("slots", ()))
        vcpus = {(vcpu["id"], vcpu["tid"]): vcpu for vcpu in given.get("vcpus", ())}
        vcpus |= {(vcpu["id"], vcpu["tid"]): vcpu for vcpu in self._books.vcpus(vm.id)}
        name = text_at(object_at(self._reader.manifest, "vm_names"), str(vm.tgid))
        return extra | {
            "id": vm.id,
            "pid": vm.tgid,
            "comm": str(extra.get("comm") or _comms(self._reader.manifest).get(vm.tgid, "")),
            **({"name": name} if name else {}),
            "origin": vm.origin,
            "since": vm.since,
            "until": vm.until,
            "vcpus": [vcpus[key] for key in sorted(vcpus)],
            "slots": slots[:MAX_SLOTS],
            "slots_omitted": max(0, len(slots) - MAX_SLOTS),
        }

    def _roots(self) -> dict[str, Any]:
        """Roots created in the recording are in the rows; those already there are only here."""
        uncreated = self._identities.uncreated[:MAX_ENTRIES]
        return {
            "count": self._identities.root_count,
            "uncreated": [vars(root) | {"vm": root.vm or None} for root in uncreated],
            "uncreated_omitted": len(self._identities.uncreated) - len(uncreated),
        }


def _snapshot(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The VMs alive at the start; entries of a damaged or foreign manifest that make no sense are left out."""
    snapshot = manifest.get("snapshot")
    vms = snapshot.get("vms") if isinstance(snapshot, dict) else None
    return [vm for vm in vms if _is_vm(vm)] if isinstance(vms, list) else []


def _is_vm(vm: Any) -> bool:
    def counts(row: Any, *names: str) -> bool:
        return isinstance(row, dict) and all(
            isinstance(row.get(name), int) and 0 <= row[name] < 1 << (32 if name == "role" else 63) for name in names
        )

    def entries(key: str, *names: str) -> bool:
        rows = vm.get(key, [])
        return isinstance(rows, list) and all(counts(row, *names) for row in rows)

    return (
        isinstance(vm, dict)
        and isinstance(vm.get("kvm"), int)  # a kernel address: the upper half of 64 bits
        and counts(vm, "tgid")
        and entries("vcpus", "id", "tid")
        and entries("slots", "slot", "as_id", "gfn", "pages", "hva")
        and entries("roots", "table", "role")
    )


def _comms(manifest: Mapping[str, Any]) -> dict[int, str]:
    """Thread names by tid, as far as the recorder gave them: {"threads": {tid: {"comm": ...}}}."""
    threads = manifest.get("threads")
    comms = {}
    for tid, thread in threads.items() if isinstance(threads, dict) else ():
        if re.fullmatch(r"[0-9]{1,10}", tid) and isinstance(thread, dict) and isinstance(thread.get("comm"), str):
            comms[int(tid)] = thread["comm"]
    return comms
