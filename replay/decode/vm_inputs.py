# SPDX-License-Identifier: Apache-2.0
"""One VM of a trace, decoded once: its rows through the decoder, batch by batch, and out as parts of its inputs.

Memory is a batch, a few numbers a vCPU and the memslot table; for recordings that show no removals (5.10), also what
the recorded roots have mapped.
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
from replay.decode.decoder import Decoder
from replay.decode.inputs import EXIT_COLUMNS, Exits, Inputs, Ints, Rest
from replay.decode.slots import Slots, logs_dirty
from replay.simulate.operations import Op, Ranges
from traces.errors import Problem
from traces.kernels.triggers import Trigger
from traces.reader import BATCH_ROWS, Trace

_LONG: Final = 1 << 20  # rows of a VM: batches are twice as long then, for a tenth less time and 40 MiB more
_ROOTS: Final = 1 << 24  # whose role words are kept; beyond, touches count as outside of SMM
_IDS: Final = 1 << 15  # vCPU ids are int16 in a trace
_TYPES: Final = {"op": np.uint32, "exit": np.int32, "tables": np.uint8, "has": np.uint32, "flags": np.uint8}
_TRIGGERS: Final = tuple(f"trigger {trigger.name}" for trigger in Trigger)
_RANGED: Final = (int(Op.ZAP), int(Op.SPLIT))


class RowTimes(Protocol):
    """What finds the spans of time that end with the rows of a batch."""

    def feed(self, batch: Batch) -> tuple[NDArray[np.uint8], Ints, NDArray[np.uint8]]:
        """By row: VcpuState (NO_SPAN: none ends there), ns, marks."""


def vcpu_ids(vm: Mapping[str, Any]) -> list[int]:
    """A VM's vCPUs by their recorded ids; a place in the list is a vCPU's dense number."""
    return sorted({int(vcpu["id"]) for vcpu in vm["vcpus"]})


def dense_numbers(where: object, vm: Mapping[str, Any]) -> NDArray[np.int32]:
    """The dense number of each vCPU id, -1 for none; the last place is that of no vCPU. Not to be written to."""
    ids = vcpu_ids(vm)
    if ids and not 0 <= ids[0] <= ids[-1] < _IDS:
        wrong = ids[-1] if ids[-1] >= _IDS else ids[0]
        raise Problem(f"{where}: VM {vm['id']} has a vCPU {wrong}, which no row can name")
    return _numbers(tuple(ids))


@lru_cache(16)
def _numbers(ids: tuple[int, ...]) -> NDArray[np.int32]:
    """128 KiB, which VMs with the same ids share."""
    numbers = np.full(_IDS + 1, -1, np.int32)
    numbers[list(ids)] = np.arange(len(ids))
    numbers.flags.writeable = False
    return numbers


def parts_of(trace: Trace, vm: Mapping[str, Any], count: int) -> tuple[int, int, int]:
    """A VM's time in `count` parts: (boot ns of the first's begin, ns of each, count).

    Raises Problem for rows before the clock began.
    """
    first, last = trace.metadata.spans.get(int(vm["id"]), (0, 0))
    if first < 0:
        raise Problem(f"{trace.path}: damaged: VM {vm['id']} has rows before the clock began")
    return first, (last - first) // count + 1, count


class RowCounter(Protocol):
    """What counts rows (`row_counts.RowCounts`)."""

    def feed(self, batch: Batch) -> None:
        """Take in all rows of a batch, those after the VM's end too."""

    def finish(self) -> None:
        """There are no more rows."""


class RowReader(Protocol):
    """What is asked of the same rows besides, so that they are read once for both."""

    @property
    def columns(self) -> Collection[str]:
        """What it reads of rows."""

    def feed(self, vm: int, batch: pa.RecordBatch) -> None:
        """Take a VM's next rows, which have these columns and others; VMs may come from several threads."""


class VmInputs:
    """One VM of a trace. Iterate once; `vcpus` gives the recorded id of each of its dense numbers.

    After the iteration `decoder` has what was counted, `notes` what was inferred or is undetermined, and `rest` what
    each vCPU still did after its last input.
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
        """`groups`: find out what the shadow MMU may prefetch around touches. `times`: inputs come with times.

        `size`: rows of a batch; by default as many as suit the VM's length.
        `row_counts`: counts the rows on the way. `columns`: to be read though decoding does not need them, for `times`.
        `beside`: is given all rows, too.
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
        self.decoder = Decoder(capabilities, count, Slots(vm["slots"]), roles, groups, times is not None)
        self._held = _Held(2 * size)
        self._first_exit = 0
        self.rest = Rest(*(np.zeros(count, np.int64) for _ in range(3)))

    @property
    def notes(self) -> Counter[str]:
        """Counts by what they are of."""
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
            del rows, whole, batch  # else they are there as long as the next ones are decoded
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
            del rows  # else they are there as long as the next ones are decoded

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
        """The first inputs, which no later row can change; what is behind them moves to the front."""
        decoder, held = self.decoder, self._held
        left = held.exit[count : decoder.inputs]
        op, gfn, time, seq, exit_ = (getattr(held, name)[:count].copy() for name in _Held.INPUTS)
        ranges = int(np.isin(op & 15, _RANGED).sum()) if decoder.ranges else 0
        bounds = zip(held.start[:ranges].tolist(), held.end[:ranges].tolist(), strict=True)
        records = int(exit_.max(initial=-1)) + 1
        exits = Exits(**{name: getattr(held, name)[:records].copy() for name in EXIT_COLUMNS}, first=self._first_exit)
        # An exit may have inputs on both sides.
        done = int(left[left >= 0].min(initial=decoder.records))
        moved = left - done
        held.move(count, decoder.inputs, done, decoder.records, ranges, decoder.ranges)
        held.exit[: len(moved)] = np.where(left >= 0, moved, -1)
        if ranges:
            ranged = np.isin(held.op[: len(left)] & 15, _RANGED)
            held.gfn[: len(left)][ranged] -= ranges
        decoder.drop(count, done, ranges)
        self._first_exit += done
        return Inputs(op, gfn, time, seq, exit_, Ranges(list(bounds)), exits)


class _Held:
    """Memory for the inputs, exits and ranges that are held, `room` of each."""

    INPUTS: Final = ("op", "gfn", "time", "seq", "exit")
    RANGES: Final = ("start", "end")

    def __init__(self, room: int) -> None:
        for name in (*self.INPUTS, *EXIT_COLUMNS, *self.RANGES):
            setattr(self, name, np.zeros(room, _TYPES.get(name, np.int64)))

    op: NDArray[np.uint32]
    gfn: Ints
    exit: NDArray[np.int32]
    start: Ints
    end: Ints

    def grown(self) -> _Held:
        """Twice the room, with the same in it."""
        new = _Held(2 * len(self.op))
        for name, column in vars(self).items():
            getattr(new, name)[: len(column)] = column
        return new

    def move(self, inputs: int, inputs_end: int, exits: int, exits_end: int, ranges: int, ranges_end: int) -> None:
        """Move what is behind the first `count` values, up to the ends, to the front."""
        for names, first, end in (
            (self.INPUTS, inputs, inputs_end),
            (EXIT_COLUMNS, exits, exits_end),
            (self.RANGES, ranges, ranges_end),
        ):
            for name in names:
                column = getattr(self, name)
                column[: end - first] = column[first:end].copy()


def _counted(capabilities: Capabilities) -> tuple[str, ...]:
    """The columns that counting rows needs besides."""
    counts = capabilities.trace.metadata.kinds
    changes = ("old", "new") if counts.get("kvm_tdp_mmu_spte_changed") else ()
    return (*changes, "ret", *(("refs",) if counts.get("root_put") else ()))


def _columns(capabilities: Capabilities, vm: Mapping[str, Any], timed: bool, more: tuple[str, ...]) -> list[str]:
    """The columns that say anything of this VM: reading the others takes as long as all the rest."""
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
