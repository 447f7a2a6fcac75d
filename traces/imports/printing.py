# SPDX-License-Identifier: Apache-2.0
"""A trace's rows as kernels, and perf, print them: what `kvmtrace import` reads, for those who have tools for it.

Rows of one kind are printed together, column by column. What no trace holds (sizes, pointers, other registers) is
printed as 0; rows of kinds that no tracepoint shows (functions, ioctls) are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from traces.imports.exit_words import word
from traces.imports.form_program import FormPart, pieces
from traces.kernels import Kernel
from traces.kernels.printed import FORMS, PFERR, PLUGIN, Form
from traces.kernels.vendors import VMX
from traces.kvm_names import user_exit_name
from traces.reader import Trace

COLUMNS: Final = (
    "seq", "time", "vcpu", "cpu", "tid", "kind", "role", "level", "as_id", "gfn", "old", "new", "table", "addr", "code",
    "value", "rip", "refs", "ret", "flags",
)  # fmt: skip
_BATCH: Final = 1 << 16
_DIGITS: Final = np.frombuffer(b"0123456789abcdef", np.uint8)
_MASKS: Final = {"quadrant": 3, "direct": 1, "access": 7, "invalid": 1, "ad_disabled": 1, "smm": 1}

Columns = Mapping[str, NDArray[Any]]


@dataclass
class Printer:
    """Prints rows for one kernel; `tasks`: (comm, process) by thread. `left_out` counts rows without a text by kind."""

    kernel: Kernel
    tasks: Mapping[int, tuple[str, int]]
    perf: bool
    left_out: dict[str, int] = field(default_factory=dict)

    def lines(self, columns: Columns, kinds: NDArray[Any], names: list[str], texts: pa.Array | None = None) -> bytes:
        """These rows; `kinds` are indices of `names`, `texts` those of rows of the kind `other`."""
        parts: list[tuple[NDArray[np.int64], pa.Array]] = []
        for index in np.unique(kinds).tolist():
            rows = np.flatnonzero(kinds == index)
            if names[index] == "other" and texts is not None:
                mine = {name: values[rows] for name, values in columns.items()}
                parts.append((rows, self._line(None, mine, pc.fill_null(texts.take(pa.array(rows)), "other:"))))
                continue
            for form, at in self._forms(names[index], columns, rows):
                if form is None:
                    self.left_out[names[index]] = self.left_out.get(names[index], 0) + len(at)
                    continue
                mine = {name: values[at] for name, values in columns.items()}
                text, fits = self.text(form, mine)
                if not fits.all():
                    self.left_out[names[index]] = self.left_out.get(names[index], 0) + int((~fits).sum())
                    keep = np.flatnonzero(fits)
                    at, text = at[keep], text.take(pa.array(keep))
                    mine = {name: values[keep] for name, values in mine.items()}
                if len(at):
                    parts.append((at, self._line(form, mine, text)))
        if not parts:
            return b""
        order = np.argsort(np.concatenate([at for at, _ in parts]), kind="stable")
        lines = pa.concat_arrays([lines for _, lines in parts]).take(pa.array(order))
        return b"\n".join(lines.cast(pa.binary()).to_pylist()) + b"\n"

    def _forms(self, kind: str, columns: Columns, rows: NDArray[np.int64]) -> Iterator[tuple[Form | None, Any]]:
        """Which of the rows are printed by which form; None: none of this kernel's."""
        left = rows
        for form in forms_of(kind, self.kernel):
            if not len(left):
                return
            if form.when is None:
                yield form, left
                return
            column, relation, number = form.when
            values = columns[column][left].astype(np.int64)
            held = values == number if relation == "==" else values < number
            if held.any():
                yield form, left[held]
            left = left[~held]
        if len(left):
            yield None, left

    def _line(self, form: Form | None, columns: Columns, text: pa.Array) -> pa.Array:
        """`form` None: the event's name is in the text."""
        event = form.event if form is not None else ""
        gap = form is not None and form.kind == "gap"
        time = columns["time"].astype(np.int64)
        seconds = _decimal(time // 10**9)
        tids, where = np.unique(columns["tid"], return_inverse=True)
        cpu = pc.utf8_lpad(_decimal(columns["cpu"]), 3, "0")
        if gap and not self.perf:
            return _joined(["CPU:", _decimal(columns["cpu"]), " [LOST ", _decimal(columns["value"]), " EVENTS]"])
        tasks = pa.array([self._task(int(tid)) for tid in tids]).take(pa.array(where))
        if self.perf:
            fraction = pc.utf8_lpad(_decimal(time % 10**9), 9, "0")
            name = "PERF_RECORD_LOST " if gap else f"{system_of(event)}:{event}: " if event else ""
            return _joined([tasks, " [", cpu, "] ", seconds, ".", fraction, ": ", name, text])
        fraction = pc.utf8_lpad(_decimal(time % 10**9 // 1000), 6, "0")
        return _joined([tasks, " [", cpu, "] .....  ", seconds, ".", fraction, f": {event}: " if event else ": ", text])

    def _task(self, tid: int) -> str:
        comm, process = self.tasks.get(tid, ("", 0))
        comm = "".join(char if char.isprintable() else "?" for char in comm) or "<...>"
        if self.perf:
            return f"{comm:>16} {process or tid:>6}/{tid:<6}" if process else f"{comm:>16} {tid:>6}"
        return f"{comm:>16}-{tid:<7} ({process or '-' * 7:>7})"

    def text(self, form: Form, columns: Columns) -> tuple[pa.Array, NDArray[np.bool_]]:
        """A form's text for each row, and for which rows it is one."""
        count = len(columns["time"])
        fits = np.ones(count, np.bool_)
        parts: list[str | pa.Array] = []
        for piece in pieces(form.text):
            if piece.literal:
                parts.append(piece.literal)
                continue
            if not piece.column:
                parts.append(self._unheld(form, piece, columns))
                continue
            values = self._values(piece, columns)
            if piece.how in _PRINTERS:
                parts.append(_PRINTERS[piece.how](values))
            elif piece.how == "exit":
                parts.append(_each(values, partial(word, self.kernel.vendor)))
            elif piece.how == "pferr":
                parts.append(_each(values, _fault_bits))
            elif piece.how == "perm":
                parts.append(_each_of_few(values, self.kernel.vendor is VMX))
            elif piece.how == "failed":
                parts.append(_each(values & np.uint64(1), lambda bit: " (prot64) failed" if bit else " (prot64)"))
            else:
                text, known = _one_of(piece, values)
                fits &= known
                parts.append(text)
        return _joined(parts, count), fits

    def _values(self, piece: FormPart, columns: Columns) -> NDArray[Any]:
        if piece.column.startswith("role."):
            return self._role(piece.column.removeprefix("role."), columns["role"].astype(np.int64))
        signed = piece.column == "ret"
        values = columns[piece.column].astype(np.int64 if signed or piece.column == "vcpu" else np.uint64)
        if piece.column == "ret" and piece.how.startswith("1="):  # fast_page_fault: fixed, spurious
            codes = self.kernel.ret_pf
            same: NDArray[np.bool_] = values == (codes.spurious if piece.shift else codes.fixed)
            return same.astype(np.int64)
        if piece.how == "-d":
            return -values
        if piece.shift < 0:
            return values << np.uint64(-piece.shift)
        if piece.shift or "=" in piece.how or (piece.mask >> 64 == 0 and piece.mask != (1 << 64) - 1):
            mask = np.uint64(piece.mask)
            values = (values.astype(np.uint64) >> np.uint64(piece.shift)) & mask
            if piece.column == "flags" and "=" in piece.how:
                values = values & np.uint64(1)
        return values

    def _role(self, name: str, word_of: NDArray[np.int64]) -> NDArray[np.int64]:
        layout = self.kernel.layout
        if name == "nx":
            bit: NDArray[np.bool_] = (word_of & layout.nx) != 0
            return bit.astype(np.int64)
        if name == "gpte":
            four = (word_of & layout.mask("has_4_byte_gpte")) != 0
            made: NDArray[np.int64] = np.where(four, 4, 8).astype(np.int64)
            return made
        shift = layout.shifts.get(name, (0, 0))[0]
        found: NDArray[np.int64] = (word_of & layout.mask(name)) >> shift & _MASKS[name]
        return found

    def _unheld(self, form: Form, piece: FormPart, columns: Columns) -> str | pa.Array:
        """What no column holds."""
        if piece.how == "w":  # of kvm_userspace_exit
            return _each(columns["code"], lambda reason: user_exit_name(reason, 0))
        if piece.how == "p":
            return "0" * 16
        if "=" in piece.how:
            names = [name for name, value in piece.names if not value] or [piece.names[0][0]]
            vendor = [name for name in names if name in ("vmcs", "nested_ept", "nested_eptp")]
            return vendor[0] if vendor and self.kernel.vendor is VMX else min(names, key=lambda n: n in vendor)
        width = int(piece.how[:-1].lstrip("0") or 1) if piece.how[:-1] else 1
        return "0" * width


def forms_of(kind: str, kernel: Kernel) -> list[Form]:
    """The forms by which a kernel prints a kind, in the order in which they are tried."""
    mine = [form for form in FORMS if form.kind == kind]
    if kind == "gap":
        return mine
    known = [form for form in mine if form.since != PLUGIN and form.since <= kernel.version[:2]]
    newest = max((form.since for form in known), default=None)
    return [form for form in known if form.since == newest]


def printed(trace: Trace, kernel: Kernel, *, perf: bool) -> tuple[Iterator[bytes], dict[str, int]]:
    """The trace as text, piece by piece, and what was left out, by kind: complete when the pieces are."""
    tasks = {
        int(thread["tid"]): (str(thread.get("comm", "")), int(thread.get("tgid") or 0))
        for thread in trace.metadata.threads
        if isinstance(thread.get("tid"), int) and isinstance(thread.get("tgid") or 0, int)
    }
    printer = Printer(kernel, tasks, perf)

    def text() -> Iterator[bytes]:
        if not perf:
            yield b"# tracer: nop\n#\n"
        for table in in_order(trace):
            kinds = table.column("kind")
            columns = {
                name: pc.fill_null(table.column(name), -1 if name == "vcpu" else 0).to_numpy()
                for name in COLUMNS
                if name != "kind"
            }
            texts = table.column("text") if "text" in table.schema.names else None
            yield printer.lines(columns, kinds.indices.to_numpy(), kinds.dictionary.to_pylist(), texts)

    return text(), printer.left_out


def in_order(trace: Trace) -> Iterator[pa.RecordBatch]:
    """All rows by `seq`; a batch of each VM is held."""
    names = [*COLUMNS, *(["text"] if "text" in trace.schema.names else [])]
    owners: list[int | None] = sorted({group.vm for group in trace.metadata.row_groups}, key=lambda vm: vm or 0)
    streams = {owner: _of_owner(trace, names, owner) for owner in owners}
    heads = {owner: batch for owner, stream in streams.items() if (batch := next(stream, None)) is not None}
    while heads:
        until = min(int(_seq(batch)[-1]) for batch in heads.values())
        ready = []
        for owner, batch in list(heads.items()):
            count = int(np.searchsorted(_seq(batch), until, side="right"))
            ready.append(batch.slice(0, count))
            if count < batch.num_rows:
                heads[owner] = batch.slice(count)
            elif (following := next(streams[owner], None)) is not None:
                heads[owner] = following
            else:
                del heads[owner]
        parts = [batch for batch in ready if batch.num_rows]
        if len(parts) == 1:
            yield parts[0]
        elif parts:
            joined = pa.Table.from_batches(parts).unify_dictionaries().combine_chunks().to_batches()[0]
            yield joined.take(pa.array(np.argsort(_seq(joined), kind="stable")))


def _of_owner(trace: Trace, names: list[str], owner: int | None) -> Iterator[pa.RecordBatch]:
    if owner is not None:
        yield from trace.batches(names, vm=owner, size=_BATCH)
        return
    for batch in trace.batches([*names, "vm"], size=_BATCH):
        kept = batch.filter(pc.is_null(batch.column("vm")))
        if kept.num_rows:
            yield kept.select(names)


def _seq(batch: pa.RecordBatch) -> NDArray[np.int64]:
    return batch.column(0).to_numpy()  # type: ignore[no-any-return]


def system_of(event: str) -> str:
    """The system that an event is of."""
    mmu = event.startswith(("kvm_mmu", "kvm_tdp_mmu")) or "mmio_spte" in event
    return "kvmmmu" if mmu or event in ("fast_page_fault", "handle_mmio_page_fault") else "kvm"


def _joined(parts: list[Any], count: int = 0) -> pa.Array:
    if all(isinstance(part, str) for part in parts):
        return pa.array(["".join(parts)] * count, pa.string())
    return pc.binary_join_element_wise(*parts, "")


def _decimal(values: NDArray[Any]) -> pa.Array:
    return pa.array(values).cast(pa.string())


def _hexadecimal(width: int, values: NDArray[Any]) -> pa.Array:
    """At least `width` digits."""
    words = values.astype(np.uint64).astype(">u8").view(np.uint8).reshape(-1, 8)
    digits = np.empty((len(words), 16), np.uint8)
    digits[:, 0::2], digits[:, 1::2] = _DIGITS[words >> 4], _DIGITS[words & 15]
    offsets = np.arange(0, 16 * len(words) + 1, 16, dtype=np.int32)
    text = pa.Array.from_buffers(
        pa.string(), len(words), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits))]
    )
    return pc.ascii_lpad(pc.ascii_ltrim(text, "0"), width, "0")


_PRINTERS: Final[Mapping[str, Callable[[NDArray[Any]], pa.Array]]] = {
    "x": partial(_hexadecimal, 1), "08x": partial(_hexadecimal, 8), "014x": partial(_hexadecimal, 14),
    "016x": partial(_hexadecimal, 16), "d": _decimal, "-d": _decimal,
}  # fmt: skip


def _each(values: NDArray[Any], text: Callable[[int], str]) -> pa.Array:
    """The text of each value, made once for each that is another."""
    unique, where = np.unique(values, return_inverse=True)
    return pa.array([text(int(value)) for value in unique], pa.string()).take(pa.array(where))


def _one_of(piece: FormPart, values: NDArray[Any]) -> tuple[pa.Array, NDArray[np.bool_]]:
    by_value = {value: name for name, value in reversed(piece.names)}
    unique, where = np.unique(values, return_inverse=True)
    names = [by_value.get(int(value)) for value in unique]
    known = np.array([name is not None for name in names], np.bool_)[where]
    return pa.array([name or "" for name in names], pa.string()).take(pa.array(where)), known


def _fault_bits(code: int) -> str:
    named = [name for name, bit in sorted(PFERR, key=lambda pair: pair[1]) if code >> bit & 1]
    rest = code & ~sum(1 << bit for _, bit in PFERR)
    return "|".join([*named, *([f"{rest:#x}"] if rest else [])])


def _each_of_few(spte: NDArray[Any], ept: bool) -> pa.Array:
    """`rwxu` by the processor's own bits of a leaf; EPT has no user bit."""
    if ept:
        few = spte & np.uint64(7)
        return _each(
            few, lambda bits: f"{'r' if bits & 1 else '-'}{'w' if bits & 2 else '-'}{'x' if bits & 4 else '-'}"
        )
    few = (spte & np.uint64(7)) | ((spte >> np.uint64(60)) & np.uint64(8))
    return _each(
        few,
        lambda bits: (
            f"{'r' if bits & 1 else '-'}{'w' if bits & 2 else '-'}{'-' if bits & 8 else 'x'}{'u' if bits & 4 else '-'}"
        ),
    )
