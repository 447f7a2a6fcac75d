# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The longest run of exits at one RIP of each vCPU, row by row, with what happened in it: is it stuck there, and why?

Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython

from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_MMIO = cython.declare(cython.int, BY_NAME["kvm_mmio"].code)
_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)

RipRun = cython.struct(  # exits of a vCPU at one RIP, without another between them, and rows among them
    rip=cython.ulonglong,
    since=cython.longlong,
    until=cython.longlong,
    seq=cython.longlong,
    exits=cython.longlong,
    faults=cython.longlong,
    requested=cython.longlong,
    installed=cython.longlong,
    mmio=cython.longlong,
    loads=cython.longlong,
    moves=cython.longlong,  # faults on another page than the one before
    page=cython.longlong,  # of the vCPU's last fault, -1: it had none
)
RIP_RUN = [("rip", "u8")] + [
    (name, "i8")
    for name in (
        "since", "until", "seq", "exits", "faults", "requested", "installed", "mmio", "loads", "moves", "page"
    )
]  # fmt: skip


@cython.final
@cython.cclass
class RipRuns:
    """Of one VM. `longest` has a row of RipRun for each vCPU, after `finish`; 0 exits: it had none."""

    longest = cython.declare(object, visibility="public")
    _pool: Any
    _going: cython.pointer[RipRun]
    _longest: cython.pointer[RipRun]

    def __init__(self, vcpus: int) -> None:
        self._pool, self.longest = (make_pool(max(vcpus, 1), RIP_RUN) for _ in range(2))
        self._pool["page"] = -1
        if cython.compiled:
            going: cython.uchar[::1] = as_bytes(self._pool)
            longest: cython.uchar[::1] = as_bytes(self.longest)
            self._going = cython.cast(cython.pointer[RipRun], cython.address(going[0]))
            self._longest = cython.cast(cython.pointer[RipRun], cython.address(longest[0]))
        else:
            self._going, self._longest = as_structures(self._pool), as_structures(self.longest)

    def feed(self, batch: Any) -> None:
        """Take in a batch: `seq`, `time`, `vcpu` (dense, -1 for none), `kind`, `rip` and `addr` of it."""
        self._feed(batch.seq, batch.time, batch.vcpu, batch.kind, batch.rip, batch.addr)

    def finish(self) -> None:
        """There are no more rows: runs that go on end here."""
        v: cython.Py_ssize_t
        for v in range(len(self._pool)):
            self._end_run(v)

    def _feed(
        self,
        seq: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        rip: cython.const[cython.ulonglong][::1],
        addr: cython.const[cython.ulonglong][::1],
    ) -> None:
        i: cython.Py_ssize_t
        if not cython.compiled:
            seq, time, vcpu, kind, rip, addr = map(memoryview, (seq, time, vcpu, kind, rip, addr))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(kind.shape[0]):
                if vcpu[i] >= 0:
                    self._follow(vcpu[i], kind[i], seq[i], time[i], rip[i], addr[i])

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _follow(
        self,
        v: cython.Py_ssize_t,
        k: cython.int,
        seq: cython.longlong,
        time: cython.longlong,
        rip: cython.ulonglong,
        addr: cython.ulonglong,
    ) -> cython.void:
        """Go on with the vCPU's run of exits at one RIP, or begin another."""
        run: cython.pointer[RipRun] = self._going
        page: cython.longlong
        if k == _EXIT:
            if run[v].exits and run[v].rip == rip:
                run[v].exits += 1
                run[v].until = time
            else:
                self._end_run(v)
                run[v].rip = rip
                run[v].since = run[v].until = time
                run[v].seq = seq
                run[v].exits = 1
                run[v].faults = run[v].requested = run[v].installed = run[v].mmio = run[v].loads = run[v].moves = 0
        elif k == _FAULT:
            page = cython.cast(cython.longlong, addr >> 12)
            run[v].faults += 1
            if page != run[v].page and run[v].page >= 0:
                run[v].moves += 1
            run[v].page = page
        elif k == _REQUESTED:
            run[v].requested += 1
        elif k == _SET:
            run[v].installed += 1
        elif k == _MMIO:
            run[v].mmio += 1
        elif k == _MMU_LOAD:
            run[v].loads += 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _end_run(self, v: cython.Py_ssize_t) -> cython.void:
        if self._going[v].exits > self._longest[v].exits:
            if cython.compiled:
                self._longest[v] = self._going[v]
            else:
                self.longest[v] = self._pool[v]
