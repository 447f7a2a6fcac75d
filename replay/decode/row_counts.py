# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count what the rows themselves show of one VM's roots, tables and leaves, while they are decoded.

A replay under the recording's own policy must give the same numbers (`replay.own_policy`). To be independent, the
counts are taken from other events than the inputs of the replay wherever another event shows the same:

    row                                             counted as
    first root_get (or mmu_load) of a root          CREATED      every other one: FOUND
    kvm_mmu_get_page of a new root                  GOT_ROOT
    mmu_load with root_get                        LOADED
    root_put that drops the last reference          PUT          once a root: a worker takes and puts it again
    table_free of a root                            FREED        once a root
    kvm_tdp_mmu_spte_changed   to a table           LINKED       from one: UNLINKED
                               to a leaf            INSTALLED    by a vCPU that serves its fault
                               from a leaf          ZAPPED       to an entry that maps nothing
    kvm_mmu_get_page of a new table                 GOT_TABLE
    fast_page_fault, leaf set where one was         FIXED
    kvm_page_fault by a write to a leaf             TRIED        less those that fast_page_fault could not help
    kvm_mmu_split_huge_page in a fault              FIXED, TRIED where no leaf is set after it
    leaf set or repaired                            SET          for kernels that do not show changes of SPTEs
    kvm_mmu_spte_requested                          REQUESTED    with those repaired

This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import cython
import numpy as np

from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.kernels.spte import LARGE
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled


class RowCount(IntEnum):
    """The counts; the table above says which rows each counts."""

    CREATED = 0
    GOT_ROOT = 1
    FOUND = 2
    LOADED = 3
    PUT = 4
    FREED = 5
    LINKED = 6
    GOT_TABLE = 7
    UNLINKED = 8
    INSTALLED = 9
    FIXED = 10
    TRIED = 11
    SET = 12
    REQUESTED = 13
    ZAPPED = 14


_CREATED = cython.declare(cython.int, int(RowCount.CREATED))
_GOT_ROOT = cython.declare(cython.int, int(RowCount.GOT_ROOT))
_FOUND = cython.declare(cython.int, int(RowCount.FOUND))
_LOADED = cython.declare(cython.int, int(RowCount.LOADED))
_PUT = cython.declare(cython.int, int(RowCount.PUT))
_FREED = cython.declare(cython.int, int(RowCount.FREED))
_LINKED = cython.declare(cython.int, int(RowCount.LINKED))
_GOT_TABLE = cython.declare(cython.int, int(RowCount.GOT_TABLE))
_UNLINKED = cython.declare(cython.int, int(RowCount.UNLINKED))
_INSTALLED = cython.declare(cython.int, int(RowCount.INSTALLED))
_FIXED = cython.declare(cython.int, int(RowCount.FIXED))
_TRIED = cython.declare(cython.int, int(RowCount.TRIED))
_SET = cython.declare(cython.int, int(RowCount.SET))
_REQUESTED = cython.declare(cython.int, int(RowCount.REQUESTED))
_ZAPPED = cython.declare(cython.int, int(RowCount.ZAPPED))

_ON_ENTRY = cython.declare(cython.int, BY_NAME["kvm_entry"].code)
_ON_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_ON_IOCTL = cython.declare(cython.int, BY_NAME["ioctl"].code)
_ON_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_ON_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_ON_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_ON_MARK = cython.declare(cython.int, BY_NAME["mark_mmio_spte"].code)
_ON_FAST = cython.declare(cython.int, BY_NAME["fast_page_fault"].code)
_ON_CHANGED = cython.declare(cython.int, BY_NAME["kvm_tdp_mmu_spte_changed"].code)
_ON_GET_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_get_page"].code)
_ON_ROOT_GET = cython.declare(cython.int, BY_NAME["root_get"].code)
_ON_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)
_ON_PUT = cython.declare(cython.int, BY_NAME["root_put"].code)
_ON_FREE = cython.declare(cython.int, BY_NAME["table_free"].code)
_ON_SPLIT = cython.declare(cython.int, BY_NAME["kvm_mmu_split_huge_page"].code)
_LARGE = cython.declare(cython.ulonglong, LARGE)
KINDS = (
    "kvm_entry", "kvm_exit", "ioctl", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "mark_mmio_spte",
    "fast_page_fault", "kvm_tdp_mmu_spte_changed", "kvm_mmu_get_page", "root_get", "mmu_load", "root_put", "table_free",
    "kvm_mmu_split_huge_page",
)  # fmt: skip

# Kinds of SPTE.
_NOTHING = cython.declare(cython.int, 0)
_LEAF = cython.declare(cython.int, 1)
_TABLE = cython.declare(cython.int, 2)
_MMIO = cython.declare(cython.int, 3)

# Bits of what is known about a root.
_WAS_SEEN = cython.declare(cython.uchar, 1)
_WAS_PUT = cython.declare(cython.uchar, 2)
_WAS_FREED = cython.declare(cython.uchar, 4)

Server = cython.struct(  # who serves faults: a vCPU; the last one stands for all threads without a vCPU
    faulted=cython.longlong,  # row of its last fault
    present=cython.longlong,  # that fault was on a leaf which was present
    maps=cython.longlong,  # it has requested a mapping, and is still busy with it
    installed=cython.longlong,  # it has installed a leaf for that
    split=cython.longlong,  # it has split a huge leaf for that; 2: and that is counted
    marked=cython.longlong,  # gfn of the MMIO SPTE that its fault has made; -1: none
    got=cython.longlong,  # level and gfn of the last table it got; -1: none, or both of its two rows were seen
    # Pending counts: they are counted with a later event of the fault, at the latest when the vCPU does something else
    waits=cython.longlong,  # whether there are any
    write=cython.longlong,  # its fault was a write to a leaf, which fast_page_fault may repair
    asked=cython.longlong,
    leaves=cython.longlong,
    links=cython.longlong,
    tables=cython.longlong,
    roots=cython.longlong,
    loads=cython.longlong,
)
SERVER = [(name, "i8") for name in (
    "faulted", "present", "maps", "installed", "split", "marked", "got", "waits", "write", "asked", "leaves", "links",
    "tables", "roots", "loads",
)]  # fmt: skip


@cython.final
@cython.cclass
class RowCounts:
    """Counts the rows of one VM, batch after batch, including those after its end. `counts` is indexed by RowCount.

    `late_sets` and `late_tables` are those leaves and tables that were set during a fault in which another vCPU set one
    as well, so that the kernel may have found its leaf or table there already. `mmio` is the number of MMIO SPTEs
    installed, which may be removed without an event, and `replaced` that of MMIO SPTEs that something else replaced. If
    wanted, `log` has the steps of the last batch as rows of (seq, time, RowCount, step).
    """

    counts = cython.declare(object, visibility="public")
    log = cython.declare(object, visibility="public")
    late_sets = cython.declare(cython.longlong, visibility="public")
    late_tables = cython.declare(cython.longlong, visibility="public")
    mmio = cython.declare(cython.longlong, visibility="public")
    replaced = cython.declare(cython.longlong, visibility="public")
    _pool: Any
    _server: cython.pointer[Server]
    _others: cython.Py_ssize_t  # index of the last Server, for threads without a vCPU
    _count: cython.longlong[::1]
    _root: cython.uchar[::1]
    _counted: cython.uchar[::1]  # by kind: whether rows of this kind are looked at
    _logs: cython.bint
    _room: Any
    _logged: cython.longlong[:, ::1]
    _log_rows: cython.Py_ssize_t
    _seq: cython.longlong  # seq and time of the row under way
    _time: cython.longlong
    _loads_by: cython.int
    _requests: cython.bint
    _moves: cython.bint
    _twice: cython.bint
    _fixed: cython.int
    _present: cython.ulonglong  # bits of an SPTE; likewise the next two
    _nonpresent: cython.ulonglong
    _frozen: cython.ulonglong
    _there: cython.ulonglong  # bits of a fault's code; likewise the next two
    _write: cython.ulonglong
    _odd: cython.ulonglong
    _set_by: cython.Py_ssize_t  # which Server set the last leaf, and at which row; and the same for the last table
    _set_at: cython.longlong
    _got_by: cython.Py_ssize_t
    _got_at: cython.longlong

    def __init__(self, capabilities: Any, vcpus: int, log: bool = False) -> None:
        kernel, kinds = capabilities.kernel, capabilities.trace.metadata.kinds
        self._others = max(vcpus, 1)
        self._pool = make_pool(self._others + 1, SERVER)
        self._pool["faulted"] = self._pool["marked"] = self._pool["got"] = -1
        if cython.compiled:
            view: cython.uchar[::1] = as_bytes(self._pool)
            self._server = cython.cast(cython.pointer[Server], cython.address(view[0]))
        else:
            self._server = as_structures(self._pool)
        self.counts = np.zeros(len(RowCount), np.int64)
        self._count = self.counts
        self._root = np.zeros(min(capabilities.trace.metadata.root_count, 1 << 24) + 2, np.uint8)
        self._counted = np.zeros(256, np.uint8)
        for name in KINDS:
            self._counted[BY_NAME[name].code] = 1
        self.log = np.zeros((0, 4), np.int64)
        self._logs, self._log_rows = log, 0
        self._room = np.zeros((1, 4), np.int64)
        self._logged = self._room
        self._loads_by = _ON_ROOT_GET if kinds.get("root_get") else _ON_MMU_LOAD
        self._requests = bool(kinds.get("kvm_mmu_spte_requested"))
        self._moves = bool(kinds.get("kvm_set_spte_hva"))
        self._twice = kernel.get_page_twice
        fault = kernel.vendor.fault
        self._fixed, self._there, self._write = kernel.ret_pf.fixed, fault.present, fault.write
        self._odd = fault.fetch | fault.reserved
        self._present, self._nonpresent = kernel.spte.present, kernel.spte.nonpresent
        self._frozen = kernel.spte.nonpresent if kernel.spte.frozen is None else kernel.spte.frozen
        self.late_sets = self.late_tables = self.mmio = self.replaced = 0
        self._set_by = self._got_by = self._others
        self._set_at = self._got_at = -1

    def feed(self, batch: Any) -> None:
        """Count all rows of a batch."""
        self._begin_log(len(batch))
        self._feed(
            batch.seq, batch.time, batch.vcpu, batch.kind, batch.root, batch.level, batch.gfn, batch.old, batch.new,
            batch.code, batch.ret, batch.refs, batch.flags,
        )  # fmt: skip
        self.log = self._room[: self._log_rows]

    def finish(self) -> None:
        """Count what is still pending after the last row."""
        v: cython.Py_ssize_t
        self._begin_log(self._others + 1)
        for v in range(self._others + 1):
            self._settle(v)
        self.log = self._room[: self._log_rows]

    def _begin_log(self, rows: cython.Py_ssize_t) -> None:
        if self._logs:
            self._room = np.zeros((9 * rows + 1, 4), np.int64)  # no row adds more than nine steps
            self._logged = self._room
            self._log_rows = 0

    def _feed(
        self,
        seq: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        root: cython.const[cython.int][::1],
        level: cython.const[cython.schar][::1],
        gfn: cython.const[cython.longlong][::1],
        old: cython.const[cython.ulonglong][::1],
        new: cython.const[cython.ulonglong][::1],
        code: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
        refs: cython.const[cython.int][::1],
        flags: cython.const[cython.uchar][::1],
    ) -> None:
        i: cython.Py_ssize_t
        rows: cython.Py_ssize_t = kind.shape[0]
        v: cython.Py_ssize_t
        k: cython.int
        server: cython.pointer[Server] = self._server
        if not cython.compiled:
            seq, time, vcpu, kind, root, level = map(memoryview, (seq, time, vcpu, kind, root, level))  # type: ignore[arg-type]
            gfn, old, new, code = map(memoryview, (gfn, old, new, code))  # type: ignore[arg-type]
            ret, refs, flags = map(memoryview, (ret, refs, flags))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(rows):
                k = kind[i]
                if not self._counted[k]:
                    continue
                v = vcpu[i] if vcpu[i] >= 0 else self._others
                self._seq = seq[i]
                self._time = time[i]
                if k in (_ON_ENTRY, _ON_EXIT, _ON_IOCTL):
                    server[v].maps = False
                    if server[v].waits:
                        self._settle(v)
                elif k == _ON_REQUESTED:
                    if server[v].asked or server[v].leaves:
                        self._settle(v)
                    server[v].maps = server[v].asked = server[v].waits = True
                    server[v].installed = False
                    server[v].marked = -1
                elif k == _ON_FAULT:
                    self._faults(v, code[i])
                elif k == _ON_CHANGED:
                    self._changes(v, level[i], old[i], new[i])
                elif k in (_ON_SET, _ON_MARK):
                    self._leaf(v, gfn[i], k == _ON_MARK)
                elif k == _ON_SPLIT:
                    if server[v].maps and not server[v].split:
                        server[v].split = server[v].waits = True
                elif k == _ON_FAST:
                    self._repairs(v, ret[i] == self._fixed)
                elif k == _ON_GET_PAGE:
                    if flags[i] & 1:
                        self._gets(v, root[i], cython.cast(cython.longlong, level[i]) << 56 | gfn[i])
                elif k == _ON_PUT:
                    if root[i] > 0 and refs[i] == 1 and self._first(root[i], _WAS_PUT):
                        self._add(_PUT, 1)
                elif k == _ON_FREE:
                    if root[i] > 0 and self._first(root[i], _WAS_FREED):
                        self._add(_FREED, 1)
                elif root[i] > 0 and ret[i] >= 0:  # root_get, mmu_load
                    self._loads(v, k, root[i])

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _settle(self, v: cython.Py_ssize_t) -> cython.void:
        """Count what is pending for a vCPU, which now does something else."""
        server: cython.pointer[Server] = self._server
        self._map(v)
        if server[v].split == 1:
            self._add(_FIXED, 1)
            server[v].write = True
            server[v].split = 2  # counted here, so a leaf that its fault may still set is not counted as a fix again
        self._add(_TRIED, server[v].write)
        self._add(_GOT_ROOT, server[v].roots)
        self._add(_LOADED, -server[v].loads)
        server[v].waits = server[v].write = server[v].roots = server[v].loads = 0

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _map(self, v: cython.Py_ssize_t) -> cython.void:
        """Count what a mapping took together with its leaf, because the replay counts it all at once."""
        server: cython.pointer[Server] = self._server
        self._add(_REQUESTED, server[v].asked)
        self._add(_INSTALLED, server[v].leaves)
        self._add(_LINKED, server[v].links)
        self._add(_GOT_TABLE, server[v].tables)
        server[v].asked = server[v].leaves = server[v].links = server[v].tables = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _faults(self, v: cython.Py_ssize_t, code: cython.ulonglong) -> cython.void:
        server: cython.pointer[Server] = self._server
        if server[v].waits:
            self._settle(v)
        server[v].faulted = self._seq
        server[v].present = code & self._there != 0
        server[v].maps = not self._requests
        server[v].installed = server[v].split = False
        server[v].marked = -1
        server[v].write = server[v].present and code & self._odd == 0 and code & self._write != 0
        server[v].waits = server[v].write

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _repairs(self, v: cython.Py_ssize_t, fixed: cython.bint) -> cython.void:
        """fast_page_fault has repaired the fault, or has not."""
        if fixed:
            self._add(_FIXED, 1)
            self._add(_SET, 1)
            self._add(_REQUESTED, 1)
            self._add(_TRIED, self._server[v].write)
        self._server[v].write = False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _loads(self, v: cython.Py_ssize_t, k: cython.int, root: cython.longlong) -> cython.void:
        server: cython.pointer[Server] = self._server
        if k == self._loads_by:
            self._add(_GOT_ROOT, server[v].roots)
            self._add(_LOADED, 1 - server[v].loads)
            server[v].roots = 0
            server[v].loads = server[v].waits = True
            self._add(_CREATED if self._first(root, _WAS_SEEN) else _FOUND, 1)
        elif server[v].loads:
            server[v].loads = False
        else:
            self._add(_LOADED, 1)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _add(self, what: cython.int, step: cython.longlong) -> cython.void:
        self._count[what] += step
        if self._logs and step:
            self._logged[self._log_rows, 0] = self._seq
            self._logged[self._log_rows, 1] = self._time
            self._logged[self._log_rows, 2] = what
            self._logged[self._log_rows, 3] = step
            self._log_rows += 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _first(self, root: cython.longlong, what: cython.uchar) -> cython.bint:
        """Return whether this is the first row that shows this of a root.

        Roots beyond the array's size count each time.
        """
        first: cython.bint
        if root >= self._root.shape[0]:
            return True
        first = self._root[root] & what == 0
        self._root[root] |= what
        return first

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _what(self, word: cython.ulonglong, level: cython.int) -> cython.int:
        """Return the kind of an SPTE at a level."""
        if word == 0 or word == self._nonpresent or word == self._frozen:
            return _NOTHING
        if word & self._present == 0:
            return _MMIO
        return _LEAF if level == 1 or word & _LARGE else _TABLE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _changes(
        self, v: cython.Py_ssize_t, level: cython.int, old: cython.ulonglong, new: cython.ulonglong
    ) -> cython.void:
        """Count a change of an SPTE."""
        server: cython.pointer[Server] = self._server
        was: cython.int = self._what(old, level)
        now: cython.int = self._what(new, level)
        if now == _TABLE and was != _TABLE:
            if server[v].maps:
                server[v].links += 1
                server[v].waits = True
            else:
                self._add(_LINKED, 1)
        elif was == _TABLE and now != _TABLE:
            self._add(_UNLINKED, 1)
        if now in (_LEAF, _MMIO) and was in (_NOTHING, _TABLE):
            if server[v].maps:
                server[v].leaves += 1
                server[v].installed = server[v].waits = True
                self.mmio += now == _MMIO
            elif was == _NOTHING:
                # Up to 6.9 a notifier that changes a page (kvm_set_spte_hva) removes its leaf and installs another.
                self._add(_ZAPPED if self._moves else _INSTALLED, -1 if self._moves else 1)
        elif was == _LEAF and now == _NOTHING:
            self._add(_ZAPPED, 1)
        elif was == _MMIO and now != _NOTHING:
            self.replaced += 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(self, v: cython.Py_ssize_t, gfn: cython.longlong, mmio: cython.bint) -> cython.void:
        """Count the leaf of a fault, which is set now or was there already."""
        server: cython.pointer[Server] = self._server
        # The TDP MMU of 5.10 reports an MMIO SPTE by both events.
        both: cython.bint = not mmio and server[v].marked == gfn
        server[v].marked = gfn if mmio else -1
        if both:
            return
        if (mmio or server[v].present) and not server[v].installed and server[v].split < 2:
            self._add(_FIXED, 1)
            self._add(_TRIED, 1)
            server[v].split *= 2
        self._map(v)
        server[v].waits = server[v].write or server[v].roots or server[v].loads
        self._add(_SET, 1)
        if self._set_by != v and self._set_at > server[v].faulted:
            self.late_sets += 1
        self._set_by = v
        self._set_at = self._seq

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _gets(self, v: cython.Py_ssize_t, root: cython.longlong, table: cython.longlong) -> cython.void:
        """Count a root that is allocated for a load, or a table that is allocated for a fault or a split."""
        server: cython.pointer[Server] = self._server
        if root > 0:
            server[v].roots += 1
            server[v].waits = True
            return
        if self._twice and server[v].got == table:
            server[v].got = -1
            return
        server[v].got = table
        if server[v].maps:
            server[v].tables += 1
            server[v].waits = True
        else:
            self._add(_GOT_TABLE, 1)
        if self._got_by != v and self._got_at > server[v].faulted:
            self.late_tables += 1
        self._got_by = v
        self._got_at = self._seq
