# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Which root each vCPU has: the rows in which it loads one, and the role words of the roots."""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.inputs import HAS_ENTER, HAS_ROLE, HAS_TRIGGER, NO_STATE, STATE_SHIFT
from replay.decode.rows.exit_records import ExitRecords
from replay.decode.rows.row_meanings import Meaning
from replay.simulate.operations import Op
from traces.kernels import roles, triggers
from traces.kernels.triggers import Trigger

_NONE = cython.declare(cython.longlong, -1)
_ENTRY = cython.declare(cython.int, int(Meaning.ENTRY))
_ENTER = cython.declare(cython.uint, int(Op.ENTER))
_ROLE = cython.declare(cython.uint, int(Op.ROLE))
_SWITCH = cython.declare(cython.uint, int(Op.SWITCH))
_STATE_SHIFT = cython.declare(cython.int, STATE_SHIFT)
_NO_STATE = cython.declare(cython.longlong, NO_STATE)
_HAS_ENTER = cython.declare(cython.longlong, HAS_ENTER)
_HAS_ROLE = cython.declare(cython.longlong, HAS_ROLE)
_HAS_TRIGGER = cython.declare(cython.longlong, HAS_TRIGGER)
_CR0_WP = cython.declare(cython.longlong, int(Trigger.CR0_WP))
_CR0 = cython.declare(cython.longlong, int(Trigger.CR0))
_OTHER = cython.declare(cython.longlong, int(Trigger.OTHER))
_CR0_RESET = cython.declare(cython.longlong, int(Trigger.CR0_RESET))
_IN_SMM = cython.declare(cython.longlong, roles.SMM)
_WP = cython.declare(cython.longlong, roles.WP)
_NX = cython.declare(cython.longlong, roles.NX)
_MAYBE_WP = cython.declare(cython.longlong, roles.MAYBE_WP)
_USUAL = cython.declare(cython.longlong, roles.USUAL)
_EFER_NX = cython.declare(cython.longlong, triggers.EFER_NX)
_LEVEL5 = cython.declare(cython.longlong, roles.LEVEL5)
_NESTED_GUEST = cython.declare(cython.longlong, roles.GUEST)
_GUEST_MODE = cython.declare(cython.uint, 1 << 17)
_DIRECT = cython.declare(cython.uint, 1 << 7)


@cython.cclass
class RootLoads(ExitRecords):
    """Makes ROLE, ENTER and SWITCH of the rows in which a vCPU loads a root or enters the guest."""

    nested: cython.longlong
    began: cython.longlong

    _roles: cython.uint[::1]  # role words by root id; the last place stays 0, and serves all larger ids
    _loads_by: cython.int  # the meaning of rows from which loads are taken
    _open_resets: cython.bint  # resets are not recorded
    _invalidations: cython.longlong  # number of invalidations
    _guest_bits: cython.bint
    _wp: cython.longlong
    _nx: cython.longlong

    def __init__(self, capabilities: Any, vcpus: int, timed: bool, role_words: Any) -> None:
        """`role_words` has the role words of roots that are known beforehand, by root id."""
        super().__init__(capabilities, vcpus, timed)
        kernel, kinds = capabilities.kernel, capabilities.trace.metadata.kinds
        self._roles = role_words
        self._loads_by = _ENTRY
        for kind, meaning in (("mmu_load", Meaning.MMU_LOAD), ("root_get", Meaning.ROOT_GET)):
            if kinds.get(kind):
                self._loads_by = int(meaning)
        self._open_resets = bool(capabilities.open_resets)
        self._guest_bits = kernel.layout.guest_bits
        self._wp, self._nx = kernel.layout.wp, kernel.layout.nx
        self._invalidations = self.nested = 0
        self.began = -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _load_root(self, v: cython.Py_ssize_t, root: cython.longlong, role: cython.uint) -> cython.void:
        """The vCPU loads a root."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._state(role if role else self._role_of(root))
        cr0: cython.longlong
        if self._shadows(role if role else self._role_of(root)):
            return
        if self._guest_bits and vcpu[v].cr0_reset > vcpu[v].loaded and vcpu[v].cr0_input >= 0:
            # The reset for a write of CR0 was for WP alone if, and only if, the next role word differs in WP.
            cr0 = _CR0_WP if (vcpu[v].state ^ state) & _WP else _CR0
            self._gfn[vcpu[v].cr0_input] = self._gfn[vcpu[v].cr0_input] >> _STATE_SHIFT << _STATE_SHIFT | cr0
            vcpu[v].has = vcpu[v].has & ~(_HAS_TRIGGER << _CR0_RESET) | _HAS_TRIGGER << cr0
        vcpu[v].state = state
        self._arrive(v, self._with_registers(v, state))
        vcpu[v].loaded = self._at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _arrive(self, v: cython.Py_ssize_t, state: cython.longlong) -> cython.void:
        self._vcpu[v].started = True
        self._put_of(v, _ROLE, state, _HAS_ROLE)
        self._put_of(v, _ENTER, 0, _HAS_ENTER)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _switches(self, v: cython.Py_ssize_t, role: cython.uint) -> cython.void:
        """Follow kvm_mmu_new_pgd: slots are kept if a guest and its nested guest both have roots of the TDP MMU."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._state(role)
        if not role & _DIRECT or not vcpu[v].started:
            return
        if vcpu[v].nesting and role & _GUEST_MODE:
            self.nested -= 1
        vcpu[v].nesting = False
        if (state ^ vcpu[v].state) & _NESTED_GUEST:
            vcpu[v].state = state
            self._put_of(v, _SWITCH, self._with_registers(v, state), 0)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _enters(self, v: cython.Py_ssize_t, root: cython.longlong, role: cython.uint) -> cython.void:
        """The vCPU enters the guest."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        word: cython.uint
        pending: cython.bint = vcpu[v].invalidated != self._invalidations
        if self.began < 0:
            self.began = self._now
        if self._loads_by == _ENTRY and root > 0 and root != vcpu[v].root:
            if self._open_resets and vcpu[v].root > 0 and vcpu[v].unloaded < vcpu[v].entered and not pending:
                self._pull(v, _OTHER, _NO_STATE)  # it gave up its root for a reason that is not recorded
            self._load_root(v, root, role)
        vcpu[v].root = root
        if not vcpu[v].started:  # it ran before the recording began: its root is the one at its first entry
            word = self._role_of(root)
            vcpu[v].state = self._state(word) if word else _USUAL
            self._arrive(v, vcpu[v].state)
        if vcpu[v].dirty or pending:
            self._put_of(v, _ENTER, 0, _HAS_ENTER)
            vcpu[v].dirty = False
            vcpu[v].invalidated = self._invalidations
        vcpu[v].entered = self._at

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _name(self, root: cython.longlong, role: cython.uint) -> cython.void:
        """Remember a root's role word."""
        if root < self._roles.shape[0] - 1:
            self._roles[root] = role

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _role_of(self, root: cython.longlong) -> cython.uint:
        if root < 0:
            root = 0
        return self._roles[min(root, self._roles.shape[0] - 1)]

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _shadows(self, role: cython.uint) -> cython.bint:
        """Return whether a role word is that of a root which shadows L1's nested page tables."""
        return role & _GUEST_MODE != 0 and role & _DIRECT == 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _state(self, word: cython.uint) -> cython.longlong:
        """Return the state in a role word (`roles`); if role words have no guest bits, WP and NX count as set."""
        state: cython.longlong = _USUAL
        if self._guest_bits:
            state = (_WP if word & self._wp else 0) | (_NX if word & self._nx else 0)
        if word & 0xF == 5:
            state |= _LEVEL5
        if word >> 24:
            state |= _IN_SMM
        if word & _GUEST_MODE:
            state |= _NESTED_GUEST
        return state

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _with_registers(self, v: cython.Py_ssize_t, state: cython.longlong) -> cython.longlong:
        """Return a state with WP and NX as register writes left them; unchanged if role words have these bits."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        if self._guest_bits:
            return state
        if vcpu[v].wp_flips:
            state ^= _WP
        if vcpu[v].maybe_flips:
            state |= _MAYBE_WP
        # SMM begins with EFER 0.
        if vcpu[v].efer != _NONE and (not vcpu[v].efer & _EFER_NX or state & _IN_SMM):
            state &= ~_NX
        return state
