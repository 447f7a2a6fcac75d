"""What happens to a VM as a whole, from rows to stimuli: invalidations, removals, dirty logging, the end."""

from __future__ import annotations

from typing import Final

import numpy as np

from replay.decode.capabilities import Evidence
from replay.decode.inputs import Out
from replay.decode.lookback import Ints, Rows
from replay.decode.slots import Slots, logs_dirty
from replay.simulate.operations import LEVEL_SHIFT, VCPU_SHIFT, Op

_PRESENT: Final = np.uint64(1 << 11)
_LARGE: Final = np.uint64(1 << 7)
# Before this version the same function empties roots when they are invalidated and when the process ends.
ONE_FUNCTION: Final = (5, 12, 0)


class Host:
    """Of one VM."""

    def __init__(self, evidence: Evidence, slots: Slots) -> None:
        self._slots = slots
        self._one_function = evidence.kernel.since < ONE_FUNCTION
        self._invalidating: set[int] = set()  # threads
        self._collapsing: set[int] = set()  # threads in an ioctl that ends dirty logging

    def emit(self, rows: Rows, out: Out) -> None:
        """Put out what a batch's rows say, other than of single vCPUs."""
        out.add(rows.of("kvm_mmu_zap_all_fast"), int(Op.INVALIDATE), 0)
        leafs = rows.of("zap_leafs")
        if len(leafs):
            space = rows.as_id[leafs].astype(np.int64)
            out.ranges(leafs, int(Op.ZAP) | space << LEVEL_SHIFT, rows.gfn[leafs], rows.value[leafs].astype(np.int64))
        unmapped = rows.of("kvm_unmap_hva_range")
        if len(unmapped):
            row, space, start, end = self._slots.frames(rows.addr[unmapped], rows.value[unmapped], rows.time[unmapped])
            out.ranges(unmapped[row], int(Op.ZAP) | space << LEVEL_SHIFT, start, end)
        out.add(self._emptied(rows), int(Op.ZAP_ALL), 0)
        self._logging(rows, out)
        out.add(rows.of("vm_destroy")[:1], int(Op.END), 0)

    def _emptied(self, rows: Rows) -> Ints:
        at = rows.of("zap_all")
        if not self._one_function or not len(at):
            return at
        kept = []
        whole = set(at.tolist())
        for row in rows.of("zap_all", "kvm_mmu_zap_all_fast").tolist():
            thread = int(rows.tid[row])
            if row not in whole:
                self._invalidating.add(thread)
            elif thread in self._invalidating:
                self._invalidating.discard(thread)
            else:
                kept.append(row)
        return np.array(kept, np.int64)

    def _logging(self, rows: Rows, out: Out) -> None:
        """Dirty logging begins: huge leaves are split. It ends: tables whose memory is huge are removed."""
        for thread in self._collapsing.copy():
            self._collapse(rows, out, thread, -1)
        for row in rows.of("memslot").tolist():
            space = int(rows.as_id[row])
            before, after = self._slots.changed(int(rows.time[row]), int(rows.slot[row]) & 0xFFFF, space)
            if before is None or after is None or before["pages"] != after["pages"]:
                continue
            was, now = logs_dirty(before), logs_dirty(after)
            if now and not was:
                start, end = np.array([after["gfn"]]), np.array([after["gfn"] + after["pages"]])
                out.ranges(np.array([row]), int(Op.SPLIT) | space << LEVEL_SHIFT, start, end)
                out.plain = False
            elif was and not now:
                self._collapse(rows, out, int(rows.tid[row]), row)

    def _collapse(self, rows: Rows, out: Out, thread: int, start: int) -> None:
        """Tables that this thread removes after row `start`, until its ioctl returns."""
        ends = rows.of("ioctl_end")
        ends = ends[(rows.tid[ends] == thread) & (ends > start)]
        end = int(ends[0]) if len(ends) else len(rows)
        if len(ends):
            self._collapsing.discard(thread)
        else:
            self._collapsing.add(thread)
        at = rows.of("kvm_tdp_mmu_spte_changed")
        at = at[(at >= start) & (at < end) & (rows.tid[at] == thread) & (rows.level[at] > 1)]
        old, new = rows.old[at], rows.new[at]
        table = (old & _PRESENT != 0) & (old & _LARGE == 0)
        kept = (new & _PRESENT != 0) & (new & _LARGE == 0)
        at = at[table & ~kept]
        level, space = rows.level[at].astype(np.int64), rows.as_id[at].astype(np.int64)
        out.add(at, int(Op.COLLAPSE) | level << LEVEL_SHIFT | space << VCPU_SHIFT, rows.gfn[at])
