# SPDX-License-Identifier: Apache-2.0
"""Decode one VM of a trace: feed its rows to the decoder batch by batch, and yield its inputs in parts.

The memory needed is a batch, a few numbers for each vCPU, and the memslot table; for recordings that show no removals
(5.10), also everything that the recorded roots have mapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from replay.decode.batch import COLUMNS, Batch
from replay.decode.capabilities import Capabilities
from replay.decode.inputs import EXIT_COLUMNS, Exits, Inputs, Ints, Rest
from replay.decode.rows.decoder import Decoder
from replay.decode.slots import Slots, logs_dirty
from replay.simulate.operations import Op, Ranges
from traces.errors import Problem
from traces.kernels.triggers import Trigger
from traces.reader import BATCH_ROWS, Trace

_LONG: Final = 1 << 20  # from this many rows of a VM on, batches are twice as long: 10 % less time, 40 MiB more memory
_ROOTS: Final = 1 << 24  # roots whose role words are kept; accesses under other roots count as outside of SMM
_ROOM: Final = 256  # inputs for which there is room beyond those of half a batch's rows; it grows where that is too few
_IDS: Final = 1 << 15  # vCPU ids are int16 in a trace
_TYPES: Final = {"op": np.uint32, "exit": np.int32, "tables": np.uint8, "has": np.uint32, "flags": np.uint8}
_TRIGGERS: Final = tuple(f"trigger {trigger.name}" for trigger in Trigger)


class RowTimes(Protocol):
    """Finds the spans of time that end with the rows of a batch."""

    def feed(self, batch: Batch) -> tuple[NDArray[np.uint8], Ints, NDArray[np.uint8]]:
        """Take in a batch, and return by row the VcpuState that ends there (or
        NO_SPAN), its length in ns, and the span's marks.
        """


def vcpu_ids(vm: Mapping[str, Any]) -> list[int]:
    """Return a VM's recorded vCPU ids, sorted; the position in the list is the vCPU's dense number."""
    return sorted({int(vcpu["id"]) for vcpu in vm["vcpus"]})


def dense_numbers(where: object, vm: Mapping[str, Any]) -> NDArray[np.int32]:
    """Return the dense number of each vCPU id, -1 if there is none.

    The last place, for rows without a vCPU, is -1 as well.

    The array must not be written to. Raises Problem for an id that no row can have.
    """
    ids = vcpu_ids(vm)
    if ids and not 0 <= ids[0] <= ids[-1] < _IDS:
        wrong = ids[-1] if ids[-1] >= _IDS else ids[0]
        raise Problem(f"{where}: VM {vm['id']} has a vCPU {wrong}, which no row can name")
    return _numbers(tuple(ids))


@lru_cache(16)
def _numbers(ids: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the array from a cache: it takes 128 KiB, which VMs with the same ids share."""
    numbers = np.full(_IDS + 1, -1, np.int32)
    numbers[list(ids)] = np.arange(len(ids))
    numbers.flags.writeable = False
    return numbers


def parts_of(trace: Trace, vm: Mapping[str, Any], count: int) -> tuple[int, int, int]:
    """Divide a VM's time into `count` parts, and return (begin in boot ns, length of a part in ns, count).

    Raises Problem if the VM has rows before the clock began.
    """
    first, last = trace.metadata.spans.get(int(vm["id"]), (0, 0))
    if first < 0:
        raise Problem(f"{trace.path}: damaged: VM {vm['id']} has rows before the clock began")
    return first, (last - first) // count + 1, count


class RowCounter(Protocol):
    """Counts rows while they are decoded (`row_counts.RowCounts`)."""

    def feed(self, batch: Batch) -> None:
        """Take in all rows of a batch, including those after the VM's end."""

    def finish(self) -> None:
        """Count what is still pending after the last row."""


class RowReader(Protocol):
    """Reads the same rows for another purpose, so that they are read from the file only once."""

    @property
    def columns(self) -> Collection[str]:
        """The names of the trace's columns that this reader needs."""

    def feed(self, vm: int, batch: pa.RecordBatch) -> None:
        """Take in a VM's next rows, which have these columns and others; VMs may come from several threads."""


class VmInputs:
    """The inputs of one VM of a trace, which can be iterated over once. `vcpus` has the recorded ids by dense number.

    After the iteration, `decoder` has the counts, `notes` what was inferred or is undetermined, and `rest` the time of
    each vCPU after its last input.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        vm: Mapping[str, Any],
        *,
        groups: bool = True,
        size: int | None = None,
        times: RowTimes | None = None,
        row_counts: RowCounter | None = None,
        columns: tuple[str, ...] = (),
        beside: RowReader | None = None,
    ) -> None:
        """Prepare the decoding of one VM.

        `groups` says to find out what the shadow MMU may prefetch around accesses. `size` is the number of rows in a
        batch; by default it depends on the VM's length. With `times`, inputs come with times. `row_counts` counts the
        rows on the way. `columns` are read in addition to those that decoding needs, for `times`. `beside` is also
        given all rows.
        """
        self.id = int(vm["id"])
        self.vcpus = vcpu_ids(vm)
        self._numbers = dense_numbers(capabilities.trace.path, vm)
        rows = sum(group.rows for group in capabilities.trace.groups(self.id))
        size = max(min(size or (BATCH_ROWS if rows < _LONG else 2 * BATCH_ROWS), rows), 1)
        self._capabilities, self._size, self._times, self._row_counts = capabilities, size, times, row_counts
        more = columns if row_counts is None else (*columns, *_counted(capabilities))
        self._columns = _columns(capabilities, vm, times is not None, more)
        self._beside = beside
        count = max(len(self.vcpus), 1)
        meta = capabilities.trace.metadata
        roles = np.zeros(min(meta.root_count, _ROOTS) + 2, np.uint32)
        for root in meta.uncreated_roots:
            if root["id"] < len(roles) - 1:
                roles[root["id"]] = root["role"]
        self.decoder = Decoder(capabilities, count, times is not None, roles, Slots(vm["slots"]), groups)
        self._held = _Held(size // 2 + _ROOM)
        self._first_exit = 0
        self.rest = Rest(*(np.zeros(count, np.int64) for _ in range(3)))

    @property
    def notes(self) -> Counter[str]:
        """How often each trigger occurred, and how often something was inferred, hidden or nested, by name."""
        decoder = self.decoder
        counts = Counter(dict(zip(_TRIGGERS, decoder.counts.tolist(), strict=True)))
        counts.update({"inferred removals": decoder.inferred, "prefetched rows": decoder.hidden})
        counts.update({"nested entries": decoder.nested})
        return counts

    def __iter__(self) -> Iterator[Inputs]:
        decoder = self.decoder
        decoder.attach(self._held)
        for rows in self._rows():
            whole = Batch(rows, self._numbers)
            if self._row_counts is not None:
                self._row_counts.feed(whole)
            if decoder.ended:
                continue
            batch, ends = whole.of_vm()
            since = decoder.inputs
            self._decode(batch)
            if settled := decoder.settle(since):
                yield self._taken(settled)
            if ends and self._row_counts is None:
                break
            del rows, whole, batch  # else they would stay in memory while the next batch is read
        if self._row_counts is not None:
            self._row_counts.finish()
        decoder.finish()
        if decoder.inputs:
            yield self._taken(decoder.inputs)
        self.rest = Rest(*(decoder.vcpus[name].copy() for name in ("lead", "lead_guest", "lead_idle")))

    def _rows(self) -> Iterator[pa.RecordBatch]:
        trace, beside = self._capabilities.trace, self._beside
        if beside is None:
            yield from trace.batches(self._columns, vm=self.id, size=self._size)
            return
        names = [name for name in trace.schema.names if name in self._columns or name in beside.columns]
        for rows in trace.batches(names, vm=self.id, size=self._size):
            beside.feed(self.id, rows)
            yield rows.select(self._columns)
            del rows  # else they would stay in memory while the next batch is read

    def _decode(self, batch: Batch) -> None:
        if self._times is not None:
            spans = self._times.feed(batch)
        else:
            spans = (np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.uint8))
        done = 0
        while (done := self.decoder.run(batch, done, *spans)) < len(batch) and not self.decoder.ended:
            self._held = self._held.grown()
            self.decoder.attach(self._held)

    def _taken(self, count: int) -> Inputs:
        """Return the first `count` inputs, which no later row can change, and move those behind them to the front."""
        decoder, held = self.decoder, self._held
        left = held.exit[count : decoder.inputs]
        op, gfn, time, seq, exit_ = (getattr(held, name)[:count].copy() for name in _Held.INPUTS)
        ranges = int(_is_ranged(op).sum()) if decoder.ranges else 0
        bounds = zip(held.start[:ranges].tolist(), held.end[:ranges].tolist(), strict=True)
        records = int(exit_.max(initial=-1)) + 1
        exits = Exits(**{name: getattr(held, name)[:records].copy() for name in EXIT_COLUMNS}, first=self._first_exit)
        # An exit may have inputs among both those that are taken and those that stay.
        done = int(left[left >= 0].min(initial=decoder.records))
        moved = left - done
        held.move(count, decoder.inputs, done, decoder.records, ranges, decoder.ranges)
        held.exit[: len(moved)] = np.where(left >= 0, moved, -1)
        if ranges:
            held.gfn[: len(left)][_is_ranged(held.op[: len(left)])] -= ranges
        decoder.drop(count, done, ranges)
        self._first_exit += done
        return Inputs(op, gfn, time, seq, exit_, Ranges(list(bounds)), exits)


class _Held:
    """Memory for `room` inputs, exits and ranges each, which are still held."""

    INPUTS: Final = ("op", "gfn", "time", "seq", "exit")
    RANGES: Final = ("start", "end")

    def __init__(self, room: int) -> None:
        for name in (*self.INPUTS, *EXIT_COLUMNS, *self.RANGES):
            setattr(self, name, np.empty(room, _TYPES.get(name, np.int64)))

    op: NDArray[np.uint32]
    gfn: Ints
    exit: NDArray[np.int32]
    start: Ints
    end: Ints

    def grown(self) -> _Held:
        """Return a copy with twice the room."""
        new = _Held(2 * len(self.op))
        for name, column in vars(self).items():
            getattr(new, name)[: len(column)] = column
        return new

    def move(self, inputs: int, inputs_end: int, exits: int, exits_end: int, ranges: int, ranges_end: int) -> None:
        """Move inputs, exits and ranges to the front, each from its first position up to its end."""
        for names, first, end in (
            (self.INPUTS, inputs, inputs_end),
            (EXIT_COLUMNS, exits, exits_end),
            (self.RANGES, ranges, ranges_end),
        ):
            for name in names:
                column = getattr(self, name)
                column[: end - first] = column[first:end].copy()


def _is_ranged(op: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return whether each input's `gfn` is the number of a range."""
    kind = op & 15
    ranged: NDArray[np.bool_] = (kind == Op.ZAP) | (kind == Op.SPLIT)
    return ranged


def _counted(capabilities: Capabilities) -> tuple[str, ...]:
    """Return the columns that counting rows needs in addition."""
    counts = capabilities.trace.metadata.kinds
    changes = ("old", "new") if counts.get("kvm_tdp_mmu_spte_changed") else ()
    return (*changes, "ret", *(("refs",) if counts.get("root_put") else ()))


def _columns(capabilities: Capabilities, vm: Mapping[str, Any], timed: bool, more: tuple[str, ...]) -> list[str]:
    """Return the columns with information about this VM; reading the others would take as long as everything else."""
    counts = capabilities.trace.metadata.kinds
    logs = any(map(logs_dirty, vm["slots"]))
    moves = logs or (capabilities.kernel.slot_zap and any(slot.get("until") is not None for slot in vm["slots"]))
    fast = bool(counts.get("fast_page_fault"))
    wanted = {
        "rip": timed,
        "addr": timed or fast or bool(counts.get("kvm_unmap_hva_range")),
        "old": fast or logs,
        "new": fast or logs,
        "ret": timed or fast or not counts.get("root_get"),
        "as_id": moves or bool(counts.get("zap_leafs")),
        "slot": moves,
        "refs": False,
        "table": capabilities.infers,
        "tid": timed or moves or capabilities.kernel.zap_all_fast == "empty",
    }
    return [name for name in COLUMNS if wanted.get(name, True) or name in more]
