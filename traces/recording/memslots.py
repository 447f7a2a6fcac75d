# SPDX-License-Identifier: Apache-2.0
"""The memory slots of every VM over time, from the snapshot and the KVM_SET_USER_MEMORY_REGION calls recorded.

`memslot` rows are written when the ioctl begins; whether it took effect is what the thread's next `ioctl_end` says.
Slot changes are rare, so this is the one place of compaction that looks at rows one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from traces.lives import Ints
from traces.record import Columns
from traces.schema import BY_NAME

MEMSLOT: Final = BY_NAME["memslot"].code
IOCTL_END: Final = BY_NAME["ioctl_end"].code
# The ioctl's type and number: KVM_SET_USER_MEMORY_REGION and, since Linux 6.8, KVM_SET_USER_MEMORY_REGION2.
REGION_COMMANDS: Final = (0xAE46, 0xAE49)
MAX_SLOTS: Final = 4096  # entries kept per VM in the metadata; the rows have them all


@dataclass(frozen=True)
class _Change:
    time: int
    vm: int
    slot: int
    as_id: int
    gfn: int
    hva: int
    pages: int
    flags: int


class Memslots:
    """Collects slot changes batch by batch; `of_vm` then gives a VM's slots with their times."""

    def __init__(self) -> None:
        self._pending: dict[int, list[Any]] = {}  # by thread: the change in progress and whether it succeeded
        self._changes: list[list[Any]] = []

    def add(self, columns: Columns, vm: Ints) -> None:
        kind = columns["kind"]
        wanted = kind == MEMSLOT
        ended = (kind == IOCTL_END) & np.isin(columns["w0"] & np.uint64(0xFFFF), REGION_COMMANDS)
        for row in np.flatnonzero(wanted | ended).tolist():
            tid = int(columns["tid"][row])
            if not wanted[row]:
                if tid in self._pending:
                    self._pending.pop(tid)[1] = int(columns["n"][row]) >= 0
                continue
            w0, w1, w2, w3 = (int(columns[name][row]) for name in ("w0", "w1", "w2", "w3"))
            slot, as_id = int(columns["n"][row]) & 0xFFFF, int(columns["as_id"][row])
            change = _Change(int(columns["time"][row]), int(vm[row]), slot, as_id, w0, w1, w2, w3)
            entry = [change, None]
            self._changes.append(entry)
            self._pending[tid] = entry

    def of_vm(self, vm: int, at_start: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a VM's slots as {slot, as_id, gfn, pages, hva, flags, since, until}, oldest first.

        Times are ns; `since` None means since before the recording, `until` None to its end. `assumed` marks a slot
        whose ioctl was not seen to end; it is taken to have succeeded.
        """
        slots = [dict(slot, since=None, until=None) for slot in at_start]
        live = {(int(slot["as_id"]), int(slot["slot"])): slot for slot in slots}
        for change, succeeded in self._changes:
            if change.vm != vm or succeeded is False:
                continue
            former = live.pop((change.as_id, change.slot), None)
            if former is not None:
                former["until"] = change.time
            if not change.pages:
                continue
            slot = {name: getattr(change, name) for name in ("slot", "as_id", "gfn", "pages", "hva", "flags")}
            slot |= {"since": change.time, "until": None}
            if succeeded is None:
                slot["assumed"] = True
            live[(change.as_id, change.slot)] = slot
            slots.append(slot)
        return slots
