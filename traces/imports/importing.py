# SPDX-License-Identifier: Apache-2.0
"""From what others recorded to a trace: to records in one pass, threads to VMs and vCPUs, then compaction as of any
recording.

Whom a thread belongs to is known only when all of a source is read, so records wait in a temporary file. Nothing is
held in memory but a piece of the source, a batch of records and the tables of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces import kernels
from traces.columns import kind_name
from traces.command_line.progress import Progress
from traces.encoding import TraceFile
from traces.errors import Problem
from traces.imports.findings import Findings
from traces.imports.manifest import Said, manifest
from traces.imports.opening import Opened
from traces.imports.other_events import OTHER
from traces.imports.root_order import RootOrder, level_of_roots
from traces.imports.row_spool import RowSpool
from traces.imports.shadow_mmu import shows_shadow_mmu
from traces.imports.thread_vms import Assigned, Machine, assign
from traces.imports.told import ToldOfText
from traces.kernels import Kernel
from traces.kernels.fold import parse_version
from traces.kernels.policies import SHADOW
from traces.kernels.vendors import SVM, VMX
from traces.lives import dense
from traces.outputs import IMPORTED, check
from traces.record import Columns
from traces.recording.compact import _Compaction
from traces.recording.recording_summary import Summary
from traces.recording.segments import Segment, SegmentReader
from traces.schema import BY_NAME, KINDS
from traces.text import count

_GAP: Final = BY_NAME["gap"].code
_SHOWN: Final = sum(1 << kind.code for kind in KINDS if kind.code < 40)  # a gap may have had any tracepoint


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    summary: Summary
    said: Said


def import_file(path: Path, out: Path, options: ToldOfText, *, force: bool = False) -> Imported:
    """Write the trace of a text, a trace.dat or a perf.data; `path` may be `-`.

    Raises Problem where there is no event of KVM in it.
    """
    check(out, IMPORTED, [path], force=force)
    kernel = _kernel(options.kernel)
    opened = Opened(path)
    try:
        with tempfile.TemporaryFile(prefix="kvmtrace-") as file, Progress(f"reading {path}") as progress:
            spool = RowSpool(file)
            found = read(opened, spool, progress)
            if not spool.known:
                raise Problem(_nothing(path, found))
            if found.release and not options.kernel:
                options = replace(options, kernel=found.release)
                kernel = _kernel(options.kernel)
            options = replace(options, vm_of={**found.vm_of, **options.vm_of})
            return _write(found, spool, out, opened, options, kernel, progress, force)
    finally:
        opened.close()


def read(opened: Opened, spool: RowSpool, progress: Progress) -> Findings:
    """Put the rows of what was opened into the spool, whatever it is; what else was found. Raises Problem."""
    if opened.binary:
        from traces.imports.binary_source import read_binary

        try:
            return read_binary(opened.binary, opened.whole(), spool, progress)
        except Problem as problem:
            raise Problem(f"{opened.path}: {problem}") from None
    from traces.imports.text_source import read_text

    opened.check_text()
    return read_text(opened, spool, progress)


def _kernel(release: str, vendor: str = "") -> Kernel | None:
    """What is known of a kernel; None: nothing, it is older than what is described. Raises Problem for what is none."""
    if not release:
        return None
    parse_version(release)
    try:
        return kernels.at(release, kernels.Facts(cpu=vendor))
    except Problem:
        return None


def _nothing(path: Path, found: Findings) -> str:
    if found.others:
        names = ", ".join(list(found.others)[:3])
        rows = sum(found.others.values())
        return f"{path}: nothing to import: no event that a trace has, but {count(rows, 'other')} ({names})"
    if found.kind != "text":
        other = "damaged, or samples of a counter, such as `perf kvm --guest` takes"
        but = f", but {count(found.odd, 'record')} without a tracepoint's data: {other}" if found.odd else ""
        return f"{path}: nothing to import: no event in this {found.kind}{but}"
    first = found.first_odd.decode(errors="replace")
    shown = repr(first[:60])  # a byte that is not printed becomes four
    said = f"; its first line is {shown if len(shown) <= 80 else shown[:77] + '...'}" if first else ""
    return f"{path}: nothing to import: no line of ftrace, trace-cmd or perf with an event of KVM{said}"


def _write(
    found: Findings,
    spool: RowSpool,
    out: Path,
    opened: Opened,
    options: ToldOfText,
    kernel: Kernel | None,
    progress: Progress,
    force: bool,
) -> Imported:
    assigned = assign(found.threads, options.vm_of)
    vmx, svm = found.vendors.tolist()
    vendor = "" if not svm and not vmx else (SVM if svm > vmx else VMX).cpu
    kernel = _kernel(options.kernel, vendor) or kernel
    if kernel is not None and shows_shadow_mmu(kernel, spool):
        kernel = replace(kernel, policy=SHADOW.name, root_get_page=True)
    level = level_of_roots(kernel, spool.root_level, spool.kinds)
    roots = RootOrder(kernel, level)
    source = _Records(spool, assigned, roots, kernel, progress)
    said = Said(opened.path, [*opened.how, *found.how], found, assigned, options, kernel, vendor, bool(level))
    source.manifest = manifest(said, source.machines, source.kinds())
    source.manifest_problem = f"imported, and {found.cut}" if found.cut else ""
    file = TraceFile(out, IMPORTED, force=force, texts=spool.texts if spool.known < spool.rows else None)
    try:
        progress.say(f"writing {out}")
        return Imported(_Compaction(source, file).run(), said)
    finally:
        file.discard()
        spool.texts.close()


class _Records(SegmentReader):
    """Stands where compaction expects a recording's segments: the spool's records, with VMs, vCPUs and roots."""

    def __init__(
        self, spool: RowSpool, assigned: Assigned, roots: RootOrder, kernel: Kernel | None, progress: Progress
    ) -> None:
        self.segments: list[Segment] = []
        self.manifest_problem = ""
        self.manifest: dict[str, Any] = {}
        self.machines = assigned.machines or (Machine(),)
        self._spool, self._assigned, self._roots, self._progress = spool, assigned, roots, progress
        self._counts = np.zeros((256, 1 << 12), np.int64)  # kind, CPU
        self._lost: dict[str, int] = {}
        self._kernel = kernel

    def kinds(self) -> dict[str, int]:
        """Rows by kind."""
        totals = self._spool.kinds
        return {kind_name(code): int(totals[code]) for code in np.flatnonzero(totals).tolist()}

    def batches(self) -> Iterator[tuple[int, Columns]]:
        written = 0
        for columns in self._spool.batches():
            count = len(columns["time"])
            self._spool.texts.place(columns, written)
            vm = self._name(columns)
            columns["kvm"] = vm.astype(np.uint64)
            self._roots.fill(columns, vm)
            self._count(columns)
            yield written, columns
            written += count
            self._progress.at(written)
        self.manifest |= {"closed": {"rows": written}, "finished": True, "loss": self._loss()}
        if self._kernel is not None and (policy := self._roots.kept.policy(self._kernel.policy)):
            self.manifest["policy"] = policy

    def _name(self, columns: Columns) -> NDArray[np.int64]:
        """Fill in vCPUs and processes by thread; each row's VM."""
        thread, tids = dense(columns["tid"])
        vm, vcpu, tgid = (each[thread] for each in self._assigned.of(tids.astype(np.int64)))
        if len(self.machines) == 1:  # lines that name no thread
            vm = np.where(columns["tid"] == 0, 1, vm)
        gap = (columns["kind"] == _GAP) | (columns["kind"] == OTHER)
        named = columns["vcpu"] >= 0
        columns["vcpu"] = np.where(gap, -1, np.where(named, columns["vcpu"], vcpu)).astype(np.int16)
        columns["tgid"] = np.where(gap, 0, tgid).astype(np.uint32)
        columns["w1"] = np.where(columns["kind"] == _GAP, np.uint64(_SHOWN), columns["w1"])
        vm[gap] = 0
        return vm

    def _count(self, columns: Columns) -> None:
        cpu = np.minimum(columns["cpu"].astype(np.int64), (1 << 12) - 1)
        columns["cpu"] = cpu.astype(np.uint16)
        cpus = int(cpu.max()) + 1
        cells = columns["kind"].astype(np.int64) * cpus + cpu
        self._counts[:, :cpus] += np.bincount(cells, minlength=256 * cpus).reshape(256, cpus)
        for row in np.flatnonzero(columns["kind"] == _GAP).tolist():
            name = str(int(cpu[row]))
            self._lost[name] = self._lost.get(name, 0) + int(columns["w0"][row])

    def _loss(self) -> dict[str, Any]:
        """Of which kinds the lost events were is not known."""
        loss: dict[str, Any] = {}
        for code, cpu in np.argwhere(self._counts).tolist():
            if code not in (_GAP, OTHER):
                counts = loss.setdefault(kind_name(code), {"emitted": {}, "lost": {}})
                counts["emitted"][str(cpu)] = int(self._counts[code, cpu])
        if any(self._lost.values()):
            loss["unknown"] = {"emitted": dict(self._lost), "lost": dict(self._lost)}
        return loss
