# SPDX-License-Identifier: Apache-2.0
"""trace-cmd's trace.dat, versions 6 and 7: formats, options, and each CPU's pages of ftrace's ring buffer.

Version 6 is one block after the other; 7 has sections, which may be compressed, and a chain of options that says where
they are. What is read of both is the same: `TraceDat`. Written after trace-cmd 3.4's own description and code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from traces.errors import Problem
from traces.imports.clock_shift import ClockShift
from traces.imports.event_fields import RawFields, raw_fields
from traces.imports.field_texts import FieldTexts
from traces.imports.other_events import OtherTexts
from traces.imports.raw_rows import RawDecoder
from traces.imports.record_walks import walk_pages
from traces.imports.source_bytes import Damaged, SourceBytes, SourceCursor, unpacked
from traces.imports.time_order import Rows, TimeOrder
from traces.imports.tracing_data import (
    MAGIC,
    Formats,
    check_machine,
    read_comms,
    read_formats,
    read_systems,
)

_PAGES: Final = 32  # of one CPU, read at a time
_ROOM: Final = 1 << 16  # records found in these
_BATCH: Final = 1 << 16  # rows given at a time
_HEAD: Final = 1 << 26  # bytes before a version 6's data that are looked at
_MOST_CPUS: Final = 4096
_PAGE_SIZES: Final = tuple(1 << bits for bits in range(12, 17))
_COMPRESSED: Final = 1
# Options, of either version.
_DONE, _DATE, _STATISTICS, _BUFFER, _CLOCK, _UNAME, _OFFSET, _CPU_COUNT = 0, 1, 2, 3, 4, 5, 7, 8
_PROCESSES, _TIME_SHIFT, _GUEST, _TSC, _HEADER, _FTRACE, _FORMATS, _COMMS = 11, 12, 13, 14, 16, 17, 18, 21
_UNAME_TEXT: Final = re.compile(rb"^\S+ \S+ (\d+\.\d+[\w.+~-]{0,100})")


@dataclass
class _CpuPages:
    """Where one CPU's pages of one buffer are; `chunks` of a compressed one: (offset, bytes, bytes unpacked)."""

    cpu: int
    at: int
    size: int
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    left: bytes = b""  # unpacked, not read yet
    last: int = 0  # the time of the last row read

    @property
    def done(self) -> bool:
        return not self.size and not self.chunks and not self.left


@dataclass
class TraceDatFacts:
    """What the file says besides events."""

    release: str = ""
    clock: str = ""
    comms: dict[int, bytes] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)  # by thread
    buffers: list[str] = field(default_factory=list)
    guests: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by name: the host's threads of its vCPUs
    overrun: int = 0  # events that were overwritten before they were read


class TraceDat:
    """A trace.dat: iterate `batches` once. Raises Problem for what cannot be read, Damaged where it is cut."""

    def __init__(self, source: SourceBytes, texts: OtherTexts) -> None:
        self.facts = TraceDatFacts()
        self.order = TimeOrder()
        self.odd_pages = 0
        self._source = source
        self._shift = ClockShift()
        self._codec = ""
        self._cut = ""
        self._page_size = 4096
        self._pages: list[tuple[int, _CpuPages]] = []  # with the size of a page
        head = SourceCursor(source.some(0, _HEAD), "its headings")
        if head.take(len(MAGIC)) != MAGIC:
            raise Damaged("it does not begin as a trace.dat")
        version = head.string()
        if version not in ("6", "7"):
            raise Problem(f"a trace.dat of version {version[:10]!r}: only 6 and 7 are known here")
        check_machine(*head.take(2))
        self._page_size = self._a_page_size(head.numbers("I")[0])
        formats = self._read_6(head) if version == "6" else self._read_7(head)
        self.fields: RawFields = raw_fields(formats)
        self.decoder = RawDecoder(self.fields, FieldTexts(self.fields.names, self.fields.others, texts))

    @property
    def threads(self) -> dict[int, tuple[int, bytes]]:
        """By thread: its process, where the kernel kept these (ftrace's record-tgid), and its name."""
        processes = self.facts.processes
        names = {tid: (processes.get(tid, 0), comm) for tid, comm in self.facts.comms.items()}
        return {tid: (process, b"") for tid, process in processes.items()} | names

    @property
    def synced(self) -> bool:
        """Whether it is a guest's, with offsets that make its times its host's."""
        return self._shift.of_host

    def batches(self) -> Iterator[Rows]:
        """The rows in the order of their times."""
        running = [pages for pages in self._pages if not pages[1].done]
        while running:
            slowest = min(running, key=lambda pages: pages[1].last)
            self._advance(*slowest)
            if slowest[1].done:
                running.remove(slowest)
            if self.order.waiting >= _BATCH and running:
                rows = self.order.until(min(pages.last for _, pages in running))
                if rows is None and self.order.crowded:
                    rows = self.order.half()
                if rows is not None:
                    yield rows
        if (rows := self.order.until(None)) is not None:
            yield rows
        if self._cut:
            raise Damaged(self._cut)

    def _advance(self, page_size: int, pages: _CpuPages) -> None:
        """Read some pages of a CPU."""
        data = self._some(page_size, pages)
        found = np.zeros((min(len(data) // 8 + 8, _ROOM) + page_size, 6), np.int64)
        at = 0
        while len(data) - at >= page_size:
            read, count, odd = walk_pages(data[at:], page_size, pages.cpu, found)
            self.odd_pages += odd
            if not read:
                break
            if count:
                rows = self.decoder.rows(data[at:], found, count)
                if self._shift.needed:
                    rows["time"] = self._shift.shifted(rows["time"], pages.cpu)
                self.order.add(rows)
                pages.last = max(pages.last, int(found[count - 1, 2]) if not self._shift.needed else self.order.latest)
            at += read * page_size

    def _some(self, page_size: int, pages: _CpuPages) -> bytes:
        if pages.chunks:
            at, packed, size = pages.chunks.pop(0)
            data = pages.left + unpacked(self._codec, self._source.read(at, packed), size)
            whole = len(data) // page_size * page_size if pages.chunks else len(data)
            pages.left = data[whole:]
            return data[:whole]
        count = min(pages.size, _PAGES * page_size)
        data = self._source.read(pages.at, count)
        pages.at, pages.size, pages.left = pages.at + count, pages.size - count, b""
        return data

    # Version 6

    def _read_6(self, head: SourceCursor) -> Formats:
        formats = read_formats(head)
        for _ in range(2):  # addresses of functions, and of texts
            head.take(head.numbers("I")[0])
        self.facts.comms = read_comms(head.take(head.numbers("Q")[0]))
        (cpus,) = head.numbers("I")
        instances: list[tuple[int, str]] = []
        what = head.take(10)
        if what.startswith(b"options"):
            while (number := head.numbers("H")[0]) != _DONE:
                data = head.take(head.numbers("I")[0])
                if number == _CPU_COUNT and len(data) >= 4:
                    cpus = SourceCursor(data, "options").numbers("I")[0]
                elif number == _BUFFER:
                    option = SourceCursor(data, "options")
                    instances.append((option.numbers("Q")[0], option.string()))
                else:
                    self._option(number, data)
            what = head.take(10)
        self._pages_6(head, what, cpus, "")
        for offset, name in instances:
            size = 10 + 16 * min(cpus, _MOST_CPUS)
            buffer = SourceCursor(self._source.some(offset, size), "a buffer's CPUs")
            self._pages_6(buffer, buffer.take(10), cpus, name)
        return formats

    def _pages_6(self, cursor: SourceCursor, what: bytes, cpus: int, name: str) -> None:
        if what.startswith(b"latency"):
            raise Problem("it holds the text of a latency tracer, no events")
        if not what.startswith(b"flyrecord") or cpus > _MOST_CPUS:
            raise Damaged("its data do not begin where they should")
        self.facts.buffers.append(name)
        for cpu in range(cpus):
            at, size = cursor.numbers("QQ")
            self._cpu(self._page_size, _CpuPages(cpu, at, size))

    # Version 7

    def _read_7(self, head: SourceCursor) -> Formats:
        self._codec = head.string()
        head.string()  # its version
        (at,) = head.numbers("Q")
        sections: dict[int, int] = {}
        buffers: list[bytes] = []
        seen = set[int]()
        while at and at not in seen:
            seen.add(at)
            options, at = SourceCursor(self._section(at, _DONE), "options"), 0
            while options.left >= 6:
                number, size = options.numbers("HI")
                data = options.take(size)
                if number == _DONE:
                    at = SourceCursor(data, "options").numbers("Q")[0]
                    break
                if number in (_HEADER, _FTRACE, _FORMATS, _COMMS) and size >= 8:
                    sections[number] = SourceCursor(data, "options").numbers("Q")[0]
                elif number == _BUFFER:
                    buffers.append(data)
                else:
                    self._option(number, data)
        if _FORMATS not in sections:
            raise Damaged("the formats of its events are missing")
        if _COMMS in sections:
            comms = SourceCursor(self._section(sections[_COMMS], _COMMS), "names of tasks")
            self.facts.comms = read_comms(comms.take(comms.numbers("Q")[0]))
        for data in buffers:
            self._buffer_7(SourceCursor(data, "a buffer's CPUs"))
        return read_systems(SourceCursor(self._section(sections[_FORMATS], _FORMATS), "the formats of its events"))

    def _section(self, at: int, number: int) -> bytes:
        """What is in the section at a place, unpacked."""
        is_number, flags, _, size = SourceCursor(self._source.read(at, 16), "sections").numbers("HHIQ")
        if is_number != number:
            raise Damaged(f"no section of number {number} is at byte {at:,}")
        if not flags & _COMPRESSED:
            return self._source.read(at + 16, min(size, self._source.size))
        packed, whole = SourceCursor(self._source.read(at + 16, 8), "sections").numbers("II")
        return unpacked(self._codec, self._source.read(at + 24, packed), whole)

    def _buffer_7(self, cursor: SourceCursor) -> None:
        (section,) = cursor.numbers("Q")
        self.facts.buffers.append(cursor.string())
        clock = cursor.string()
        self.facts.clock = self.facts.clock or clock
        page_size, cpus = cursor.numbers("II")
        page_size = self._a_page_size(page_size)
        if not cpus:
            return
        _, flags, _, _ = SourceCursor(self._source.read(section, 16), "sections").numbers("HHIQ")
        for _ in range(min(cpus, _MOST_CPUS)):
            cpu, at, size = cursor.numbers("IQQ")
            pages = _CpuPages(cpu, at, size)
            if size and flags & _COMPRESSED:
                pages.chunks, pages.size = self._chunks(at, size), 0
            self._cpu(page_size, pages)

    def _chunks(self, at: int, size: int) -> list[tuple[int, int, int]]:
        (count,) = SourceCursor(self._source.read(at, 4), "data").numbers("I")
        end, at = at + 4 + size, at + 4  # the size is without the count before it
        chunks = []
        for _ in range(count):
            packed, whole = SourceCursor(self._source.read(at, 8), "data").numbers("II")
            chunks.append((at + 8, packed, whole))
            at += 8 + packed
            if at > end:
                raise Damaged("a CPU's data are longer than they say")
        return chunks

    # Both

    def _cpu(self, page_size: int, pages: _CpuPages) -> None:
        if pages.size and pages.at + pages.size > self._source.size:
            self._cut = f"it ends at byte {self._source.size:,}, and its data at {pages.at + pages.size:,}"
            pages.size = max(self._source.size - pages.at, 0)
        self._pages.append((page_size, pages))

    def _a_page_size(self, size: int) -> int:
        if size not in _PAGE_SIZES:
            raise Damaged(f"pages of {size:,} bytes are none that there can be")
        return size

    def _option(self, number: int, data: bytes) -> None:
        if number == _UNAME and (match := _UNAME_TEXT.match(data)):
            self.facts.release = match[1].decode()
        elif number == _CLOCK:
            match = re.search(rb"\[(\w{1,20})\]", data)
            self.facts.clock = match[1].decode() if match else self.facts.clock
        elif number == _STATISTICS:
            self.facts.overrun += sum(
                int(count) for count in re.findall(rb"^(?:overrun|dropped events): (\d{1,15})", data, re.M)
            )
        elif number == _PROCESSES:
            self.facts.processes |= {
                int(thread): int(process)
                for thread, process in re.findall(rb"^\s*(\d{1,9}) (\d{1,9})\s*$", data.rstrip(b"\0"), re.M)
            }
        elif number == _GUEST:
            guest = SourceCursor(data, "options")
            name, (_, count) = guest.string(), guest.numbers("QI")
            pairs = [guest.numbers("II") for _ in range(min(count, _MOST_CPUS))]
            self.facts.guests[name] = tuple(pid for _, pid in sorted(pairs))
        elif number in (_DATE, _OFFSET):
            text: Any = data.partition(b"\0")[0].strip()
            try:
                self._shift.add(int(text, 0) * (1000 if number == _DATE else 1))
            except ValueError:
                raise Damaged("an offset of times is no number") from None
        elif number == _TSC and len(data) >= 16:
            self._shift.scale(*SourceCursor(data, "options").numbers("II"))
        elif number == _TIME_SHIFT and len(data) >= 16:
            self._shift.of_guest(data)
