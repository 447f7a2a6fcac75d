# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What the rows themselves say of one VM's roots, tables and leaves, counted while they are decoded.

A replay under the recording's own policy has to give the same numbers (`replay.own_policy`). Inputs are therefore
not what is counted here, wherever another event tells the same:

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

Cython in pure-Python mode, as `timeline` is.
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
    """What is counted; see above."""

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

# What an SPTE is.
_NOTHING = cython.declare(cython.int, 0)
_LEAF = cython.declare(cython.int, 1)
_TABLE = cython.declare(cython.int, 2)
_MMIO = cython.declare(cython.int, 3)

# What is known of a root: bits.
_WAS_SEEN = cython.declare(cython.uchar, 1)
_WAS_PUT = cython.declare(cython.uchar, 2)
_WAS_FREED = cython.declare(cython.uchar, 4)

Server = cython.struct(  # of faults: a vCPU; the last one stands for all threads that run none
    faulted=cython.longlong,  # row of its last fault
    present=cython.longlong,  # that was on a leaf which was there
    maps=cython.longlong,  # it has requested a mapping, and not gone on since
    installed=cython.longlong,  # and has installed a leaf
    split=cython.longlong,  # and has split a huge leaf: 2, once that is counted
    marked=cython.longlong,  # gfn of the MMIO SPTE that its fault has made; -1: none
    got=cython.longlong,  # level and gfn of the table that it got last, -1: none, or it came twice
    # What is yet to be counted, with the event that goes with it or when the vCPU goes on
    waits=cython.longlong,  # whether there is any
    write=cython.longlong,  # its fault was a write to a leaf, which fast_page_fault tries to let through
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
    """Counts the rows of one VM, batch after batch, those after its end too. `counts` is by RowCount.

    `late_sets` and `late_tables`: of them, those of a fault during which another vCPU had one as well, so that the
    kernel may have found its leaf or table there already. `mmio`: MMIO SPTEs installed, which may go without an event;
    `replaced`: those that something else took the place of.
    `log` is, where wanted, (seq, time, RowCount, step) of each step that the last batch made.
    """

    counts = cython.declare(object, visibility="public")
    log = cython.declare(object, visibility="public")
    late_sets = cython.declare(cython.longlong, visibility="public")
    late_tables = cython.declare(cython.longlong, visibility="public")
    mmio = cython.declare(cython.longlong, visibility="public")
    replaced = cython.declare(cython.longlong, visibility="public")
    _pool: Any
    _server: cython.pointer[Server]
    _others: cython.Py_ssize_t  # the last Server
    _count: cython.longlong[::1]
    _root: cython.uchar[::1]
    _counted: cython.uchar[::1]  # by kind: whether a row of it says anything here
    _logs: cython.bint
    _room: Any
    _logged: cython.longlong[:, ::1]
    _log_rows: cython.Py_ssize_t
    _seq: cython.longlong  # of the row under way
    _time: cython.longlong
    _loads_by: cython.int
    _requests: cython.bint
    _moves: cython.bint
    _twice: cython.bint
    _fixed: cython.int
    _present: cython.ulonglong  # of SPTEs
    _nonpresent: cython.ulonglong
    _frozen: cython.ulonglong
    _there: cython.ulonglong  # of faults
    _write: cython.ulonglong
    _odd: cython.ulonglong
    _set_by: cython.Py_ssize_t  # who set the last leaf, and got the last table; and at which row
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
        """Take in all rows of a batch."""
        self._begin_log(len(batch))
        self._feed(
            batch.seq, batch.time, batch.vcpu, batch.kind, batch.root, batch.level, batch.gfn, batch.old, batch.new,
            batch.code, batch.ret, batch.refs, batch.flags,
        )  # fmt: skip
        self.log = self._room[: self._log_rows]

    def finish(self) -> None:
        """There are no more rows: what waits for an event is counted."""
        v: cython.Py_ssize_t
        self._begin_log(self._others + 1)
        for v in range(self._others + 1):
            self._settle(v)
        self.log = self._room[: self._log_rows]

    def _begin_log(self, rows: cython.Py_ssize_t) -> None:
        if self._logs:
            self._room = np.zeros((9 * rows + 1, 4), np.int64)  # no row makes more than nine steps
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
        """The vCPU goes on: what waited for an event waits no more."""
        server: cython.pointer[Server] = self._server
        self._map(v)
        if server[v].split == 1:
            self._add(_FIXED, 1)
            server[v].write = True
            server[v].split = 2  # counted, if its fault sets a leaf yet
        self._add(_TRIED, server[v].write)
        self._add(_GOT_ROOT, server[v].roots)
        self._add(_LOADED, -server[v].loads)
        server[v].waits = server[v].write = server[v].roots = server[v].loads = 0

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _map(self, v: cython.Py_ssize_t) -> cython.void:
        """What a mapping took: counted with its leaf, as the replay does it all at once."""
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
        """fast_page_fault has lifted what was in the way, or has not."""
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
        """Whether this is the first row that says so of a root. Roots beyond those that are kept count each time."""
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
        """What an SPTE of a level is."""
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
        """An SPTE changes."""
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
                # A notifier that changes a page (until 6.10) takes its leaf out, and puts another in.
                self._add(_ZAPPED if self._moves else _INSTALLED, -1 if self._moves else 1)
        elif was == _LEAF and now == _NOTHING:
            self._add(_ZAPPED, 1)
        elif was == _MMIO and now != _NOTHING:
            self.replaced += 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(self, v: cython.Py_ssize_t, gfn: cython.longlong, mmio: cython.bint) -> cython.void:
        """A fault's leaf is set, or was there already."""
        server: cython.pointer[Server] = self._server
        # 5.10's TDP MMU reports one MMIO SPTE by both events.
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
        """A root is got for a load, or a table for a fault or a split."""
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
