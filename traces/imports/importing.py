"""From a text to a trace: lines to records in one pass, threads to VMs and vCPUs, then compaction as of any recording.

Whom a thread belongs to is known only when all of the text is read, so records wait in a temporary file. Nothing is
held in memory but a piece of the text, a batch of records and the tables of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces import kernels
from traces.columns import kind_name
from traces.compact import Summary, _Compaction
from traces.encoding import TraceFile
from traces.errors import Problem
from traces.imports.form_program import ROLE_FIELDS, TEXT_ROLE, program
from traces.imports.manifest import Said, manifest
from traces.imports.opening import Opened
from traces.imports.root_order import RootOrder
from traces.imports.scan import Scanner
from traces.imports.thread_vms import Assigned, Machine, assign, threads_of
from traces.imports.told import ToldOfText
from traces.kernels import Kernel
from traces.kernels.fold import parse_version
from traces.kernels.vendors import SVM, VMX
from traces.outputs import IMPORTED, check
from traces.progress import Progress
from traces.record import Columns
from traces.schema import BY_NAME, KINDS, RECORD_FIELDS
from traces.sealed_stream import RECORD_SCHEMA, to_columns
from traces.segments import Segment, SegmentReader

_GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
_GAP: Final = BY_NAME["gap"].code
_SHOWN: Final = sum(1 << kind.code for kind in KINDS if kind.code < 40)  # a gap may have had any tracepoint
_ROOT_LEVELS: Final = (4, 5)


@dataclass(frozen=True)
class Imported:
    """What an import came to."""

    summary: Summary
    said: Said


def import_text(path: Path, out: Path, options: ToldOfText, *, force: bool = False) -> Imported:
    """Write the trace of a text; `path` may be `-`. Raises Problem where there is no event of KVM in it."""
    check(out, IMPORTED, [path], force=force)
    opened = Opened(path)
    try:
        if opened.release and not options.kernel:
            options = replace(options, kernel=opened.release)
        kernel = _kernel(options.kernel)
        opened.check_text()
        with tempfile.TemporaryFile(prefix="kvmtrace-") as spool, Progress(f"reading {path}") as progress:
            scanned = _scan(opened, spool, progress)
            if not scanned.records:
                raise Problem(_nothing(path, scanned.scanner))
            return _write(scanned, spool, out, opened, options, kernel, progress, force)
    finally:
        opened.close()


def _kernel(release: str, vendor: str = "") -> Kernel | None:
    """What is known of a kernel; None: nothing, it is older than what is described. Raises Problem for what is none."""
    if not release:
        return None
    parse_version(release)
    try:
        return kernels.at(release, kernels.Facts(cpu=vendor))
    except Problem:
        return None


@dataclass
class _Scanned:
    scanner: Scanner
    records: int = 0
    root_level: int = 0
    kinds: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))


def _scan(opened: Opened, spool: Any, progress: Progress) -> _Scanned:
    scanner = Scanner()
    found = _Scanned(scanner)
    left = b""
    with pa.ipc.new_stream(spool, RECORD_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        for piece in opened.pieces():
            left = _lines(scanner, left + piece, found, stream, final=False)
            progress.at(found.records)
        _lines(scanner, left, found, stream, final=True)
        _flush(scanner, found, stream, scanner.rows)
    return found


def _lines(scanner: Scanner, data: bytes, found: _Scanned, stream: Any, *, final: bool) -> bytes:
    """Read whole lines; what is left of them."""
    at = 0
    while True:
        before, rows = at, scanner.rows
        at = scanner.take(data, at, final)
        if scanner.full:
            _flush(scanner, found, stream, scanner.rows - 1)
        elif at >= len(data) or (at == before and scanner.rows == rows):
            break
    if len(data) - at > 1 << 20:  # no line is so long
        scanner.too_long(data[at : at + 200])
        return b""
    return data[at:]


def _flush(scanner: Scanner, found: _Scanned, stream: Any, count: int) -> None:
    """Put the first rows into the spool; the last one stays, as long as the next line may change it."""
    if not count:
        return
    columns = {name: values[:count] for name, values in scanner.columns.items()}
    views = {"n": np.int32, "vcpu": np.int16}
    arrays = []
    for name, dtype in RECORD_FIELDS:
        values = columns.get(name)
        data = np.zeros(count, dtype) if values is None else values.view(views.get(name, values.dtype)).copy()
        arrays.append(pa.array(data))
    stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=RECORD_SCHEMA))
    found.records += count
    found.kinds += np.bincount(columns["kind"], minlength=256)
    made = (columns["kind"] == _GET_PAGE) & (columns["flags"] & 1 != 0)
    role = columns["role"]
    shift = np.where(role & TEXT_ROLE, ROLE_FIELDS["direct"][0], 7)  # the same bit in every kernel's word
    levels = columns["level"][made & ((role >> shift) & 1 != 0)]
    highest = int(levels.max(initial=0))
    found.root_level = max(found.root_level, highest if highest in _ROOT_LEVELS else 0)
    for values in scanner.columns.values():
        values[: scanner.rows - count] = values[count : scanner.rows]
    scanner.rows -= count


def _nothing(path: Path, scanner: Scanner) -> str:
    others = scanner.others()
    if others:
        names = ", ".join(list(others)[:3])
        return f"{path}: nothing to import: no event that a trace has, but {sum(others.values()):,} others ({names})"
    first = scanner.first_odd.decode(errors="replace")
    said = f"; its first line is {first[:60]!r}" if first else ""
    return f"{path}: nothing to import: no line of ftrace, trace-cmd or perf with an event of KVM{said}"


def _write(
    scanned: _Scanned,
    spool: Any,
    out: Path,
    opened: Opened,
    options: ToldOfText,
    kernel: Kernel | None,
    progress: Progress,
    force: bool,
) -> Imported:
    scanner = scanned.scanner
    threads = threads_of(scanner.threads, scanner.thread_facts)
    assigned = assign(threads, options.vm_of)
    svm, vmx = int(scanner.by_vendor[1]), int(scanner.by_vendor[0])
    vendor = "" if not svm and not vmx else (SVM if svm > vmx else VMX).cpu
    kernel = _kernel(options.kernel, vendor) or kernel
    roots = RootOrder(kernel, scanned.root_level)
    source = _Records(spool, assigned, roots, scanned.kinds, progress)
    said = Said(opened, scanner, program().order, assigned, options, kernel, vendor, bool(scanned.root_level))
    source.manifest = manifest(said, source.machines, source.kinds())
    source.manifest_problem = f"imported, and {opened.cut}" if opened.cut else ""
    file = TraceFile(out, IMPORTED, force=force)
    try:
        progress.say(f"writing {out}")
        return Imported(_Compaction(source, file).run(), said)
    finally:
        file.discard()


class _Records(SegmentReader):
    """Stands where compaction expects a recording's segments: the spool's records, with VMs, vCPUs and roots."""

    def __init__(
        self, spool: Any, assigned: Assigned, roots: RootOrder, kinds: NDArray[np.int64], progress: Progress
    ) -> None:
        self.segments: list[Segment] = []
        self.manifest_problem = ""
        self.manifest: dict[str, Any] = {}
        self.machines = assigned.machines or (Machine(),)
        self._spool, self._assigned, self._roots, self._progress = spool, assigned, roots, progress
        self._totals = kinds
        self._counts = np.zeros((256, 1 << 12), np.int64)  # kind, CPU
        self._lost: dict[str, int] = {}

    def kinds(self) -> dict[str, int]:
        """Rows by kind."""
        return {kind_name(code): int(self._totals[code]) for code in np.flatnonzero(self._totals).tolist()}

    def batches(self) -> Iterator[tuple[int, Columns]]:
        written = 0
        for columns in self._read():
            count = len(columns["time"])
            vm = self._name(columns)
            columns["kvm"] = vm.astype(np.uint64)
            self._roots.fill(columns, vm)
            self._count(columns)
            yield written, columns
            written += count
            self._progress.at(written)
        self.manifest |= {"closed": {"rows": written}, "finished": True, "loss": self._loss()}

    def _read(self) -> Iterator[Columns]:
        self._spool.seek(0)
        with pa.ipc.open_stream(self._spool) as stream:
            for batch in stream:
                yield {name: values.copy() for name, values in to_columns(batch).items()}

    def _name(self, columns: Columns) -> NDArray[np.int64]:
        """Fill in vCPUs and processes by thread; each row's VM."""
        vm, vcpu, tgid = self._assigned.of(columns["tid"].astype(np.int64))
        if len(self.machines) == 1:  # lines that name no thread
            vm = np.where(columns["tid"] == 0, 1, vm)
        gap = columns["kind"] == _GAP
        named = columns["vcpu"] >= 0
        columns["vcpu"] = np.where(gap, -1, np.where(named, columns["vcpu"], vcpu)).astype(np.int16)
        columns["tgid"] = tgid.astype(np.uint32)
        columns["w1"] = np.where(gap, np.uint64(_SHOWN), columns["w1"])
        vm[gap] = 0
        return vm

    def _count(self, columns: Columns) -> None:
        cpu = np.minimum(columns["cpu"].astype(np.int64), (1 << 12) - 1)
        columns["cpu"] = cpu.astype(np.uint16)
        cells = columns["kind"].astype(np.int64) << 12 | cpu
        self._counts += np.bincount(cells, minlength=1 << 20).reshape(256, 1 << 12)
        for row in np.flatnonzero(columns["kind"] == _GAP).tolist():
            name = str(int(cpu[row]))
            self._lost[name] = self._lost.get(name, 0) + int(columns["w0"][row])

    def _loss(self) -> dict[str, Any]:
        """Of which kinds the lost events were is not known."""
        loss: dict[str, Any] = {}
        for code, cpu in np.argwhere(self._counts).tolist():
            if code != _GAP:
                counts = loss.setdefault(kind_name(code), {"emitted": {}, "lost": {}})
                counts["emitted"][str(cpu)] = int(self._counts[code, cpu])
        if any(self._lost.values()):
            loss["unknown"] = {"emitted": dict(self._lost), "lost": dict(self._lost)}
        return loss
