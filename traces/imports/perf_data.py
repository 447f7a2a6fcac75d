# SPDX-License-Identifier: Apache-2.0
"""perf's perf.data, as a file and as a stream (pipe mode), compressed or not: tracepoints' samples with raw data.

A file has a head that says where its events' attributes, its records and, behind them, what else is known of the
recording are; a stream has all of these as records. Written after tools/perf/Documentation/perf.data-file-format.txt
and the code of perf 6.1 and 6.18. Several buffers' records come in rounds: at the end of each, rows older than the
newest of the round before are in order.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Final

import numpy as np

from traces.errors import Problem
from traces.imports.event_fields import raw_fields
from traces.imports.field_texts import FieldTexts
from traces.imports.other_events import OtherTexts
from traces.imports.raw_rows import RawDecoder
from traces.imports.record_walks import CHAIN, CPU, GROUP, ID, RAW, READ, REST, TID, TIME, walk_perf
from traces.imports.source_bytes import Damaged, SourceBytes, SourceCursor, unzstd
from traces.imports.time_order import Rows, TimeOrder
from traces.imports.tracing_data import Formats, from_perf

MAGIC: Final = b"PERFILE2"
OTHERS: Final = (b"2ELIFREP", b"PERFFILE")
_PIECE: Final = 1 << 22
_ROOM: Final = 1 << 16  # samples found at a time
_HEAD: Final = 104
_PIPE_HEAD: Final = 16
_ATTRIBUTE: Final = 48  # bytes of an attribute that are read
_MOST: Final = 1 << 20  # attributes, ids
_MOST_BYTES: Final = 1 << 27  # of a feature

# Records.
_LOST, _COMM, _FORK, _LOST_SAMPLES = 2, 3, 7, 13
_ATTR, _TRACING_DATA, _ROUND, _AUX, _FEATURE, _COMPRESSED, _COMPRESSED_2 = 64, 66, 68, 71, 80, 81, 83
_SAMPLE: Final = 9
# The least that they have.
_LEAST: Final = {
    _LOST: 16, _COMM: 8, _FORK: 16, _LOST_SAMPLES: 8, _ATTR: 48, _TRACING_DATA: 4, _AUX: 8, _FEATURE: 8,
    _COMPRESSED_2: 8,
}  # fmt: skip
# Features.
_FORMATS, _RELEASE, _CLOCK_ID = 1, 4, 23
_MOST_FEATURES: Final = 256
_CLOCKS: Final = {0: "realtime", 1: "mono", 4: "mono_raw", 7: "boot", 11: "tai"}
# Bits of sample_type in the order of what they stand for, each 8 bytes.
_FIXED: Final = (
    (1 << 16, ID),
    (1, -1),
    (2, TID),
    (4, TIME),
    (8, -1),
    (0x40, -1),
    (0x200, -1),
    (0x80, CPU),
    (0x100, -1),
)
_TRAILER: Final = ((2, TID), (4, TIME), (0x40, -1), (0x200, -1), (0x80, CPU), (1 << 16, -1))
_READ_BIT, _CHAIN_BIT, _RAW_BIT = 0x10, 0x20, 0x400
_SAMPLE_ID_ALL: Final = 1 << 18


@dataclass(frozen=True)
class _Attribute:
    """What one event's samples hold."""

    sample_type: int
    read_format: int
    trailer: bool  # other records end with the sample's fields as well

    def layout(self) -> list[int]:
        """Its row of the table that `walk_perf` reads."""
        row = [-1] * 9
        at = 0
        for bit, column in _FIXED:
            if self.sample_type & bit:
                if column >= 0:
                    row[column] = at
                at += 8
        row[REST] = at
        if self.sample_type & _READ_BIT:
            times = 8 * sum(bool(self.read_format & bit) for bit in (1, 2))
            each = 8 + 8 * sum(bool(self.read_format & bit) for bit in (4, 16))
            grouped = bool(self.read_format & 8)
            row[READ], row[GROUP] = (8 + times, each) if grouped else (times + each, 0)
        if self.sample_type & _CHAIN_BIT:
            row[CHAIN] = 0
        if self.sample_type & _RAW_BIT:
            row[RAW] = 0
        return row

    def behind(self, data: bytes) -> dict[int, bytes]:
        """Thread, time and CPU at the end of a record that is no sample."""
        if not self.trailer:
            return {}
        there = [column for bit, column in _TRAILER if self.sample_type & bit]
        first = len(data) - 8 * len(there)
        return {column: data[first + 8 * n : first + 8 * n + 8] for n, column in enumerate(there)} if first >= 0 else {}


@dataclass
class PerfFacts:
    """What the file says besides events."""

    release: str = ""
    clock: str = ""
    piped: bool = False
    compressed: bool = False


@dataclass
class _Stream:
    """Records one after the other, of which the last may not be whole yet."""

    left: bytes = b""
    behind: int = 0  # bytes that follow a record and are none
    formats: bytearray | None = None  # what these bytes are, if they are the formats of events


class PerfData:
    """A perf.data: iterate `batches` once. Raises Problem for what cannot be read, Damaged where it is cut."""

    def __init__(self, source: SourceBytes, texts: OtherTexts) -> None:
        self._texts = texts
        self.facts = PerfFacts()
        self.order = TimeOrder()
        self.odd_samples = 0
        self.threads: dict[int, tuple[int, bytes]] = {}  # process and name
        self._source = source
        self._attributes: list[_Attribute] = []
        self._of_ids: dict[int, int] = {}
        self._formats: Formats = []
        self._packed: IO[bytes] | None = None
        self._before = 0  # the newest row of the rounds before
        self._done: list[Rows] = []
        self._found = np.zeros((_ROOM, 6), np.int64)
        self._learn()
        head = SourceCursor(source.some(0, _HEAD), "its headings")
        if head.take(8) != MAGIC:
            raise Problem("a perf.data of another machine's byte order, or of before 2009")
        (size,) = head.numbers("Q")
        self.facts.piped = size == _PIPE_HEAD
        self._at, self._end = _PIPE_HEAD, source.size
        if not self.facts.piped:
            self._read_head(head)

    def batches(self) -> Iterator[Rows]:
        """The rows in the order of their times."""
        stream = _Stream()
        at, end = self._at, min(self._end, self._source.size)
        while at < end:
            piece = self._source.some(at, min(_PIECE, end - at))
            at += len(piece)
            yield from self._records(stream, piece)
        left = stream.left
        if self._packed is not None:
            stream = _Stream()
            for piece in unzstd(self._packed):
                yield from self._records(stream, piece)
            left += stream.left
        if (rows := self.order.until(None)) is not None:
            yield rows
        if self._end > self._source.size or left:
            raise Damaged("it ends in the middle of its records")

    # The head of a file

    def _read_head(self, head: SourceCursor) -> None:
        each, attributes_at, attributes, data_at, data_size, *_, low, high, _, _ = head.numbers("QQQQQQQQQQQ")
        if not each or attributes // each > _MOST or each < _ATTRIBUTE + 16:
            raise Damaged("its attributes make no sense")
        for number in range(attributes // each):
            data = self._source.read(attributes_at + number * each, each)
            ids_at, ids = SourceCursor(data[-16:], "attributes").numbers("QQ")
            if ids // 8 > _MOST:
                raise Damaged("an attribute has more ids than there can be")
            self._attribute(data[: each - 16], self._source.read(ids_at, ids // 8 * 8))
        self._at, self._end = data_at, data_at + data_size
        if not data_size:
            raise Damaged("it has no records: perf was not ended in order, or the file is cut")
        if self._end >= self._source.size:
            raise Damaged(
                f"it ends at byte {self._source.size:,}, its records at {self._end:,}: behind them the formats of "
                "its events are missing"
            )
        numbers = [n for n in range(_MOST_FEATURES // 2) if (low | high << 64) >> n & 1]
        where = SourceCursor(self._source.some(self._end, 16 * len(numbers)), "what is behind its records")
        for number in numbers:
            at, size = where.numbers("QQ")
            if number in (_FORMATS, _RELEASE, _CLOCK_ID):
                self._feature(number, self._source.read(at, min(size, _MOST_BYTES)))
        self._learn()

    def _attribute(self, data: bytes, ids: bytes) -> None:
        attribute = SourceCursor(data, "attributes")
        *_, sample_type, read_format, flags = attribute.numbers("IIQQQQQ")
        for number in np.frombuffer(ids, "<u8", len(ids) // 8).tolist():
            self._of_ids[number] = len(self._attributes)
        self._attributes.append(_Attribute(sample_type, read_format, bool(flags & _SAMPLE_ID_ALL)))

    def _feature(self, number: int, data: bytes) -> None:
        if number == _FORMATS:
            self._formats = from_perf(data)
        elif number == _RELEASE:
            text = SourceCursor(data, "the kernel's release")
            match = re.match(rb"\d+\.\d+[\w.+~-]{0,100}", text.take(min(text.numbers("I")[0], text.left)))
            self.facts.release = match[0].decode() if match else ""
        elif number == _CLOCK_ID and len(data) >= 8:  # a resolution in front of it, in nanoseconds: perf has both forms
            clock = SourceCursor(data, "the clock").numbers("Q")[0]
            self.facts.clock = _CLOCKS.get(clock, "")

    def _learn(self) -> None:
        """Make the tables that samples are read by."""
        layouts = [attribute.layout() for attribute in self._attributes] or [[-1] * 9]
        one = all(layout == layouts[0] for layout in layouts)
        if not one and any(layout[ID] != 0 for layout in layouts):
            raise Problem("its events' samples differ and do not say which they are")
        self._layouts = np.array(layouts[:1] if one else layouts, np.int64)
        self._ids = np.array(sorted(self._of_ids), np.uint64)
        self._by_id = np.array([self._of_ids[number] for number in sorted(self._of_ids)], np.int64)
        self.fields = raw_fields(self._formats)
        self.decoder = RawDecoder(self.fields, FieldTexts(self.fields.names, self.fields.others, self._texts))

    # Records

    def _records(self, stream: _Stream, piece: bytes) -> Iterator[Rows]:
        """Take what came of a stream; the rows that are done."""
        data = stream.left + piece
        at = self._pass(stream, data, 0)
        while len(data) - at >= 8:
            at, count, odd = walk_perf(data, at, self._ids, self._by_id, self._layouts, self._found)
            self.odd_samples += odd
            if count:
                self.order.add(self.decoder.rows(data, self._found, count))
                if self.order.crowded and (rows := self.order.half()) is not None:
                    self._done.append(rows)
            if len(data) - at < 8:
                break
            number, _, size = SourceCursor(data[at : at + 8], "records").numbers("IHH")
            if size < 8:
                raise Damaged(f"a record of {size} bytes")
            if at + size > len(data):
                break
            if number != _SAMPLE:
                self._record(stream, number, data[at + 8 : at + size])
                at = self._pass(stream, data, at + size)
            elif count == 0 and not odd:
                raise Damaged("a sample comes before its event")
        stream.left = data[at:]
        done, self._done = self._done, []
        yield from done

    def _pass(self, stream: _Stream, data: bytes, at: int) -> int:
        """Pass over what follows a record and is none; where it ends, or where the data do."""
        if stream.behind:
            taken = min(stream.behind, len(data) - at)
            if stream.formats is not None:
                stream.formats += data[at : at + taken]
            stream.behind -= taken
            at += taken
            if not stream.behind and stream.formats is not None:
                self._formats, stream.formats = from_perf(bytes(stream.formats)), None
                self._learn()
        return at

    def _record(self, stream: _Stream, number: int, body: bytes) -> None:
        """A record that is no sample."""
        if len(body) < _LEAST.get(number, 0):
            raise Damaged("a record is shorter than it must be")
        record = SourceCursor(body, "records")
        if number == _COMM:
            process, thread = record.numbers("II")
            self._name(thread, process, body[8:].partition(b"\0")[0][:64])
        elif number == _FORK:
            process, _, thread, parent = record.numbers("IIII")
            self._name(thread, process, self.threads.get(parent, (0, b""))[1])
        elif number in (_LOST, _LOST_SAMPLES):
            self._lost(record.numbers("QQ")[-1] if number == _LOST else record.numbers("Q")[0], body)
        elif number == _ROUND:
            if (rows := self.order.until(self._before)) is not None:
                self._done.append(rows)
            self._before = self.order.latest
        elif number == _ATTR:
            size = min(max(record.numbers("II")[1], _ATTRIBUTE), len(body))
            self._attribute(body[:size], body[size : len(body) // 8 * 8])
            self._learn()
        elif number == _TRACING_DATA:
            size = record.numbers("I")[0]
            if size > _MOST_BYTES:
                raise Damaged("the formats of its events are longer than they can be")
            stream.behind, stream.formats = (size + 7) // 8 * 8, bytearray()
        elif number == _AUX:
            stream.behind = record.numbers("Q")[0]
        elif number == _FEATURE:
            self._feature(record.numbers("Q")[0], body[8:])
        elif number in (_COMPRESSED, _COMPRESSED_2):
            self._keep_packed(body if number == _COMPRESSED else body[8 : 8 + record.numbers("Q")[0]])

    def _name(self, thread: int, process: int, comm: bytes) -> None:
        if len(self.threads) < _MOST:
            self.threads[thread] = (process, comm)

    def _lost(self, count: int, body: bytes) -> None:
        """A gap, on the CPU and at the time that the record ends with."""
        behind = self._attributes[0].behind(body) if self._attributes else {}
        time = int.from_bytes(behind.get(TIME, b"")[:8], "little") or self.order.latest
        cpu = int.from_bytes(behind.get(CPU, b"")[:4], "little")
        found = np.array([[-1, min(count, 1 << 48), time & (1 << 63) - 1, 0, 0, cpu]], np.int64)
        self.order.add(self.decoder.rows(b"", found, 1))

    def _keep_packed(self, data: bytes) -> None:
        if self._packed is None:
            self._packed = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (as long as we are)
        self.facts.compressed = True
        self._packed.write(data)
