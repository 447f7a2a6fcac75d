# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Turn inputs into operations for one kernel: its triggers, its role words, and which operation took which time.

An exit's time is given to its operations: the time of faults to its first TOUCH or FIX, of loads to its first ENTER, of
unloads to its first UNLOAD. The rest of its time, the guest's time before it, and exits without an operation become the
`lead` of the next exit's first operation. For example, three exits of a vCPU of which the second has no operation:

    exit                     guest  faults  other     operation   lead              cost
    1, fault at gfn 7          10      3      1       TOUCH 7     10 + 1            3
    2, a port is read           5             4       -
    3, fault at gfn 8          20      6      1       TOUCH 8     5 + 4 + 20 + 1    6

Every ns is given to exactly one operation. An operation on the whole VM takes its turn after the vCPU that acted last.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cython
import numpy as np

from replay.decode.cases import Case
from replay.decode.inputs import (
    BUILT_ROOT,
    HAS_ENTER,
    HAS_HIDDEN,
    HAS_TOUCH,
    HAS_TRIGGER,
    HIDDEN,
    NO_STATE,
    STATE_SHIFT,
    TRIGGER,
    WAS_STILL,
)
from replay.simulate.operations import CAUSES, Block, Op, Word
from replay.simulate.pools import as_bytes, as_structures, make_pool
from replay.simulate.timed_operations import CREATED, FOUND, MORE, NEVER, TIMED_COLUMNS, Timed
from traces.kernels import Kernel, roles
from traces.kernels.triggers import OPEN, Trigger

COMPILED: bool = cython.compiled

_TOUCH = cython.declare(cython.int, int(Op.TOUCH))
_FIX = cython.declare(cython.int, int(Op.FIX))
_ENTER = cython.declare(cython.int, int(Op.ENTER))
_UNLOAD = cython.declare(cython.int, int(Op.UNLOAD))
_ROLE = cython.declare(cython.int, int(Op.ROLE))
_SWITCH = cython.declare(cython.int, int(Op.SWITCH))
_SPLIT = cython.declare(cython.int, int(Op.SPLIT))
_END = cython.declare(cython.int, int(Op.END))
_TRIGGER = cython.declare(cython.int, TRIGGER)
_HIDDEN = cython.declare(cython.uint, HIDDEN)
_NOT_HIDDEN = cython.declare(cython.uint, 0xFFFFFFFF ^ HIDDEN)
_NOT_LAST = cython.declare(cython.uint, 0xFFFFFFFF ^ 7 << 10)
_NOT_KIND = cython.declare(cython.uint, 0xFFFFFFF0)
_LAST_SHIFT = cython.declare(cython.int, 10)
_STATE_SHIFT = cython.declare(cython.int, STATE_SHIFT)
_TRIGGER_BITS = cython.declare(cython.longlong, (1 << STATE_SHIFT) - 1)
_NO_STATE = cython.declare(cython.longlong, NO_STATE)
_WAS_FOUND = cython.declare(cython.uchar, FOUND)
_WAS_CREATED = cython.declare(cython.uchar, CREATED)
_WALL_MORE = cython.declare(cython.longlong, MORE)
_WALL_NEVER = cython.declare(cython.longlong, NEVER)
_MOST_TABLES = cython.declare(cython.longlong, 200)  # larger numbers of tables are stored as this in `was`

_HAS_TOUCH = cython.declare(cython.longlong, HAS_TOUCH)
_HAS_HIDDEN = cython.declare(cython.longlong, HAS_HIDDEN)
_HAS_ENTER = cython.declare(cython.longlong, HAS_ENTER)
_IS_STILL = cython.declare(cython.longlong, WAS_STILL)
_IS_BUILT = cython.declare(cython.longlong, BUILT_ROOT)

# The parts of an exit's time that its operations take.
_FAULTS = cython.declare(cython.longlong, 1)
_LOADS = cython.declare(cython.longlong, 2)
_UNLOADS = cython.declare(cython.longlong, 4)

Program = cython.struct(  # the state of one vCPU's program
    exit=cython.longlong,  # number of the exit under way; -1: none
    takes=cython.longlong,  # parts of its time that are still to be given to an operation
    fault=cython.longlong,  # ns of the exit's faults; likewise for `load` and `unload`
    load=cython.longlong,
    unload=cython.longlong,
    tables=cython.longlong,
    flags=cython.longlong,
    lead=cython.longlong,  # lead of the next operation, so far
    guest=cython.longlong,
    idle=cython.longlong,
    total_guest=cython.longlong,  # ns in all, under the names of `VcpuState`
    total_idle=cython.longlong,
    total_fault=cython.longlong,
    total_load=cython.longlong,
    total_unload=cython.longlong,
    total_other=cython.longlong,
)
PROGRAM = [(name, "i8") for name in (
    "exit", "takes", "fault", "load", "unload", "tables", "flags", "lead", "guest", "idle", "total_guest", "total_idle",
    "total_fault", "total_load", "total_unload", "total_other",
)]  # fmt: skip

COLUMNS = {
    "op": np.uint32, "queue": np.int32, "was": np.uint8, "still": np.uint8,
    **dict.fromkeys(("gfn", "time", "seq", "lead", "guest", "idle", "cost", "wall"), np.int64),
}  # fmt: skip


_CAUSE = np.array([int(CAUSES[trigger]) for trigger in Trigger])


@lru_cache(16)
def _meanings(kernel: Kernel, case: Case, ad_disabled: bool) -> tuple[list[Word], Any, Any, int]:
    """Return what is the same for all VMs with this kernel and case; it must not be written to.

    That is: the role words, the index of each state's word, whether each trigger unloads, and the triggers that do as
    bits of Exits.has.
    """
    words, index = roles.words(kernel.layout, ad_disabled)
    states = np.arange(2 * roles.STATES)
    if case.merged:
        states |= roles.USUAL
    elif case.most:
        states ^= (states & roles.MAYBE_WP != 0) * roles.WP
    meant = {trigger: OPEN.get(trigger, (trigger, trigger))[int(case.most)] for trigger in Trigger}
    unloads = np.array([meant[trigger] in kernel.unloads for trigger in Trigger], np.uint8)
    unloading = sum(HAS_TRIGGER << int(trigger) for trigger in Trigger if unloads[trigger])
    return words, np.ascontiguousarray(index[states & roles.STATES - 1]), unloads, unloading


@cython.final
@cython.cclass
class Specialization:
    """Turns the inputs of one VM into operations for one kernel and case.

    `words` are all role words that its roots can have; index 0 is that of the usual state. `programs` has a row of
    Program for each vCPU, with leads that are left over and totals.
    """

    words = cython.declare(object, visibility="public")
    programs = cython.declare(object, visibility="public")
    _program: cython.pointer[Program]
    _vcpus: cython.longlong
    _word: cython.longlong[::1]  # index of the role word of each state
    _unloads: cython.uchar[::1]  # whether each trigger unloads
    _cause: cython.longlong[::1]
    _hidden: cython.bint
    _splits: cython.bint
    _tail: cython.bint
    _actor: cython.longlong
    _unloading: cython.longlong  # triggers that unload, as bits of Exits.has
    _out: dict  # type: ignore[type-arg]  # the columns of the last operations
    _op: cython.uint[::1]
    _gfn: cython.longlong[::1]
    _time: cython.longlong[::1]
    _seq: cython.longlong[::1]
    _queue: cython.int[::1]
    _lead: cython.longlong[::1]
    _guest: cython.longlong[::1]
    _idle: cython.longlong[::1]
    _cost: cython.longlong[::1]
    _was: cython.uchar[::1]
    _still: cython.uchar[::1]
    _wall: cython.longlong[::1]

    def __init__(self, kernel: Kernel, case: Case, ad_disabled: bool, vcpus: int) -> None:
        self.words, self._word, self._unloads, self._unloading = _meanings(kernel, case, ad_disabled)
        self._cause = _CAUSE
        self._hidden, self._splits, self._tail = case.hidden, kernel.eager_split, kernel.prefetches_tail
        self._vcpus, self._actor = max(vcpus, 1), 0
        self.programs = make_pool(self._vcpus, PROGRAM)
        self.programs["exit"] = -1
        if cython.compiled:
            view: cython.uchar[::1] = as_bytes(self.programs)
            self._program = cython.cast(cython.pointer[Program], cython.address(view[0]))
        else:
            self._program = as_structures(self.programs)

    def block(self, inputs: Any) -> Block:
        """Return the operations for these inputs, without times."""
        count = self._write(inputs)
        return Block(*(self._out[name][:count] for name in ("op", "gfn", "time", "seq")))

    def timed(self, inputs: Any) -> Timed:
        """Return the operations for these inputs, with their times."""
        count = self._write(inputs)
        block = Block(*(self._out[name][:count] for name in ("op", "gfn", "time", "seq")))
        columns: dict = {name: self._out[name][:count] for name in TIMED_COLUMNS}  # type: ignore[type-arg]
        return Timed(block, **columns)

    @property
    def still(self) -> Any:
        """For each operation of the last call of `timed`: whether the guest did next to nothing before its exit."""
        return self._out["still"]

    def rest(self, rest: Any) -> tuple[Any, Any, Any]:
        """Return the time after each vCPU's last operation: ns in all, in the guest, and halted.

        `rest` is that of the inputs.
        """
        v: cython.Py_ssize_t
        for v in range(self._vcpus):
            self._leave(v)
            self._program[v].total_guest += self._program[v].guest + rest.guest[v]
            self._program[v].total_idle += self._program[v].idle + rest.idle[v]
            self._program[v].total_other += self._program[v].lead - self._program[v].guest - self._program[v].idle
            self._program[v].total_other += rest.lead[v] - rest.guest[v] - rest.idle[v]
        programs = self.programs
        return programs["lead"] + rest.lead, programs["guest"] + rest.guest, programs["idle"] + rest.idle

    def _write(self, inputs: Any) -> int:
        exits, room = inputs.exits, 2 * len(inputs)
        out = {name: np.empty(room, kind) for name, kind in COLUMNS.items()}
        self._out = out
        self._op, self._queue, self._was, self._still = out["op"], out["queue"], out["was"], out["still"]
        self._gfn, self._time, self._seq = out["gfn"], out["time"], out["seq"]
        self._lead, self._guest, self._cost, self._wall = out["lead"], out["guest"], out["cost"], out["wall"]
        self._idle = out["idle"]
        count: cython.longlong = self._run(
            inputs.op, inputs.gfn, inputs.time, inputs.seq, inputs.exit, exits.lead, exits.guest, exits.idle,
            exits.fault, exits.load, exits.unload, exits.tables, exits.has, exits.flags, exits.first,
        )  # fmt: skip
        return count

    def _run(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        seq: cython.const[cython.longlong][::1],
        exit_: cython.const[cython.int][::1],
        lead: cython.const[cython.longlong][::1],
        guest: cython.const[cython.longlong][::1],
        idle: cython.const[cython.longlong][::1],
        fault: cython.const[cython.longlong][::1],
        load: cython.const[cython.longlong][::1],
        unload: cython.const[cython.longlong][::1],
        tables: cython.const[cython.uchar][::1],
        has: cython.const[cython.uint][::1],
        flags: cython.const[cython.uchar][::1],
        first: cython.longlong,
    ) -> int:
        i: cython.Py_ssize_t
        n: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t
        e: cython.Py_ssize_t
        v: cython.Py_ssize_t
        o: cython.uint
        g: cython.longlong
        kind: cython.int
        trigger: cython.longlong
        state: cython.longlong
        program: cython.pointer[Program] = self._program
        if not cython.compiled:
            op, gfn, time, seq, exit_ = map(memoryview, (op, gfn, time, seq, exit_))  # type: ignore[arg-type]
            lead, guest, idle = map(memoryview, (lead, guest, idle))  # type: ignore[arg-type]
            fault, load = map(memoryview, (fault, load))  # type: ignore[arg-type]
            unload, tables, has, flags = map(memoryview, (unload, tables, has, flags))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(op.shape[0]):
                o = op[i]
                g = gfn[i]
                e = exit_[i]
                kind = o & 15
                v = o >> 16
                if e >= 0 and program[v].exit != first + e:
                    self._leave(v)
                    program[v].exit = first + e
                    program[v].lead += lead[e]
                    program[v].guest += guest[e]
                    program[v].idle += idle[e]
                    program[v].fault = fault[e]
                    program[v].load = load[e]
                    program[v].unload = unload[e]
                    program[v].tables = tables[e]
                    program[v].flags = flags[e]
                    self._divide(v, has[e])
                end = n + 1
                self._op[n] = o
                self._gfn[n] = g
                if kind <= _FIX:
                    if o & _HIDDEN:
                        if not self._hidden:
                            continue
                        o &= _NOT_HIDDEN
                        self._op[n] = o
                    if kind == _TOUCH and not self._tail:  # prefetch ends with the faulting entry
                        self._op[n] = o & _NOT_LAST | cython.cast(cython.uint, (g & 7) << _LAST_SHIFT)
                elif kind == _TRIGGER:
                    trigger = g & _TRIGGER_BITS
                    state = g >> _STATE_SHIFT
                    end = n
                    if self._unloads[trigger]:
                        self._op[end] = o & _NOT_KIND | _UNLOAD
                        self._gfn[end] = self._cause[trigger]
                        end += 1
                    if state != _NO_STATE:
                        self._op[end] = o & _NOT_KIND | _ROLE
                        self._gfn[end] = self._word[state]
                        end += 1
                elif kind in (_ROLE, _SWITCH):
                    self._gfn[n] = self._word[g]
                elif kind == _SPLIT and not self._splits:
                    continue
                while n < end:
                    self._time[n] = time[i]
                    self._seq[n] = seq[i]
                    self._attribute(n, v, e >= 0)
                    n += 1
        return n

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _divide(self, v: cython.Py_ssize_t, has: cython.longlong) -> cython.void:
        """Decide which parts of an exit's time its operations will take; the rest is added to the next lead."""
        program: cython.pointer[Program] = self._program
        program[v].takes = 0
        if has & _HAS_TOUCH or (self._hidden and has & _HAS_HIDDEN):
            program[v].takes |= _FAULTS
        else:
            program[v].lead += program[v].fault
        if has & _HAS_ENTER:
            program[v].takes |= _LOADS
        else:
            program[v].lead += program[v].load
        if has & self._unloading:
            program[v].takes |= _UNLOADS
        else:
            program[v].lead += program[v].unload

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _leave(self, v: cython.Py_ssize_t) -> cython.void:
        """End the exit under way: parts that none of its operations has
        taken are added to the next operation's lead.
        """
        program: cython.pointer[Program] = self._program
        if program[v].takes & _FAULTS:
            program[v].lead += program[v].fault
        if program[v].takes & _LOADS:
            program[v].lead += program[v].load
        if program[v].takes & _UNLOADS:
            program[v].lead += program[v].unload
        program[v].takes = 0

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _attribute(self, n: cython.Py_ssize_t, v: cython.Py_ssize_t, timed: cython.bint) -> cython.void:
        """Give operation `n` its time and its queue."""
        program: cython.pointer[Program] = self._program
        kind: cython.int = self._op[n] & 15
        self._lead[n] = self._guest[n] = self._idle[n] = self._cost[n] = 0
        self._was[n] = self._still[n] = 0
        self._wall[n] = _WALL_MORE
        if kind > _SWITCH:
            self._queue[n] = self._actor
            if kind == _END:  # the VM ends after all vCPUs are done
                self._queue[n] = 2 * self._vcpus
                self._wall[n] = _WALL_NEVER
            return
        self._queue[n] = self._actor = v
        if not timed:
            return
        self._lead[n] = program[v].lead
        self._guest[n] = program[v].guest
        self._idle[n] = program[v].idle
        program[v].total_guest += program[v].guest
        program[v].total_idle += program[v].idle
        program[v].total_other += program[v].lead - program[v].guest - program[v].idle
        program[v].lead = program[v].guest = program[v].idle = 0
        self._still[n] = program[v].flags & _IS_STILL
        if kind <= _FIX:
            if program[v].takes & _FAULTS:
                program[v].takes &= ~_FAULTS
                self._cost[n] = program[v].fault
                program[v].total_fault += program[v].fault
                self._was[n] = cython.cast(cython.uchar, 1 + min(program[v].tables, _MOST_TABLES))
        elif kind == _ENTER:
            if program[v].takes & _LOADS:
                program[v].takes &= ~_LOADS
                self._cost[n] = program[v].load
                program[v].total_load += program[v].load
                if program[v].load:
                    self._was[n] = _WAS_CREATED if program[v].flags & _IS_BUILT else _WAS_FOUND
        elif kind == _UNLOAD:
            self._was[n] = program[v].unload > 0
            if program[v].takes & _UNLOADS:
                program[v].takes &= ~_UNLOADS
                self._cost[n] = program[v].unload
                program[v].total_unload += program[v].unload
