# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Triggers: what a vCPU did for which some kernel unloads its roots.

The cause of a reset is what the same vCPU did since it last left the guest. Resets come in pairs (entering SMM resets
twice) and from more than one function; the first since the exit, or since the last load, is the one that empties slots.
"""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.exits import CODES, Left, exit_meanings
from replay.decode.inputs import NO_STATE
from replay.decode.rows.root_loads import RootLoads
from replay.decode.rows.row_meanings import Meaning
from traces.kernels import roles, triggers
from traces.kernels.triggers import Trigger

_NONE = cython.declare(cython.longlong, -1)
_ENTRY = cython.declare(cython.int, int(Meaning.ENTRY))
_RESETS = cython.declare(cython.uint, 1 << 13)
_NO_STATE = cython.declare(cython.longlong, NO_STATE)
_SMI = cython.declare(cython.longlong, int(Trigger.SMI))
_RSM = cython.declare(cython.longlong, int(Trigger.RSM))
_CR0_WP = cython.declare(cython.longlong, int(Trigger.CR0_WP))
_CR0 = cython.declare(cython.longlong, int(Trigger.CR0))
_CR4 = cython.declare(cython.longlong, int(Trigger.CR4))
_CR4_PGE = cython.declare(cython.longlong, int(Trigger.CR4_PGE))
_CR4_PCIDE = cython.declare(cython.longlong, int(Trigger.CR4_PCIDE))
_EFER = cython.declare(cython.longlong, int(Trigger.EFER))
_SREGS = cython.declare(cython.longlong, int(Trigger.SREGS))
_CPUID = cython.declare(cython.longlong, int(Trigger.CPUID))
_INVPCID = cython.declare(cython.longlong, int(Trigger.INVPCID))
_BY_EXIT = cython.declare(cython.longlong, int(Trigger.EXIT))
_OTHER = cython.declare(cython.longlong, int(Trigger.OTHER))
_CR0_SILENT = cython.declare(cython.longlong, int(Trigger.CR0_SILENT))
_CR4_SILENT = cython.declare(cython.longlong, int(Trigger.CR4_SILENT))
_CR0_RESET = cython.declare(cython.longlong, int(Trigger.CR0_RESET))
_CR4_RESET = cython.declare(cython.longlong, int(Trigger.CR4_RESET))
_NOT_SEEN = cython.declare(cython.longlong, int(Trigger.UNSEEN))
_IN_SMM = cython.declare(cython.longlong, roles.SMM)
_CR0_PG_BIT = cython.declare(cython.longlong, triggers.CR0_PG)
_CR0_WP_BIT = cython.declare(cython.longlong, triggers.CR0_WP)
_CR4_ROLE_BITS = cython.declare(cython.longlong, triggers.CR4_ROLE)
_CR4_PGE_BIT = cython.declare(cython.longlong, triggers.CR4_PGE)
_CR4_PCIDE_BIT = cython.declare(cython.longlong, triggers.CR4_PCIDE)
_EFER_ROLE = cython.declare(cython.longlong, triggers.EFER_ROLE)
_SET_SREGS = cython.declare(cython.longlong, triggers.SET_SREGS[0])
_SET_SREGS2 = cython.declare(cython.longlong, triggers.SET_SREGS[1])
_SET_CPUID2 = cython.declare(cython.longlong, triggers.SET_CPUID2)
_CODES = cython.declare(cython.ulonglong, CODES)
_BY_NOTHING = cython.declare(cython.longlong, int(Left.NEVER))
_BY_OTHER = cython.declare(cython.longlong, int(Left.OTHER_EXIT))
_BY_IO = cython.declare(cython.longlong, int(Left.IO))
_BY_CR0 = cython.declare(cython.longlong, int(Left.CR0_WRITE))
_BY_CR4 = cython.declare(cython.longlong, int(Left.CR4_WRITE))
_BY_MSR_WRITE = cython.declare(cython.longlong, int(Left.MSR_WRITE))
_BY_RSM = cython.declare(cython.longlong, int(Left.RSM))
_BY_UD = cython.declare(cython.longlong, int(Left.UNDEFINED))
_BY_INVPCID = cython.declare(cython.longlong, int(Left.INVPCID))
_BY_CR = cython.declare(cython.longlong, int(Left.CR))
_BY_MSR = cython.declare(cython.longlong, int(Left.MSR))
_TO_SREGS = cython.declare(cython.longlong, int(Left.SET_SREGS))
_TO_CPUID = cython.declare(cython.longlong, int(Left.SET_CPUID))
_TO_OTHER = cython.declare(cython.longlong, int(Left.OTHER_IOCTL))


@cython.cclass
class UnloadTriggers(RootLoads):
    """Makes triggers of exits, ioctls, writes of control registers and EFER, moves into and out of SMM, and resets."""

    by_guest: cython.longlong
    by_clock: cython.longlong

    _meaning: cython.uchar[::1]  # meanings of exit codes (`exits`)
    _valued: cython.bint  # writes of control registers are recorded with their values
    _msr_valued: cython.bint  # writes of EFER are recorded with their values
    _invalidated: cython.longlong  # row of the last invalidation

    def __init__(self, capabilities: Any, vcpus: int, timed: bool, role_words: Any) -> None:
        """Take the same as RootLoads."""
        super().__init__(capabilities, vcpus, timed, role_words)
        kinds = capabilities.trace.metadata.kinds
        self._meaning = exit_meanings(capabilities.kernel.vendor)
        self._valued = bool(kinds.get("kvm_cr"))
        self._msr_valued = bool(kinds.get("kvm_msr"))
        self._invalidated = -1
        self.by_guest = self.by_clock = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _exits(self, v: cython.Py_ssize_t, code: cython.ulonglong, value: cython.ulonglong) -> cython.void:
        vcpu: cython.pointer[Vcpu] = self._vcpu
        why: cython.longlong = _BY_OTHER
        told: cython.bint
        if code & 0xFFFF < _CODES:
            why = self._meaning[code & 0xFFFF]
        if why == _BY_CR:
            why = _BY_CR0 if value & 0xF == 0 else _BY_CR4 if value & 0xF == 4 else _BY_OTHER
        elif why == _BY_MSR:
            why = _BY_MSR_WRITE if value & 0xF == 1 else _BY_OTHER
        vcpu[v].opened = vcpu[v].left = self._at
        vcpu[v].why = why
        vcpu[v].left_by_io = 1 if why == _BY_IO else 0
        if self._open_resets:
            told = self._msr_valued if why == _BY_MSR_WRITE else self._valued
            if why == _BY_INVPCID or (why in (_BY_MSR_WRITE, _BY_CR0, _BY_CR4) and not told):
                self._not_seen(v)
        if self._valued:
            return
        # If the kernel unloads for the usual writes, the absence of a reset means that there was no such write.
        if why == _BY_CR0 and not self._unloads[_CR0_WP]:
            self._silent(v, _CR0_SILENT)
        elif why == _BY_CR4 and not self._unloads[_CR4_PGE]:
            self._silent(v, _CR4_SILENT)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _asked(self, ioctl: cython.longlong) -> cython.longlong:
        if ioctl in (_SET_SREGS, _SET_SREGS2):
            return _TO_SREGS
        return _TO_CPUID if ioctl == _SET_CPUID2 else _TO_OTHER

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _writes(self, v: cython.Py_ssize_t, register: cython.ulonglong, value: cython.longlong) -> cython.void:
        """A write of CR0 or CR4 of known value."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        trigger: cython.longlong = _NONE
        changed: cython.longlong
        first: cython.bint = (vcpu[v].cr0 if register == 0 else vcpu[v].cr4) == _NONE
        if register == 0:
            changed = value ^ vcpu[v].cr0
            if vcpu[v].cr0 == _NONE:
                # It is not known what the first write changed. If it changed a bit for which the kernel unloads, a
                # reset shows it.
                trigger = _NONE if self._unloads[_CR0_WP] and not self._open_resets else _CR0_SILENT
            elif changed & _CR0_PG_BIT:
                trigger = _CR0
            elif changed & _CR0_WP_BIT:
                trigger = _CR0_WP
            vcpu[v].cr0 = value
        elif register == 4:
            changed = value ^ vcpu[v].cr4
            if vcpu[v].cr4 == _NONE:
                trigger = _NONE if self._unloads[_CR4_PGE] and not self._open_resets else _CR4_SILENT
            elif changed & _CR4_ROLE_BITS:
                trigger = _CR4
            elif changed & _CR4_PGE_BIT:
                trigger = _CR4_PGE
            elif changed & _CR4_PCIDE_BIT and not value & _CR4_PCIDE_BIT:
                trigger = _CR4_PCIDE
            vcpu[v].cr4 = value
        else:
            return
        vcpu[v].wrote = self._at
        vcpu[v].wrote_trigger = trigger
        if first and self._open_resets:
            self._not_seen(v)
        if trigger != _NONE and (self._open_resets or not self._unloads[trigger]):
            self._silent(v, trigger)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _writes_efer(self, v: cython.Py_ssize_t, value: cython.longlong) -> cython.void:
        """A write of EFER, where resets are not recorded: only the values show whether it changed a bit of the role."""
        if self._vcpu[v].efer == _NONE:
            self._not_seen(v)
        elif (value ^ self._vcpu[v].efer) & _EFER_ROLE:
            self._pull(v, _EFER, _NO_STATE)
            self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _not_seen(self, v: cython.Py_ssize_t) -> cython.void:
        """The vCPU's MMU context may have been reset here, which no row would show."""
        if self._vcpu[v].started:
            self._pull(v, _NOT_SEEN, _NO_STATE)
            self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _silent(self, v: cython.Py_ssize_t, trigger: cython.longlong) -> cython.void:
        """A write for which the recorded kernel does not unload.

        Another kernel may, so there may be a load at the next entry.
        """
        if trigger == _CR0_WP:
            self._vcpu[v].wp_flips ^= 1
        elif trigger == _CR0_SILENT:
            self._vcpu[v].maybe_flips ^= 1
        if trigger in (_CR0_WP, _CR0_SILENT):
            self._pull(v, trigger, self._with_registers(v, self._vcpu[v].state))
        else:
            self._pull(v, trigger, _NO_STATE)
        self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _moves(self, v: cython.Py_ssize_t, entering: cython.bint) -> cython.void:
        """The vCPU enters or leaves SMM."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._with_registers(v, vcpu[v].state)
        by_io: cython.bint
        if entering:
            by_io = vcpu[v].left > vcpu[v].entered and vcpu[v].left_by_io
            if by_io or vcpu[v].asked_smi > vcpu[v].entered:
                self.by_guest += 1
            else:
                self.by_clock += 1
            self._pull(v, _SMI, state | _IN_SMM)
        else:
            self._pull(v, _RSM, state & ~_IN_SMM)
        vcpu[v].smm = self._at
        if self._loads_by == _ENTRY:
            vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _resets(self, v: cython.Py_ssize_t, unload: cython.bint, in_smm: cython.bint) -> cython.void:
        """The vCPU's MMU context is reset, or its roots are unloaded."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        trigger: cython.longlong
        told: cython.bint
        base: cython.longlong = max(vcpu[v].opened, vcpu[v].loaded)
        former: cython.longlong = vcpu[v].reset
        vcpu[v].reset = self._at
        if former >= 0 and former >= base:
            return
        if vcpu[v].smm > base:
            return
        # After an invalidation, an unload without a reset serves that invalidation's request (5.10 to 5.17).
        if unload and self._invalidated > vcpu[v].loaded:
            return
        trigger = self._cause(vcpu[v].why, in_smm)
        # For a first write, whose change is not known, the reset shows that it changed a bit of the role.
        told = vcpu[v].wrote_trigger >= 0 and vcpu[v].wrote_trigger not in (_CR0_SILENT, _CR4_SILENT)
        if self._valued and vcpu[v].wrote > base and told:
            trigger = vcpu[v].wrote_trigger
        if trigger == _BY_EXIT and vcpu[v].touch > base:
            if vcpu[v].touch_input >= 0:
                self._op[vcpu[v].touch_input] |= _RESETS
            return
        if trigger == _CR0_RESET:
            vcpu[v].cr0_reset = self._at
            vcpu[v].cr0_input = self.inputs
        self._pull(v, trigger, _NO_STATE)
        if self._loads_by == _ENTRY:
            vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _cause(self, why: cython.longlong, in_smm: cython.bint) -> cython.longlong:
        """Return a reset's trigger, which follows from the vCPU's last exit or ioctl."""
        if why == _TO_SREGS:
            return _SREGS
        if why == _TO_CPUID:
            return _CPUID
        if why in (_BY_NOTHING, _TO_OTHER):
            return _OTHER
        if why == _BY_RSM or (why == _BY_UD and in_smm):
            return _RSM
        if why == _BY_CR0:
            return _CR0_RESET if self._unloads[_CR0_WP] else _CR0
        if why == _BY_CR4:
            return _CR4_RESET if self._unloads[_CR4_PGE] else _CR4
        if why == _BY_MSR_WRITE:
            return _EFER
        return _INVPCID if why == _BY_INVPCID else _BY_EXIT
