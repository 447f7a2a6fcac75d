# SPDX-License-Identifier: Apache-2.0
"""Streams, checkpoints and keepers of the tests' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer.flight.keeper import SECOND, Bounds, FlightThread
from tracer.flight.state import Checkpoint
from tracer.flight.trigger_texts import FlightTriggers
from tracer.order import HOLD_NANOSECONDS
from tracer.probing.program import COUNTERS
from tracer.upload.uploads import Uploads
from traces.record import RECORD
from traces.schema import BY_NAME

CPUS = 2
ENTRY, GAP = BY_NAME["kvm_entry"].code, BY_NAME["gap"].code
KVM = 0xFFFF888100000000

Rows = np.ndarray[Any, Any]


def entries(first: int, count: int, step: int = 1000, cpu: int = 0, kvm: int = KVM) -> Rows:
    """Entries of one vCPU at first, first + step, ... ns; `w0` does not compress."""
    made = np.zeros(count, RECORD)
    made["time"] = first + step * np.arange(count)
    made["kind"], made["cpu"], made["kvm"] = ENTRY, cpu, kvm
    made["w0"] = np.random.default_rng(first).integers(0, 1 << 62, count)
    return made


def row(kind: str, time: int, **fields: int) -> Rows:
    """One row."""
    made = np.zeros(1, RECORD)
    made["kind"], made["time"], made["vcpu"] = BY_NAME[kind].code, time, -1
    for name, value in fields.items():
        made[name] = value
    return made


def root(created: bool, time: int, table: int, kvm: int = KVM, role: int = 5) -> Rows:
    """A root that is made, or freed."""
    kind = "kvm_mmu_get_page" if created else "table_free"
    return row(kind, time, kvm=kvm if created else 0, root=table, w1=table, role=role, flags=int(created), n=1)


def vm(kvm: int = KVM, tgid: int = 7, tables: tuple[int, ...] = ()) -> dict[str, Any]:
    """A VM as a snapshot shows it."""
    roots = [{"table": table, "role": 5, "refs": 1} for table in tables]
    return {"kvm": kvm, "tgid": tgid, "comm": "vmm", "fd": 3, "vcpus": [], "slots": [], "roots": roots}


def checkpoint(began: int, ended: int, *vms: dict[str, Any], counters: Rows | None = None) -> Checkpoint:
    """A checkpoint; the counters are zero unless given."""
    clock = {"boot": ended, "mono": ended, "real": ended}
    counters = np.zeros(CPUS, COUNTERS) if counters is None else counters
    return Checkpoint(began, ended, list(vms), counters, clock, {"end": {"all": {}}}, {}, {})


def emitted(*batches: Rows) -> Rows:
    """The probes' counters after these rows."""
    counters = np.zeros(CPUS, COUNTERS)
    for batch in batches:
        kept = batch[batch["kind"] != GAP]
        np.add.at(counters["emitted"], (kept["cpu"], kept["kind"]), 1)
    return counters


class Flight:
    """A keeper without probes; what they would count is `counters`."""

    def __init__(
        self, directory: Path, seconds: float = 30, memory: int = 64 << 20, after: float = 0,
        triggers: Sequence[str] = (), uploads: Uploads | None = None,
    ) -> None:  # fmt: skip
        self.counters = np.zeros(CPUS, COUNTERS)
        bounds = Bounds(int(seconds * SECOND), int(after * SECOND), memory, 1 << 30)
        asked = FlightTriggers(triggers, frozenset(BY_NAME))
        self.thread = FlightThread(directory, bounds, checkpoint(0, 1, vm()), {}, self._progress, asked, uploads)

    def _progress(self) -> dict[str, Any]:
        return {"clock": {"name": "boottime", "samples": []}, "stats": {"end": {"all": {}}}, "missed": {},
                "vm_names": {}, "counters": self.counters}  # fmt: skip

    def give(self, rows: Rows, until: int) -> None:
        """Rows, and that nothing before `until` (ns) is missing."""
        kept = rows[rows["kind"] != GAP]
        np.add.at(self.counters["emitted"], (kept["cpu"], kept["kind"]), 1)
        self.thread.write([rows], until + HOLD_NANOSECONDS)
        self.thread.tick()

    def checkpoint(self, began: int, ended: int, *vms: dict[str, Any]) -> None:
        """Offer a checkpoint, with the counters as they are."""
        self.thread.offer(checkpoint(began, ended, *(vms or (vm(),)), counters=self.counters.copy()))

    def close(self) -> list[Path]:
        """End it; the dumps."""
        self.thread.close()
        self.thread.dumps.close()
        return self.thread.dumps.made
