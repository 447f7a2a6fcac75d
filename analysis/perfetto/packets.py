# SPDX-License-Identifier: Apache-2.0
"""Writes a Perfetto trace as a stream: single packets by the `perfetto` package, many alike as arrays of bytes.

A packet as an object takes some 2.5 us. One span or counter is therefore serialised by the package, and numbers are put
into copies of its bytes. Where they go is found by serialising it again with another number of the same length, so that
every field number is the package's. Varints of one array have one length; the shorter are padded, as Perfetto's own
writer pads lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

from traces.outputs import Output

Ints = NDArray[np.int64]
_SEQUENCE: Final = 1  # all packets are of one writer
_FIXED: Final = 8  # bytes of a double or a flow id
_BUFFER: Final = 1 << 20  # bytes


class Template:
    """The bytes of packets, with places for numbers.

    `fill` makes a trace that has these numbers. `widths` are the bytes of each varint, by name; `fixed` names the
    numbers of eight bytes.
    """

    def __init__(self, fill: Callable[..., Any], widths: Mapping[str, int], fixed: Sequence[str] = ()) -> None:
        self._widths = widths
        low: dict[str, Any] = {name: 1 << 7 * (width - 1) for name, width in widths.items()}
        high: dict[str, Any] = {name: (1 << 7 * width) - 1 for name, width in widths.items()}
        low |= {name: float(np.frombuffer(b"\x01" * _FIXED)[0]) for name in fixed}
        high |= {name: float(np.frombuffer(b"\x02" * _FIXED)[0]) for name in fixed}
        self._bytes = _bytes(fill(**low))
        self._places = {name: np.flatnonzero(self._bytes != _bytes(fill(**{**low, name: high[name]}))) for name in low}

    def encode(self, columns: Mapping[str, Ints | NDArray[np.float64]]) -> NDArray[np.uint8]:
        """Return a two-dimensional array of bytes: a row for each value of the columns, all of one length."""
        count = len(next(iter(columns.values())))
        rows = np.tile(self._bytes, (count, 1))
        for name, values in columns.items():
            places = self._places[name]
            if name in self._widths:
                rest = values.astype(np.uint64)
                for at in places[:-1]:
                    rows[:, at] = rest & np.uint64(0x7F) | np.uint64(0x80)
                    rest = rest >> np.uint64(7)
                rows[:, places[-1]] = rest
            else:
                rows[:, places] = np.ascontiguousarray(values, np.float64).view(np.uint8).reshape(-1, _FIXED)
        return rows


class PacketWriter:
    """Writes the packets of one file, many at a time; `flush` must be the last call."""

    def __init__(self, output: Output, names: Sequence[str], notes: Sequence[str]) -> None:
        """`names` are the names of spans written in bulk, by number from 0; `notes` those of numeric annotations."""
        self.packets = 0
        self._output = output
        self._waiting = bytearray()
        self._notes = {name: number for number, name in enumerate(notes, 1)}
        self._tracks = 0
        first = self._packet()
        first.sequence_flags = pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        for number, name in enumerate(names, 1):
            first.interned_data.event_names.add(iid=number, name=name)
        for name, number in self._notes.items():
            first.interned_data.debug_annotation_names.add(iid=number, name=name)
        self._write(first)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._output.write(self._waiting)
        self._waiting.clear()

    def clocks(self, samples: Sequence[Mapping[str, int]]) -> None:
        """Write samples of three clocks: CLOCK_BOOTTIME, monotonic and real, `boot`, `mono`, `real` in ns."""
        for sample in samples:
            packet = self._packet()
            for clock, name in (
                (pb.BUILTIN_CLOCK_BOOTTIME, "boot"),
                (pb.BUILTIN_CLOCK_MONOTONIC, "mono"),
                (pb.BUILTIN_CLOCK_REALTIME, "real"),
            ):
                packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=sample[name])
            self._write(packet)

    def track(self, name: str, parent: int = 0, *, unit: str = "", description: str = "") -> int:
        """Add a track below `parent`, after its other tracks, and return its uuid; with a unit it is a counter."""
        self._tracks += 1
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid, track.name = self._tracks, name
        track.child_ordering = pb.TrackDescriptor.EXPLICIT
        track.sibling_order_rank = self._tracks
        if parent:
            track.parent_uuid = parent
        if description:
            track.description = description
        if unit:
            track.counter.unit_name = unit
        self._write(packet)
        return self._tracks

    def span(self, track: int, begin: int, end: int, name: str, notes: Mapping[str, int | str] | None = None) -> None:
        """Write one span with a name of its own, from `begin` to `end` in ns of CLOCK_BOOTTIME."""
        packet = self._event(track, begin, pb.TrackEvent.TYPE_SLICE_BEGIN)
        packet.track_event.name = name
        for key, value in (notes or {}).items():
            if isinstance(value, str):
                packet.track_event.debug_annotations.add(name=key, string_value=value)
            else:
                packet.track_event.debug_annotations.add(name=key, int_value=value)
        self._write(packet)
        self._write(self._event(track, end, pb.TrackEvent.TYPE_SLICE_END))

    def spans(
        self, track: int, begin: Ints, end: Ints, name: Ints, notes: Mapping[str, Ints], flows: tuple[Ints, Ints]
    ) -> None:
        """Write spans of one track in order of time.

        `flows` has the places of those spans through which a flow goes, and the ids of these flows.
        """
        if not len(begin):
            return
        at, flow = flows
        columns = {"begin": begin, "end": end, "name": name + 1, **notes}
        widths = tuple((key, _width(values)) for key, values in columns.items())
        numbers = tuple(self._notes[key] for key in notes)
        plain = _spans(widths, track, numbers, False)
        if not len(at):
            self._raw(plain.encode(columns))
        else:
            flowing = np.zeros(len(begin), np.bool_)
            flowing[at] = True
            rest = {key: values[~flowing] for key, values in columns.items()}
            those = {key: values[at] for key, values in columns.items()}
            ids = flow.view(np.float64)  # numbers of eight bytes, too
            self._raw(
                _woven(plain.encode(rest), _spans(widths, track, numbers, True).encode({**those, "flow": ids}), flowing)
            )
        self.packets += 2 * len(begin)

    def counter(self, track: int, time: Ints, values: NDArray[np.float64]) -> None:
        """Write the values of a counter at these times (ns)."""
        if len(time):
            self._raw(_counter(_width(time), track).encode({"time": time, "value": values}))
            self.packets += len(time)

    def _event(self, track: int, time: int, kind: int) -> Any:
        packet = self._packet()
        packet.timestamp = time
        packet.sequence_flags = pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        return packet

    @staticmethod
    def _packet() -> Any:
        return pb.TracePacket(trusted_packet_sequence_id=_SEQUENCE)

    def _write(self, packet: Any) -> None:
        self._raw(np.frombuffer(pb.Trace(packet=[packet]).SerializeToString(), np.uint8))
        self.packets += 1

    def _raw(self, rows: NDArray[np.uint8]) -> None:
        self._waiting += rows.data
        if len(self._waiting) >= _BUFFER:
            self.flush()


def _width(values: Ints | NDArray[np.float64]) -> int:
    """Return how many bytes the largest value needs as a varint. No value is negative."""
    return max(-(-int(values.max()).bit_length() // 7), 1)


def _bytes(trace: Any) -> NDArray[np.uint8]:
    return np.frombuffer(trace.SerializeToString(), np.uint8)


def _woven(first: NDArray[np.uint8], second: NDArray[np.uint8], which: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Join two arrays of rows, each of its own length, in one order: `which` says where a row of `second` is next."""
    size: Ints = np.array([first.shape[1], second.shape[1]])[which.astype(np.int8)]
    start = np.cumsum(size) - size
    woven = np.empty(int(size.sum()), np.uint8)
    for rows, at in ((first, start[~which]), (second, start[which])):
        woven[at[:, None] + np.arange(rows.shape[1])] = rows
    return woven


def _span(track: int, notes: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function that makes both packets of a span; annotations take its values in the order of `notes`."""

    def fill(begin: int, end: int, name: int, flow: float | None = None, **values: int) -> Any:
        trace = pb.Trace()
        for time, kind in ((begin, pb.TrackEvent.TYPE_SLICE_BEGIN), (end, pb.TrackEvent.TYPE_SLICE_END)):
            packet = trace.packet.add(timestamp=time, trusted_packet_sequence_id=_SEQUENCE)
            packet.sequence_flags = pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
            packet.track_event.type = kind
            packet.track_event.track_uuid = track
            if kind == pb.TrackEvent.TYPE_SLICE_BEGIN:
                packet.track_event.name_iid = name
                for number, value in zip(notes, values.values(), strict=True):
                    packet.track_event.debug_annotations.add(name_iid=number, int_value=value)
                if flow is not None:
                    packet.track_event.flow_ids.append(int(np.float64(flow).view(np.uint64)))
        return trace

    return fill


@lru_cache(256)
def _spans(widths: tuple[tuple[str, int], ...], track: int, notes: tuple[int, ...], flowing: bool) -> Template:
    return Template(_span(track, notes), dict(widths), ("flow",) if flowing else ())


@lru_cache(256)
def _counter(width: int, track: int) -> Template:
    def fill(time: int, value: float) -> Any:
        trace = pb.Trace()
        packet = trace.packet.add(timestamp=time, trusted_packet_sequence_id=_SEQUENCE)
        packet.track_event.type = pb.TrackEvent.TYPE_COUNTER
        packet.track_event.track_uuid = track
        packet.track_event.double_counter_value = value
        return trace

    return Template(fill, {"time": width}, ("value",))
