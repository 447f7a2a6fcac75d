"""SMIs in virtual time: whether the guest brings them on, or the wall clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.lookback import Ints, Rows
from replay.simulate.operations import Cause, Op
from replay.timing.timed_operations import LAST, MORE, Timed

KVM_SMI: Final = 0xAEB7
_IO_EXITS: Final = (0x7B, 30)  # SVM_EXIT_IOIO, EXIT_REASON_IO_INSTRUCTION


@dataclass
class Driven:
    """How many SMIs followed an exit of the guest's own making (port I/O, KVM_SMI by the vCPU's thread), or none."""

    by_guest: int = 0
    by_clock: int = 0

    @property
    def open(self) -> bool:
        """Most came of the wall clock."""
        return self.by_clock > self.by_guest

    def watch(self, rows: Rows) -> None:
        """Take in a batch of rows."""
        at = rows.of_vcpu("kvm_smm_transition")
        at = at[rows.flags[at] & 1 != 0]
        if not len(at):
            return
        asked = rows.of_vcpu("ioctl")
        asked = asked[rows.code[asked] == KVM_SMI]
        exits = rows.of_vcpu("kvm_exit")
        entries = rows.of_vcpu("kvm_entry")
        for vcpu in np.unique(rows.vcpu[at]).tolist():
            smis, left, entered, told = (part[rows.vcpu[part] == vcpu] for part in (at, exits, entries, asked))
            entry = _before(entered, smis)
            last = _before(left, smis)
            by_io = (last > entry) & np.isin(rows.code[np.maximum(last, 0)], _IO_EXITS)
            own = by_io | (_before(told, smis) > entry)
            self.by_guest += int(own.sum())
            self.by_clock += int((~own).sum())


class Apart:
    """Takes SMIs out of vCPUs' programs into wall-clock queues, block after block of one VM."""

    def __init__(self, vcpus: int) -> None:
        self._inside = np.zeros(vcpus, np.bool_)
        self._leaving = np.zeros(vcpus, np.bool_)  # after the RSM's unload, before the load that ends it
        self._lead = np.zeros(vcpus, np.int64)
        self._guest = np.zeros(vcpus, np.int64)
        self._vcpus = vcpus

    def part(self, timed: Timed, began: int) -> Timed:
        """The same with SMIs due at their recorded time, in ns since `began` (boot clock)."""
        kind, gfn = timed.block.op & 15, timed.block.gfn
        queue = timed.queue.copy()
        lead, guest, wall = timed.lead.copy(), timed.guest.copy(), timed.wall.copy()
        for v in range(self._vcpus):
            mine = np.flatnonzero(timed.queue == v)
            if not len(mine):
                continue
            starts = (kind[mine] == Op.UNLOAD) & (gfn[mine] == Cause.SMI)
            if not (starts.any() or self._inside[v]):
                self._give(v, int(mine[0]), lead, guest)
                continue
            for i in mine.tolist():  # few operations: those of SMIs, and the first behind each
                self._place(v, i, int(kind[i]), int(gfn[i]), timed, began, (queue, lead, guest, wall))
        until = max(int(timed.block.time[-1]) - began, 0) if len(timed) else timed.until
        return replace(timed, queue=queue, lead=lead, guest=guest, wall=wall, until=until)

    def rest(self) -> tuple[Ints, Ints]:
        """What passed of programs after their last operation, before SMIs, by vCPU: (ns, ns in the guest)."""
        return self._lead, self._guest

    def _place(
        self,
        v: int,
        i: int,
        kind: int,
        gfn: int,
        timed: Timed,
        began: int,
        columns: tuple[NDArray[np.int32], Ints, Ints, Ints],
    ) -> None:
        queue, lead, guest, wall = columns
        if not self._inside[v]:
            if kind != Op.UNLOAD or gfn != Cause.SMI:
                self._give(v, i, lead, guest)
                return
            # What passed until the SMI is the program's.
            self._lead[v] += lead[i]
            self._guest[v] += guest[i]
            lead[i] = guest[i] = 0
            self._inside[v] = True
            wall[i] = max(int(timed.block.time[i]) - began, 0)
        else:
            wall[i] = MORE
            self._leaving[v] |= kind == Op.UNLOAD and gfn == Cause.RSM
            if self._leaving[v] and kind == Op.ENTER:
                wall[i] = LAST
                self._inside[v] = self._leaving[v] = False
        queue[i] = self._vcpus + v

    def _give(self, v: int, i: int, lead: Ints, guest: Ints) -> None:
        lead[i] += self._lead[v]
        guest[i] += self._guest[v]
        self._lead[v] = self._guest[v] = 0


def _before(sorted_rows: Ints, at: Ints) -> Ints:
    """The last of some rows before each of `at`; -1 where there is none."""
    found = np.searchsorted(sorted_rows, at) - 1
    return np.where(found >= 0, sorted_rows[np.maximum(found, 0)], -1) if len(sorted_rows) else np.full(len(at), -1)
