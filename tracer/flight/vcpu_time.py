# SPDX-License-Identifier: Apache-2.0
"""Where a vCPU is according to its rows, and how long it had no CPU: for the trigger `guest-share` and for `top`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.schema import BY_NAME

Rows = np.ndarray[Any, Any]
KINDS: Final = ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "sched_in")
ENTRY, EXIT, USER, SCHED = (BY_NAME[name].code for name in KINDS)
OUT, GUEST, IDLE = 0, 1, 2  # out of its guest; in it; out of it because it is idle
_SEEN: Final = np.zeros(256, np.bool_)
_SEEN[[ENTRY, EXIT, USER, SCHED]] = True
UNINTERRUPTIBLE: Final = 2  # task state: sleeps until the disk, or another thread of the host, is done

# Of (process, thread): (ns of CPU time so far, whether it sleeps uninterruptibly); None where it is gone.
ThreadTime = Callable[[int, int], tuple[int, bool] | None]


def by_vcpu(rows: Rows) -> list[tuple[tuple[int, int], Rows]]:
    """Return ((VM's address, vCPU id), its rows in order of time) for each vCPU that shows where it is."""
    rows = rows[_SEEN[rows["kind"]]]
    return grouped(rows[(rows["vcpu"] >= 0) & (rows["kvm"] != 0)])


def grouped(rows: Rows) -> list[tuple[tuple[int, int], Rows]]:
    """Return ((VM's address, vCPU id), its rows in their order) for each vCPU of any rows."""
    if not len(rows):
        return []
    kvms, vm = np.unique(rows["kvm"], return_inverse=True)
    key = (vm.astype(np.int64) << 16) | (rows["vcpu"].astype(np.int64) & 0xFFFF)
    order = np.argsort(key, kind="stable")
    bounds = np.flatnonzero(np.diff(key[order])) + 1
    return [
        ((int(kvms[vm[mine[0]]]), int(rows["vcpu"][mine[0]])), rows[mine]) for mine in np.split(order, bounds)
    ]  # fmt: skip


def states(state: int, rows: Rows, idle_codes: Rows) -> tuple[Rows, Rows]:
    """Return a vCPU's state after and before each row; a thread that is back on its CPU is in the state it was in."""
    kind = rows["kind"]
    halted = (kind == EXIT) & np.isin(rows["w0"], idle_codes)
    own = np.where(kind == ENTRY, GUEST, np.where(halted, IDLE, OUT))
    source = np.maximum.accumulate(np.where(kind == SCHED, -1, np.arange(len(rows))))
    after = np.where(source >= 0, own[np.maximum(source, 0)], state)
    return after, np.append(state, after[:-1])


def off_cpu(rows: Rows, before: Rows, passed: Rows) -> tuple[Rows, Rows]:
    """Return the ns asleep and the ns waiting for a CPU that end with each row, out of those `passed` before it.

    Uninterruptible sleep, in which the host's own work holds the thread up, is neither.
    """
    counted = (rows["kind"] == SCHED) & (before == OUT)
    off = np.minimum(np.maximum(rows["time"].astype(np.int64) - rows["w0"].astype(np.int64), 0), passed)
    waited = np.minimum(rows["w1"].astype(np.int64), off)
    held_up = rows["w2"] & np.uint64(UNINTERRUPTIBLE) != 0
    return np.where(counted & ~held_up, off - waited, 0), np.where(counted, waited, 0)


def thread_time(tgid: int, tid: int) -> tuple[int, bool] | None:
    """Return a thread's CPU time (ns) and whether it sleeps uninterruptibly, from /proc; None where it is gone."""
    task = Path(f"/proc/{tgid}/task/{tid}")
    with contextlib.suppress(OSError, ValueError, IndexError):
        ran = int((task / "schedstat").read_text().split()[0])
        return ran, (task / "stat").read_text().rpartition(")")[2].split()[0] == "D"
    return None


def idle_codes(cpu: dict[str, Any]) -> tuple[int, ...]:
    """Return the exits by which a guest on this processor (`host.cpu()`) says that it has nothing to do."""
    from traces.kernels.vendors import VENDORS

    return next(((*each.hlt, *each.mwait) for each in VENDORS if each.cpu == cpu.get("vendor")), ())
