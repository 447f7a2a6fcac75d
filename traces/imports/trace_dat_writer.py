# SPDX-License-Identifier: Apache-2.0
"""A trace as a trace.dat of version 6: its events as raw records of tracepoints, for trace-cmd and KernelShark.

Written after trace-cmd's own description. libtracecmd has no call by which a program gives it events of its own (it
copies what a kernel's ring buffer holds), so pages of that buffer are made here. Each event has the fields that a trace
has columns for, under the names that its kernel's format has; print formats name all fields, `name=value`, where
libtraceevent's KVM plugin has no words of its own.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from traces.imports.event_fields import COMMON
from traces.imports.form_program import ROLE, bits, fields_differ, place
from traces.imports.printing import COLUMNS, in_order, system_of
from traces.imports.tracing_data import MAGIC
from traces.kernels import Kernel
from traces.kernels.printed import FIELDS, FORMS
from traces.kernels.vendors import VMX
from traces.reader import Trace

_PAGE: Final = 4096
_HEAD: Final = 16  # bytes of a page before its records: the time of the first, how many bytes are committed
_LONGEST_DELTA: Final = 1 << 27  # ns between records of a page without a record that extends the time
_EXTENDS: Final = 30
_MISSED, _MISSED_STORED = 1 << 31, 1 << 30
_FIRST_ID: Final = 1000  # below are ftrace's own
_MOST_CPUS: Final = 4096
_WIDE: Final = frozenset(("level", "as_id", "flags", "vcpu", "role", "refs", "ret", "isa"))  # of 32 bits
_OPTION_CLOCK, _OPTION_UNAME, _OPTION_CPUS, _OPTION_PROCESSES = 4, 5, 8, 11
# Those whose times libtraceevent (1.7) prints in seconds; of another, boot among them, it prints ticks unless the file
# does not say which it is.
_CLOCKS: Final = ("local", "global", "uptime", "perf", "mono", "mono_raw")
_PAGE_FORMAT: Final = (
    "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
    "\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
    "\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;\n"
)
_EVENT_FORMAT: Final = (
    "# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n\tarray       :   32 bits\n\n"
    "\tpadding     : type == 29\n\ttime_extend : type == 30\n\ttime_stamp : type == 31\n"
    "\tdata max type_len  == 28\n# written by kvmtrace\n"
)
_COMMON_FORMAT: Final = (
    "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    "\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n"
    "\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n"
    "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class WrittenField:
    """A field: of which column's bits (shift: how far the column's are to the left of it), its size and sign."""

    name: str
    column: str
    shift: int
    mask: int
    size: int
    signed: bool


@dataclass(frozen=True)
class WrittenEvent:
    """An event as the file has it, by its number."""

    number: int
    name: str
    fields: tuple[WrittenField, ...]

    @property
    def size(self) -> int:
        """Bytes of a record, in whole words of 32 bits as the ring buffer has them."""
        return COMMON + sum(field.size for field in self.fields)

    def format(self) -> str:
        """As the kernel's `format` file has it."""
        lines, at = [f"name: {self.name}\nID: {self.number}\nformat:\n", _COMMON_FORMAT], COMMON
        for field in self.fields:
            of = ("" if field.signed else "unsigned ") + ("long long" if field.size == 8 else "int")
            lines.append(f"\tfield:{of} {field.name};\toffset:{at};\tsize:{field.size};\tsigned:{int(field.signed)};\n")
            at += field.size
        shown = " ".join(f"{field.name}={_shown(field)}" for field in self.fields)
        given = "".join(f", REC->{field.name}" for field in self.fields)
        return "".join([*lines, f'\nprint fmt: "{shown}"{given}\n'])


def _shown(field: WrittenField) -> str:
    decimal = field.signed or field.column in ("vcpu", "level", "as_id", "flags", "isa")
    return f"{'' if decimal else '0x'}%{'ll' if field.size == 8 else ''}{'d' if decimal else 'x'}"


@cache
def written_events() -> Mapping[str, WrittenEvent]:
    """The events of kinds that tracepoints show, by kind: of each its newest name and the fields that columns have."""
    newest = {form.kind: form.event for form in sorted(FORMS, key=lambda form: form.since) if form.kind in FIELDS}
    found = {}
    for number, (kind, event) in enumerate(newest.items()):
        fields: dict[str, WrittenField] = {}
        for name, target in FIELDS[kind].items():
            if target not in fields and not fields_differ(event, name):
                column, shift, mask = bits(target)
                size = 4 if column in _WIDE or place(kind, column)[0] == ROLE else 8
                fields[target] = WrittenField(name, column, shift, mask, size, column in ("refs", "ret"))
        found[kind] = WrittenEvent(_FIRST_ID + number, event, tuple(fields.values()))
    return found


class _Buffers:
    """Each CPU's pages, in one temporary file in the order in which they were made."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (closed by `close`)
        self._pages: dict[int, list[int]] = {}
        self._count = 0

    def add(self, cpu: int, page: NDArray[np.uint8]) -> None:
        self._file.write(page.tobytes())
        self._pages.setdefault(cpu, []).append(self._count)
        self._count += 1

    @property
    def cpus(self) -> int:
        return max(self._pages, default=0) + 1

    def size(self, cpu: int) -> int:
        return _PAGE * len(self._pages.get(cpu, ()))

    def of(self, cpu: int) -> Iterator[bytes]:
        for page in self._pages.get(cpu, ()):
            self._file.seek(page * _PAGE)
            yield self._file.read(_PAGE)

    def close(self) -> None:
        self._file.close()


def write_trace_dat(trace: Trace, kernel: Kernel, write: Callable[[bytes], object]) -> dict[str, int]:
    """Write the trace; the rows that are left out, by kind: functions, ioctls, events that only a text is known of."""
    buffers, left_out = _Buffers(), dict[str, int]()
    isa = 1 if kernel.vendor is VMX else 2
    try:
        for batch in in_order(trace):
            _add(batch, isa, buffers, left_out)
        cpus = buffers.cpus
        head = _head(trace, cpus)
        at = (len(head) + 16 * cpus + _PAGE - 1) // _PAGE * _PAGE
        first, table = at, b""
        for cpu in range(cpus):
            table += struct.pack("<QQ", at, buffers.size(cpu))
            at += buffers.size(cpu)
        write(head + table + bytes(first - len(head) - len(table)))
        for cpu in range(cpus):
            for page in buffers.of(cpu):
                write(page)
    finally:
        buffers.close()
    return left_out


def _head(trace: Trace, cpus: int) -> bytes:
    events = written_events()
    kinds = [kind for kind in trace.metadata.kinds if kind in events]
    systems: dict[str, list[str]] = {}
    for kind in kinds:
        systems.setdefault(system_of(events[kind].name), []).append(events[kind].format())
    made = [MAGIC, b"6\0", struct.pack("<BBI", 0, 8, _PAGE)]
    for name, text in ((b"header_page\0", _PAGE_FORMAT), (b"header_event\0", _EVENT_FORMAT)):
        made += [name, struct.pack("<Q", len(text)), text.encode()]
    made += [struct.pack("<II", 0, len(systems))]  # none of ftrace's own events
    for system, formats in systems.items():
        made += [system.encode(), b"\0", struct.pack("<I", len(formats))]
        made += [struct.pack("<Q", len(text)) + text.encode() for text in formats]
    threads = [thread for thread in trace.metadata.threads if isinstance(thread.get("tid"), int)]
    names = "".join(f"{thread['tid']} {_printable(thread.get('comm'))}\n" for thread in threads).encode()
    processes = "".join(f"{t['tid']} {t['tgid']}\n" for t in threads if isinstance(t.get("tgid"), int) and t["tgid"])
    made += [struct.pack("<IIQ", 0, 0, len(names)), names, struct.pack("<I", cpus), b"options  \0"]
    clock = str(trace.metadata.raw.get("clock", {}).get("name", "")).lower().removeprefix("clock_").replace("time", "")
    options = [(_OPTION_CPUS, struct.pack("<I", cpus)), (_OPTION_PROCESSES, processes.encode() + b"\0")]
    if clock in _CLOCKS:
        told = " ".join(f"[{name}]" if name == clock else name for name in _CLOCKS)
        options.append((_OPTION_CLOCK, told.encode() + b"\0"))
    if re.fullmatch(r"[\w.+~-]{1,100}", trace.metadata.kernel):
        options.append((_OPTION_UNAME, f"Linux kvmtrace {trace.metadata.kernel} x86_64\0".encode()))
    made += [struct.pack("<HI", number, len(data)) + data for number, data in options]
    return b"".join([*made, struct.pack("<H", 0), b"flyrecord\0"])


def _printable(comm: Any) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(comm or "<...>"))


def _add(batch: pa.RecordBatch, isa: int, buffers: _Buffers, left_out: dict[str, int]) -> None:
    """Make pages of the rows of a batch."""
    columns = {name: pc.fill_null(batch.column(name), 0).to_numpy() for name in COLUMNS if name != "kind"}
    columns["vcpu"] = pc.fill_null(batch.column("vcpu"), -1).to_numpy()
    kinds = batch.column("kind")
    names = kinds.dictionary.to_pylist()
    codes = kinds.indices.to_numpy()
    sizes = np.array([written_events()[name].size if name in written_events() else 0 for name in names], np.int64)
    size = sizes[codes]
    gap = np.array([name == "gap" for name in names], np.bool_)[codes]
    cpu = np.minimum(columns["cpu"].astype(np.int64), _MOST_CPUS - 1)
    for index in np.unique(codes[(size == 0) & ~gap]).tolist():
        left_out[names[index]] = left_out.get(names[index], 0) + int(np.count_nonzero(codes == index))
    records = {
        index: _records(written_events()[names[index]], {n: v[codes == index] for n, v in columns.items()}, isa)
        for index in np.unique(codes[size > 0]).tolist()
    }
    place_of = np.zeros(len(codes), np.int64)
    for index in records:
        at = np.flatnonzero(codes == index)
        place_of[at] = np.arange(len(at))
    for one in np.unique(cpu[(size > 0) | gap]).tolist():
        rows = np.flatnonzero((cpu == one) & ((size > 0) | gap))
        lost = np.where(gap[rows], columns["value"][rows].astype(np.int64), -1)
        time = columns["time"][rows].astype(np.int64)
        for begin, end, missed in _runs(time, lost):
            mine = rows[begin:end]
            _pages(one, time[begin:end], size[mine], codes[mine], place_of[mine], records, missed, buffers)


def _runs(time: Ints, lost: Ints) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
    """Rows of a CPU that may share pages: times rise, nothing was lost between. With (time, count) of what was before.

    A gap's own row is in none; one at the end has a run without rows.
    """
    breaks = np.flatnonzero((lost >= 0) | np.append(False, time[1:] < time[:-1])).tolist()
    begin, missed = 0, None
    for at in breaks:
        if at > begin or missed:
            yield begin, at, missed
        begin, missed = (at + 1, (int(time[at]), int(lost[at]))) if lost[at] >= 0 else (at, None)
    if begin < len(time) or missed:
        yield begin, len(time), missed


def _records(event: WrittenEvent, columns: Mapping[str, NDArray[Any]], isa: int) -> NDArray[np.uint8]:
    """The records of rows of one kind, without what the ring buffer has before each: one a line."""
    made = np.zeros((len(columns["time"]), event.size), np.uint8)

    def put(at: int, values: NDArray[Any], size: int) -> None:
        made[:, at : at + size] = np.ascontiguousarray(values.astype(f"<u{size}")).view(np.uint8).reshape(-1, size)

    put(0, np.full(len(made), event.number), 2)
    put(4, columns["tid"].astype(np.int64) & 0xFFFFFFFF, 4)
    at = COMMON
    for field in event.fields:
        if field.column == "isa":
            values = np.full(len(made), isa, np.uint64)
        else:
            values = columns[field.column].astype(np.int64).view(np.uint64)
            values = values >> np.uint64(field.shift) if field.shift > 0 else values << np.uint64(-field.shift)
            values = values & np.uint64(field.mask & (1 << 64) - 1)
        put(at, values & np.uint64((1 << 8 * field.size) - 1), field.size)
        at += field.size
    return made


def _pages(
    cpu: int,
    time: Ints,
    size: Ints,
    codes: NDArray[Any],
    place_of: Ints,
    records: Mapping[int, NDArray[np.uint8]],
    missed: tuple[int, int] | None,
    buffers: _Buffers,
) -> None:
    """Put a run of records into pages; of the first the time is that of the loss before it, if there was one."""
    delta = np.diff(time, prepend=time[:1] if missed is None else missed[0])
    long = delta >= _LONGEST_DELTA
    length = 4 + size + 8 * long
    end = np.cumsum(length)
    head = end - size - 4
    stream = _stream(delta, long, head, size, codes, place_of, records)
    first = 0
    while first < len(time) or missed is not None:
        mark = missed is not None and missed[1] > 0
        base = 0 if missed is not None else int(head[first])
        last = int(np.searchsorted(end, base + _PAGE - _HEAD - 8 * mark, side="right"))
        page = np.zeros(_PAGE, np.uint8)
        stored = int(end[last - 1]) - base if last > first else 0
        page[_HEAD : _HEAD + stored] = stream[base : base + stored]
        commit, when = stored, int(time[first]) if missed is None else missed[0]
        if missed is None:  # the page's time is its first record's
            struct.pack_into("<I", page.data, _HEAD, int(size[first]) // 4)
        else:
            commit |= _MISSED | (_MISSED_STORED if mark else 0)
            if mark:
                struct.pack_into("<Q", page.data, _HEAD + stored, missed[1])
        struct.pack_into("<QQ", page.data, 0, when, commit)
        buffers.add(cpu, page)
        first, missed = last, None


def _stream(
    delta: Ints,
    long: NDArray[np.bool_],
    head: Ints,
    size: Ints,
    codes: NDArray[Any],
    place_of: Ints,
    records: Mapping[int, NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """The records one after the other, each behind its head, some behind an extension of the time."""
    stream = np.zeros(int(head[-1] + 4 + size[-1]) if len(head) else 0, np.uint8)

    def put(at: Ints, words: Ints) -> None:
        stream[at[:, None] + np.arange(4)] = words.astype("<u4").view(np.uint8).reshape(-1, 4)

    put(head, size // 4 | np.where(long, 0, delta) << 5)
    extended = np.flatnonzero(long)
    put(head[extended] - 8, _EXTENDS | (delta[extended] & _LONGEST_DELTA - 1) << 5)
    put(head[extended] - 4, delta[extended] >> 27)
    for code in np.unique(codes).tolist():
        mine = np.flatnonzero(codes == code)
        stream[head[mine][:, None] + 4 + np.arange(int(size[mine[0]]))] = records[code][place_of[mine]]
    return stream
