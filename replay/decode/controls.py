"""What a vCPU does to its roots, from rows to stimuli: loads, resets with their causes, and entries that may load.

A reset's cause is what the same vCPU did since it last left the guest. Resets come in pairs (entering SMM resets
twice) and by more than one function; the first since the exit, or since the last load, is the one that empties slots.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from replay import causes, roles
from replay.causes import Trigger
from replay.decode.capabilities import Evidence
from replay.decode.inputs import NO_STATE, STATE_SHIFT, TRIGGER, Out
from replay.decode.lookback import Ints, Last, Rows, following, word_of
from replay.decode.registers import DETAIL, NEVER, Registers
from replay.simulate.operations import VCPU_SHIFT, Op
from traces.schema import BY_NAME

_IOCTL: Final = 1 << 32
Vcpus = NDArray[np.int32]


class _Batch(NamedTuple):
    """What is looked up again and again: row numbers, and what goes with them."""

    rows: Rows
    opens: Ints  # exits and vCPU ioctls
    codes: Ints
    loads: Ints
    plain: Ints  # the loads' states by their words
    smm: Ints
    entries: Ints


class Controls:
    """Of one VM. After `emit`, `by_fault` and `explained` name stimuli (by seq) that a later row has explained."""

    def __init__(self, evidence: Evidence, vcpus: int) -> None:
        self._intel = evidence.intel
        self._kernel = evidence.kernel
        counts = evidence.trace.metadata.kinds
        self._loads_by = next((kind for kind in ("root_get", "mmu_load") if counts.get(kind)), "")
        self._registers = Registers(evidence, vcpus)
        self._opened, self._code = Last(vcpus, NEVER), Last(vcpus, NEVER)
        self._loaded, self._plain = Last(vcpus, NEVER), Last(vcpus, roles.USUAL)
        self._smm, self._reset, self._entered = Last(vcpus, NEVER), Last(vcpus, NEVER), Last(vcpus, NEVER)
        self._cr0 = Last(vcpus, NEVER)  # the last reset for a write of CR0
        self._root = Last(vcpus, 0)
        self._dirty = np.zeros(vcpus, np.bool_)  # may have to load at its next entry
        self._started = np.zeros(vcpus, np.bool_)
        self._invalidated = NEVER
        self.counts = dict.fromkeys(Trigger, 0)
        self.by_fault = np.empty(0, np.int64)
        self.explained: tuple[Ints, Ints] = (self.by_fault, self.by_fault)

    def emit(self, rows: Rows, out: Out, roots: NDArray[np.uint32], touched: Ints, last_touch: Last) -> None:
        """Put a batch's stimuli out. `roots` is each root's role word, `touched` the rows of touches."""
        opens, codes = self._opens(rows)
        loads, plain = self._loads(rows, roots)
        batch = _Batch(rows, opens, codes, loads, plain, rows.of_vcpu("kvm_smm_transition"), rows.of_vcpu("kvm_entry"))
        silent, trigger = self._registers.read(rows, opens, codes)
        if len(silent):
            flips = np.isin(trigger, (int(Trigger.CR0_WP), int(Trigger.CR0_SILENT)))
            self._trigger(rows, out, silent, trigger, np.where(flips, self._state(batch, silent), NO_STATE))
        self._transitions(batch, out)
        resets, cr0 = self._resets(batch, out, touched, last_touch)
        self._load(batch, out, cr0)
        unloads = [silent] if self._loads_by else [silent, batch.smm, resets]
        self._enter(batch, out, np.concatenate(unloads), roots)
        self._keep(batch, cr0)
        last_touch.keep(rows.vcpu[touched], rows.seq[touched])

    def pending(self, last_touch: Last, first: int) -> int | None:
        """The seq, not before `first`, from which the next batch may explain stimuli. None: all is settled."""
        left = [last.left for last in (self._opened, self._entered, self._reset, self._loaded)]
        touches = last_touch.left[last_touch.left > np.max(left, axis=0)]
        writes = self._cr0.left[self._cr0.left > self._loaded.left]
        open_ = np.concatenate([touches, writes])
        open_ = open_[open_ >= first]
        return int(open_.min()) if len(open_) else None

    # What rows are

    def _opens(self, rows: Rows) -> tuple[Ints, Ints]:
        """Exits and vCPU ioctls, and what each was."""
        opens = rows.of_vcpu("kvm_exit", "ioctl")
        code = rows.code[opens].astype(np.int64)
        detailed = code == (causes.VMX_CR if self._intel else causes.SVM_MSR)
        exit_ = code & 0xFFFF | np.where(detailed, (rows.value[opens].astype(np.int64) & 0xF) << DETAIL, 0)
        ioctl = rows.kind[opens] == BY_NAME["ioctl"].code
        return opens, np.where(ioctl, code & 0xFFFF | _IOCTL, exit_)

    def _loads(self, rows: Rows, roots: NDArray[np.uint32]) -> tuple[Ints, Ints]:
        if self._loads_by:
            loads = rows.of_vcpu(self._loads_by)
            loads = loads[(rows.root[loads] > 0) & (rows.ret[loads] >= 0)]
        else:
            loads = rows.of_vcpu("kvm_entry")
            vcpu, root = rows.vcpu[loads], rows.root[loads].astype(np.int64)
            before = self._root.before(vcpu, loads, root, vcpu, loads)
            self._root.keep(vcpu, root)
            loads = loads[(root != before) & (root > 0)]
        known = rows.role[loads]
        return loads, roles.states(np.where(known != 0, known, word_of(roots, rows.root[loads])), self._kernel.layout)

    def _state(self, batch: _Batch, at: Ints) -> Ints:
        """The states of these rows' vCPUs, there."""
        rows = batch.rows
        vcpu = rows.vcpu[at]
        plain = self._plain.before(rows.vcpu[batch.loads], batch.loads, batch.plain, vcpu, at)
        return self._registers.state(rows, plain, vcpu, at)

    # Triggers

    def _trigger(self, rows: Rows, out: Out, at: Ints, trigger: Ints, state: Ints | int = NO_STATE) -> None:
        if len(at):
            for value, count in enumerate(np.bincount(trigger).tolist()):
                self.counts[Trigger(value)] += count
            out.plain = False
            state = np.asarray(state, np.int64)
            out.add(at, TRIGGER | rows.vcpu[at].astype(np.int64) << VCPU_SHIFT, trigger | state << STATE_SHIFT)

    def _transitions(self, batch: _Batch, out: Out) -> None:
        if len(batch.smm):
            entering = batch.rows.flags[batch.smm] & 1 != 0
            state = self._state(batch, batch.smm)
            state = np.where(entering, state | roles.SMM, state & ~roles.SMM)
            trigger = np.where(entering, int(Trigger.SMI), int(Trigger.RSM))
            self._trigger(batch.rows, out, batch.smm, trigger, state)

    def _resets(self, batch: _Batch, out: Out, touched: Ints, last_touch: Last) -> tuple[Ints, Ints]:
        """Put out the resets that no SMM transition explains; returns those, and those for writes of CR0."""
        rows = batch.rows
        at = rows.of_vcpu("mmu_reset", "mmu_unload")
        self.by_fault = at[:0]
        if not len(at):
            return at, at
        asker, seq = rows.vcpu[at], rows.seq

        def latest(memory: Last, which: Ints, values: Ints) -> Ints:
            return memory.before(rows.vcpu[which], which, values, asker, at)

        loaded = latest(self._loaded, batch.loads, seq[batch.loads])
        base = np.maximum(latest(self._opened, batch.opens, seq[batch.opens]), loaded)
        former = self._reset.before(asker, at, seq[at], asker, at)
        self._reset.keep(asker, seq[at])
        kept = (former < base) | (former < 0)
        kept &= latest(self._smm, batch.smm, seq[batch.smm]) <= base
        # An unload outside of a reset after an invalidation is the one that it asked for (5.10 to 5.17).
        invalidated = np.append([self._invalidated], seq[rows.of("kvm_mmu_zap_all_fast")])
        asked_for = invalidated[np.searchsorted(invalidated[1:], seq[at])] > loaded
        kept &= ~(asked_for & (rows.kind[at] == BY_NAME["mmu_unload"].code))
        trigger = self._classify(latest(self._code, batch.opens, batch.codes), rows.role[at] >> 24 != 0)
        wrote = self._registers.wrote(rows, asker, at, base)
        trigger = np.where(wrote >= 0, wrote, trigger)
        touch = latest(last_touch, touched, seq[touched])
        by_fault = kept & (trigger == Trigger.EXIT) & (touch > base)
        self.by_fault = touch[by_fault]
        kept &= ~by_fault
        self._trigger(rows, out, at[kept], trigger[kept])
        return at[kept], at[kept & (trigger == Trigger.CR0_RESET)]

    def _classify(self, code: Ints, in_smm: NDArray[np.bool_]) -> Ints:
        """Triggers of resets, by what the vCPU did last: exit or ioctl."""
        if self._intel:
            rsm, undefined, invpcid = causes.VMX_RSM, causes.VMX_EXCEPTION, causes.VMX_INVPCID
            msr = code == causes.VMX_WRMSR
        else:
            rsm, undefined, invpcid = causes.SVM_RSM, causes.SVM_UD, causes.SVM_INVPCID
            msr = code == (causes.SVM_MSR | 1 << DETAIL)
        ioctl, unloads = code & 0xFFFF, self._kernel.unloads
        cases = [
            (code == NEVER, Trigger.OTHER),
            ((code >= _IOCTL) & np.isin(ioctl, causes.SET_SREGS), Trigger.SREGS),
            ((code >= _IOCTL) & (ioctl == causes.SET_CPUID2), Trigger.CPUID),
            (code >= _IOCTL, Trigger.OTHER),
            ((code == rsm) | ((code == undefined) & in_smm), Trigger.RSM),
            (self._registers.is_write(code, 0), Trigger.CR0_RESET if Trigger.CR0_WP in unloads else Trigger.CR0),
            (self._registers.is_write(code, 4), Trigger.CR4_RESET if Trigger.CR4_PGE in unloads else Trigger.CR4),
            (msr, Trigger.EFER),
            (code == invpcid, Trigger.INVPCID),
        ]
        return np.select([case for case, _ in cases], [int(trigger) for _, trigger in cases], int(Trigger.EXIT))

    # Loads and entries

    def _load(self, batch: _Batch, out: Out, cr0: Ints) -> None:
        self.explained = (batch.loads[:0], batch.loads[:0])
        if len(batch.loads):
            if self._kernel.layout.guest_bits and (len(cr0) or (self._cr0.left > self._loaded.left).any()):
                self._explain(batch, cr0)
            vcpu = batch.rows.vcpu[batch.loads]
            self._arrive(out, batch.loads, vcpu, self._registers.state(batch.rows, batch.plain, vcpu, batch.loads))
            self._started[vcpu] = True

    @staticmethod
    def _arrive(out: Out, at: Ints, vcpu: Vcpus, state: Ints) -> None:
        which = vcpu.astype(np.int64) << VCPU_SHIFT
        out.plain = False
        out.add(at, int(Op.ROLE) | which, state)
        out.add(at, int(Op.ENTER) | which, 0)

    def _explain(self, batch: _Batch, cr0: Ints) -> None:
        """Resets for writes of CR0: for WP alone where the next word differs in WP, and only then."""
        rows, loads = batch.rows, batch.loads
        vcpu = rows.vcpu[loads]
        before = self._plain.before(vcpu, loads, batch.plain, vcpu, loads)
        since = self._loaded.before(vcpu, loads, rows.seq[loads], vcpu, loads)
        written = self._cr0.before(rows.vcpu[cr0], cr0, rows.seq[cr0], vcpu, loads)
        found = written > since
        trigger = np.where((before ^ batch.plain) & roles.WP != 0, int(Trigger.CR0_WP), int(Trigger.CR0))
        self.explained = (written[found], trigger[found])

    def _enter(self, batch: _Batch, out: Out, asked: Ints, roots: NDArray[np.uint32]) -> None:
        """Entries at which a vCPU may have to load, though the recorded one did not."""
        rows, entries = batch.rows, batch.entries
        if not self._started.all() and len(entries):
            self._begin(batch, out, roots)
        invalidations = rows.of("kvm_mmu_zap_all_fast")
        if not (len(asked) or len(invalidations) or self._dirty.any()):
            return
        every = np.arange(len(self._dirty), dtype=np.int32)
        dirty = every[self._dirty]
        asker = np.concatenate([dirty, rows.vcpu[asked], np.tile(every, len(invalidations))])
        at = np.concatenate([np.zeros(len(dirty), np.int64), asked, np.repeat(invalidations, len(every))])
        vcpu = rows.vcpu[entries]
        # One more for row numbers: row 0 may be an entry, too.
        found = following(vcpu, entries + 1, asker, np.where(np.arange(len(at)) < len(dirty), 0, at + 1))
        self._dirty[:] = False
        self._dirty[asker[found < 0]] = True
        found = np.unique(found[found >= 0])
        out.add(entries[found], int(Op.ENTER) | vcpu[found].astype(np.int64) << VCPU_SHIFT, 0)

    def _begin(self, batch: _Batch, out: Out, roots: NDArray[np.uint32]) -> None:
        """vCPUs that ran already when the recording began: their root is the one they enter with."""
        rows = batch.rows
        for vcpu in np.flatnonzero(~self._started).tolist():
            mine = batch.entries[rows.vcpu[batch.entries] == vcpu][:1]
            if len(mine):
                self._started[vcpu] = True
                role = word_of(roots, rows.root[mine])
                state = np.where(role != 0, roles.states(role, self._kernel.layout), roles.USUAL)
                self._plain.keep(rows.vcpu[mine], state)
                self._arrive(out, mine, rows.vcpu[mine], state)

    def _keep(self, batch: _Batch, cr0: Ints) -> None:
        rows = batch.rows
        for last, at in (
            (self._opened, batch.opens),
            (self._smm, batch.smm),
            (self._loaded, batch.loads),
            (self._entered, batch.entries),
            (self._cr0, cr0),
        ):
            last.keep(rows.vcpu[at], rows.seq[at])
        self._code.keep(rows.vcpu[batch.opens], batch.codes)
        self._plain.keep(rows.vcpu[batch.loads], batch.plain)
        self._registers.keep(rows)
        invalidations = rows.of("kvm_mmu_zap_all_fast")
        if len(invalidations):
            self._invalidated = int(rows.seq[invalidations[-1]])
