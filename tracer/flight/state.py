# SPDX-License-Identifier: Apache-2.0
"""What is known of a host at one moment while it is being recorded: where a window of the recording may begin.

The snapshot that an ordinary recording begins with (snapshot.py) takes some milliseconds, in which the host changes.
The rows of that time show what has changed: a root that they create is added to the state, one that they free is
removed. Where they show a VM or a memory slot that comes or goes, the snapshot is taken again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.writer import prefer_this_thread
from traces.recording.identity import CREATED, GET_PAGE, TABLE_FREE, VM_CREATE, VM_DESTROY
from traces.recording.memslots import MEMSLOT

TRIES = 5  # snapshots while VMs come and go; then the last is taken as it is, and marked
_REST = 20  # times the CPU time of a snapshot, at least, until the next one

Rows = np.ndarray[Any, Any]
_KINDS = np.zeros(256, np.bool_)
_KINDS[[GET_PAGE, TABLE_FREE, VM_CREATE, VM_DESTROY, MEMSLOT]] = True
_OF_VMS = (VM_CREATE, VM_DESTROY, MEMSLOT)


def telling(records: Rows) -> Rows:
    """Return copies of the records that change what a state holds."""
    found = records[_KINDS[records["kind"]]]
    page = (found["kind"] == GET_PAGE) | (found["kind"] == TABLE_FREE)
    root = (found["root"] != 0) & (found["root"] == found["w1"])
    made = (found["kind"] == TABLE_FREE) | (found["flags"] & CREATED != 0)
    kept: Rows = found[~page | (root & made)]
    return kept


@dataclass(frozen=True)
class Checkpoint:
    """The VMs in a snapshot that was taken between two moments (boot ns), and the counts at that time."""

    began: int
    ended: int
    vms: list[dict[str, Any]]
    counters: Rows  # of the probes, as Probes.counters() gives them
    clock: dict[str, int]
    stats: dict[str, Any]  # KVM's own, as host.Counted.look() gives them
    missed: dict[str, int]
    names: dict[str, str]  # of VMs, by their owner's process

    def unsettled(self, rows: Rows) -> bool:
        """Whether VMs or memory slots came or went with these rows, so that the snapshot may have half of them."""
        return bool(np.isin(self._meanwhile(rows)["kind"], _OF_VMS).any())

    def state(self, rows: Rows) -> list[dict[str, Any]]:
        """Return the VMs after these rows (those of `telling` since `began`), in the form of a manifest's snapshot."""
        rows = self._meanwhile(rows)
        gone = set(rows["kvm"][rows["kind"] == VM_DESTROY].tolist()) - set(
            rows["kvm"][rows["kind"] == VM_CREATE].tolist()
        )
        vms = {vm["kvm"]: dict(vm, roots=list(vm["roots"])) for vm in self.vms if vm["kvm"] not in gone}
        for row in _last_of_each_root(rows):
            table = int(row["root"])
            for vm in vms.values():
                vm["roots"] = [root for root in vm["roots"] if root["table"] != table]
            owner = vms.get(int(row["kvm"]))
            if row["kind"] == GET_PAGE and owner is not None:
                owner["roots"].append({"table": table, "role": int(row["role"]), "refs": int(row["n"])})
        return list(vms.values())

    def _meanwhile(self, rows: Rows) -> Rows:
        return rows[rows["time"] > np.uint64(self.began)]


def _last_of_each_root(rows: Rows) -> Rows:
    rows = rows[(rows["kind"] == GET_PAGE) | (rows["kind"] == TABLE_FREE)]
    _, last = np.unique(rows["root"][::-1], return_index=True)
    return rows[len(rows) - 1 - last]


class Checkpoints:
    """Takes checkpoints on request, on a thread of its own: a host with many VMs takes a while to look at."""

    def __init__(self, take: Callable[[], Checkpoint], offer: Callable[[Checkpoint], None]) -> None:
        """`take` makes a checkpoint; `offer` is called with each."""
        self._take, self._offer = take, offer
        self._wanted, self._ended = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def want(self) -> None:
        """Ask for a checkpoint; asking again before it is there changes nothing."""
        self._wanted.set()

    def close(self) -> None:
        self._ended.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        prefer_this_thread()  # without a new state no old rows can be dropped
        try:
            while True:
                self._wanted.wait()
                if self._ended.is_set():
                    return
                self._wanted.clear()  # before: who gets this one may want another at once
                began = time.thread_time()
                self._offer(self._take())
                self._ended.wait(_REST * (time.thread_time() - began))
        except Exception as error:  # the recorder's loop sees it and ends the recording
            self.error = error
