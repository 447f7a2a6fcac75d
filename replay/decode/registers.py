"""Writes of CR0, CR4 and EFER in a trace: what each says of unloads, and of the bits that old kernels put in words."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay import causes, roles
from replay.causes import Trigger
from replay.decode.capabilities import Evidence
from replay.decode.lookback import Flips, Ints, Last, Rows

DETAIL: Final = 16  # where an exit's detail stands above its code: the control register, or that an MSR is written
NEVER: Final = -1


class Registers:
    """Of one VM. Values come with `kvm_cr`; where KVM emulates the access there is only the exit, without a value."""

    def __init__(self, evidence: Evidence, vcpus: int) -> None:
        self._intel = evidence.intel
        self._unloads = evidence.kernel.unloads
        self._tracks = not evidence.kernel.layout.guest_bits  # words do not tell
        self._valued = bool(evidence.trace.metadata.kinds.get("kvm_cr"))
        self._values = {0: Last(vcpus, NEVER), 4: Last(vcpus, NEVER)}
        self._write, self._written = Last(vcpus, NEVER), Last(vcpus, NEVER)
        self._efer = Last(vcpus, NEVER)
        self._flips, self._maybe = Flips(vcpus), Flips(vcpus)
        self._rows = np.empty(0, np.int64)
        self._triggers = np.empty(0, np.int64)

    def read(self, rows: Rows, exits: Ints, codes: Ints) -> tuple[Ints, Ints]:
        """Take in a batch. Returns the writes that the recorded kernel does not unload for: rows and triggers."""
        if self._valued:
            parts = [self._valued_writes(rows, register) for register in (0, 4)]
        else:
            parts = [self._bare_writes(exits, codes, register) for register in (0, 4)]
        at, trigger = (np.concatenate(column) for column in zip(*parts, strict=True))
        if not len(at) and not len(self._rows):
            return at, trigger
        order = np.argsort(at, kind="stable")
        self._rows, self._triggers = at[order], trigger[order]
        quiet = (self._triggers >= 0) & ~np.isin(self._triggers, list(self._unloads))
        at, trigger = self._rows[quiet], self._triggers[quiet]
        for flips, which in ((self._flips, Trigger.CR0_WP), (self._maybe, Trigger.CR0_SILENT)):
            mine = at[trigger == which]
            flips.note(rows.vcpu[mine], mine)
        return at, trigger

    def wrote(self, rows: Rows, asker: NDArray[np.int32], asked: Ints, since: Ints) -> Ints:
        """For resets: the trigger of the vCPU's last write with a value, if later than row (seq) `since`; or -1."""
        if not self._valued:
            return np.full(len(asked), NEVER)
        vcpu = rows.vcpu[self._rows]
        when = self._written.before(vcpu, self._rows, rows.seq[self._rows], asker, asked)
        return np.where(when > since, self._write.before(vcpu, self._rows, self._triggers, asker, asked), NEVER)

    def state(self, rows: Rows, state: Ints, vcpu: NDArray[np.int32], at: Ints) -> Ints:
        """States with WP and NX as writes up to these rows left them; unchanged where words have the bits."""
        if not self._tracks:
            return state
        state = np.where(self._flips.odd(vcpu, at), state ^ roles.WP, state)
        state = np.where(self._maybe.odd(vcpu, at), state | roles.MAYBE_WP, state)
        efer = self._efer_writes(rows)
        value = self._efer.before(rows.vcpu[efer], efer, rows.value[efer].astype(np.int64), vcpu, at)
        # SMM begins with EFER 0.
        off = (value != NEVER) & ((value & causes.EFER_NX == 0) | (state & roles.SMM != 0))
        return np.where(off, state & ~roles.NX, state)

    def keep(self, rows: Rows) -> None:
        """Go on to the next batch."""
        self._flips.keep()
        self._maybe.keep()
        self._written.keep(rows.vcpu[self._rows], rows.seq[self._rows])
        self._write.keep(rows.vcpu[self._rows], self._triggers)
        efer = self._efer_writes(rows)
        self._efer.keep(rows.vcpu[efer], rows.value[efer].astype(np.int64))

    def is_write(self, codes: Ints, register: int) -> NDArray[np.bool_]:
        """Which exits (with detail) are writes of CR0 or CR4."""
        if self._intel:
            wanted: tuple[int, ...] = (causes.VMX_CR | register << DETAIL,)
        else:
            wanted = causes.SVM_CR0 if register == 0 else (causes.SVM_CR4,)
        is_one: NDArray[np.bool_] = codes == wanted[0]
        for code in wanted[1:]:
            is_one = is_one | (codes == code)
        return is_one

    def _bare_writes(self, exits: Ints, codes: Ints, register: int) -> tuple[Ints, Ints]:
        usual, silent = (Trigger.CR0_WP, Trigger.CR0_SILENT) if register == 0 else (Trigger.CR4_PGE, Trigger.CR4_SILENT)
        # Where the kernel unloads for the usual write, no reset means that nothing of the kind was written.
        at = exits[self.is_write(codes, register)] if usual not in self._unloads else exits[:0]
        return at, np.full(len(at), int(silent))

    def _valued_writes(self, rows: Rows, register: int) -> tuple[Ints, Ints]:
        at = rows.of_vcpu("kvm_cr")
        at = at[(rows.flags[at] & 1 != 0) & (rows.code[at] == register)]
        value, vcpu = rows.value[at].astype(np.int64), rows.vcpu[at]
        before = self._values[register].before(vcpu, at, value, vcpu, at)
        self._values[register].keep(vcpu, value)
        changed = value ^ before
        if register == 0:
            cases = [(changed & causes.CR0_PG != 0, Trigger.CR0), (changed & causes.CR0_WP != 0, Trigger.CR0_WP)]
            first = Trigger.CR0_SILENT if Trigger.CR0_WP not in self._unloads else NEVER
        else:
            off = (changed & causes.CR4_PCIDE != 0) & (value & causes.CR4_PCIDE == 0)
            cases = [
                (changed & causes.CR4_ROLE != 0, Trigger.CR4),
                (changed & causes.CR4_PGE != 0, Trigger.CR4_PGE),
                (off, Trigger.CR4_PCIDE),
            ]
            first = Trigger.CR4_SILENT if Trigger.CR4_PGE not in self._unloads else NEVER
        known = np.select([case for case, _ in cases], [int(trigger) for _, trigger in cases], NEVER)
        # Of the first write it is not known what it changed; a kernel that unloads for all of it shows that by a reset.
        return at, np.where(before == NEVER, int(first), known).astype(np.int64)

    @staticmethod
    def _efer_writes(rows: Rows) -> Ints:
        at = rows.of_vcpu("kvm_msr")
        writes: NDArray[np.bool_] = (rows.code[at] == causes.EFER_MSR) & (rows.flags[at] & 1 != 0)
        return at[writes]
