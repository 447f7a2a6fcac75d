# SPDX-License-Identifier: Apache-2.0
"""Diagnose why a vCPU makes no progress: the cause that fits the evidence in the rows, or that none fits.

Each cause is looked for in the rows that show it: errors of KVM_RUN, exit reasons of userspace exits, loads of roots,
what became of the faults, invalidations meanwhile, and known bugs of the kernel version.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np

from replay.decode.exits import (
    USER_FAIL_ENTRY,
    USER_INTERNAL_ERROR,
    USER_MEMORY_FAULT,
    USER_SHUTDOWN,
    user_exit_name,
)
from replay.decode.same_rip import RipRuns
from replay.timing.measuring.shown_of_vm import PAGE_SHIFT, ShownOfVm
from replay.timing.stuck_rip import CERTAIN, RipEnd, RipRun, last_exits, longest_runs
from traces.command_line.durations import duration
from traces.kernels.kernel import Kernel
from traces.reader import Trace
from traces.vm_names import VmNames

_ROWS: Final = 12  # the most rows that a diagnosis shows
_HISTORY: Final = 6  # the most of these that are earlier changes of the page's SPTE
_READ: Final = 1 << 17  # the most rows that are searched for the rows to show
READ_ONLY: Final = 1 << 1  # KVM_MEM_READONLY of a memslot
_HOST: Final = ("kvm_unmap_hva_range", "kvm_mmu_zap_all_fast", "zap_leafs", "kvm_set_spte_hva", "memslot")
_SPTES: Final = ("kvm_tdp_mmu_spte_changed", "kvm_mmu_set_spte", "kvm_mmu_prepare_zap_page")
_COLUMNS: Final = (
    "seq", "time", "vcpu", "tid", "kind", "gfn", "old", "new", "addr", "code", "value", "rip", "ret", "flags",
)  # fmt: skip
_HEX: Final = ("gfn", "rip", "addr", "code", "value", "old", "new")


Named = Callable[[int, int], str]


def plainly(vm: int, vcpu: int) -> str:
    """Name a vCPU by its numbers."""
    return f"vCPU {vcpu} of VM {vm}"


@dataclass(frozen=True)
class Diagnosis:
    """Why one vCPU makes no progress, or in which error it ended.

    `kind` is a word for programs and `why` a phrase for people. The vCPU had `exits` exits at `rip` from `since` to
    `until` (boot clock, ns), of which the first is the trace row `seq`; a vCPU that ended has that one exit. `rows` are
    the rows that show it, in words.
    """

    vm: int
    vcpu: int
    kind: str
    why: str
    rip: int
    exits: int
    since: int
    until: int
    seq: int
    rows: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the vCPU ended with one exit, as opposed to running on without making progress."""
        return self.exits == 1 and self.kind in (*ENDS.values(), RUN_ERROR)

    def said(self, who: Named) -> str:
        """Return the diagnosis as a sentence; `who` names the vCPU."""
        name = who(self.vm, self.vcpu)
        if self.ended:
            return f"{name} ends in {self.why}, at RIP {self.rip:#x}, row {self.seq:,}"
        took = f"{self.exits:,} exits at RIP {self.rip:#x} in {duration(self.until - self.since)}"
        return f"{name} is stuck in the recording: {took}, from row {self.seq:,} on: {self.why}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": list(self.rows)}


ENDS: Final = {
    USER_SHUTDOWN: "shutdown", USER_FAIL_ENTRY: "fail_entry", USER_INTERNAL_ERROR: "internal_error",
}  # fmt: skip
RUN_ERROR: Final = "run_error"
# These errors of KVM_RUN only mean that it is to be called again: after a signal, or for a vCPU that awaits its SIPI.
_AGAIN: Final = (errno.EINTR, errno.EAGAIN)


def diagnoses(
    trace: Trace, vm: Mapping[str, Any], kernel: Kernel | None, runs: RipRuns, ids: Sequence[int], exits: int = CERTAIN
) -> list[Diagnosis]:
    """Return the diagnoses of one VM's vCPUs: those with at least `exits`
    exits at one RIP, and those that ended in an error.
    """
    return diagnosed(trace, vm, kernel, longest_runs(runs, ids), last_exits(runs, ids), exits)


def diagnosed(
    trace: Trace,
    vm: Mapping[str, Any],
    kernel: Kernel | None,
    runs: Sequence[RipRun],
    ends: Sequence[RipEnd],
    exits: int = CERTAIN,
) -> list[Diagnosis]:
    """Return the same diagnoses from runs of exits and last exits that are already known."""
    found = []
    shown = ShownOfVm(trace, vm)
    for run in runs:
        if run.certain(exits):
            kind, why = _cause(run, shown, kernel)
            if kind in _BY_OTHERS and (who := _invalidators(trace, vm, run)):
                why += f"; by {who}"
            if shown.lost(run):
                why += "; events were lost meanwhile, in which it may have got further"
            rows = tuple(_evidence(trace, vm, run))
            found.append(
                Diagnosis(int(vm["id"]), run.vcpu, kind, why, run.rip, run.exits, run.since, run.until, run.seq, rows)
            )
    told = {each.vcpu for each in found if each.kind in (*ENDS.values(), RUN_ERROR)}
    for end in ends:
        if end.error < 0 and -end.error not in _AGAIN and end.reason != USER_MEMORY_FAULT and end.vcpu not in told:
            found.append(_failed(trace, vm, shown, end))
        if end.reason in ENDS and end.error >= 0 and end.vcpu not in told:
            why = f"{user_exit_name(end.reason)} ({end.reason}): {_MEANS[end.reason]}"
            if end.reason == USER_SHUTDOWN and end.shutdowns > 1:
                why += f", the last of {end.shutdowns:,}: userspace resets the vCPU and it happens again"
            row = f"row {end.ended:,} kvm_userspace_exit {user_exit_name(end.reason)}"
            found.append(
                Diagnosis(int(vm["id"]), end.vcpu, ENDS[end.reason], why, end.at, 1, end.time, end.time, end.ended,
                          (row,))
            )  # fmt: skip
    return sorted(found, key=lambda each: each.vcpu)


def _failed(trace: Trace, vm: Mapping[str, Any], shown: ShownOfVm, end: RipEnd) -> Diagnosis:
    """Diagnose a vCPU whose last KVM_RUN failed; most VMMs then stop it, some without a message."""
    why = f"KVM_RUN failing with {_error(-end.error)}"
    rows = [f"row {end.ended:,} kvm_userspace_exit errno {-end.error}"]
    for row in _rows(trace, vm, end.exit, end.ended) if end.exit >= 0 else ():
        if row["kind"] == "kvm_page_fault" and row["vcpu"] == end.vcpu:
            why += _unbacked(shown, row["addr"] >> PAGE_SHIFT, end.time) if -end.error == errno.EFAULT else ""
            rows.insert(0, f"row {row['seq']:,} kvm_page_fault addr={row['addr']:#x} code={row['code']:#x}")
            break
    why += "; userspace does not run it again"
    return Diagnosis(
        int(vm["id"]), end.vcpu, RUN_ERROR, why, end.at, 1, end.time, end.time, end.ended, tuple(rows)
    )  # fmt: skip


def _error(number: int) -> str:
    return f"{errno.errorcode.get(number, 'an error')} (errno {number})"


_MEANS: Final = {
    USER_SHUTDOWN: "a triple fault of the guest",
    USER_FAIL_ENTRY: "the processor refuses the vCPU's state",
    USER_INTERNAL_ERROR: "KVM cannot go on; its suberror is in no row",
}


def _cause(run: RipRun, shown: ShownOfVm, kernel: Kernel | None) -> tuple[str, str]:
    """Return the cause of a run as a word for programs and a phrase for people."""
    most = run.exits / 2
    where = shown.place(run)
    if run.errors >= most:
        of_page = run.error == errno.EFAULT and run.faults
        unbacked = _unbacked(shown, run.addr >> PAGE_SHIFT, run.until) if of_page else ""
        return RUN_ERROR, f"KVM_RUN fails with {_error(run.error)}, {run.errors:,} times{unbacked}"
    for reason, count in (
        (USER_INTERNAL_ERROR, run.internal),
        (USER_SHUTDOWN, run.shutdowns),
        (USER_FAIL_ENTRY, run.failed),
    ):
        if count >= most:
            what = f"each ends in {user_exit_name(reason)} ({reason}), {count:,} times: {_MEANS[reason]}"
            if reason == USER_INTERNAL_ERROR and run.undefined >= most:
                what = (
                    f"each ends in {user_exit_name(reason)} ({reason}), {count:,} times, with #UD queued: emulation of "
                    f"the instruction failed (suberror 1, emulation), {where}"
                )
            elif reason == USER_INTERNAL_ERROR and run.accesses:
                what += f"; the access is {where}" + _emulates(run, shown)
            return ENDS[reason], what
    if run.mmio >= most:
        return _mmio(run, shown, where)
    if run.loads * 4 >= run.exits:
        return "roots", "roots: it loads a root again and again, and refills it"
    if run.faults >= most:
        return _faults(run, shown, kernel, where)
    if run.undefined >= most:
        return "undefined", "the instruction is undefined: KVM injects #UD each time, and the guest comes back to it"
    if run.nested >= most and (run.vectoring >= most or run.accesses):
        return "event_delivery", _undelivered(run, where)
    return "unexplained", "not explained: its exits fit no cause that is known here"


def _undelivered(run: RipRun, where: str) -> str:
    if run.vectoring * 2 >= run.exits:
        return (
            "each exit is a fault in the nested page tables while an event is delivered to the guest (valid "
            f"IDT-vectoring information), {where}: its IDT, TSS or stack cannot be reached"
        )
    return (
        f"each exit is a fault in the nested page tables {where}, for which KVM neither maps nor emulates anything: so "
        "it goes where the processor itself makes the access to deliver an event, and the guest's IDT, TSS or stack "
        "lies there"
    )


def _emulates(run: RipRun, shown: ShownOfVm) -> str:
    """Say what an access outside all memslots means for an instruction that failed.

    Empty if the address is in a memslot.
    """
    if not shown.in_no_slot(run):
        return ""
    return ": emulated MMIO, by an instruction that KVM does not emulate or in the delivery of an event (IDT, stack)"


def _mmio(run: RipRun, shown: ShownOfVm, where: str) -> tuple[str, str]:
    does = "the guest polls it" if run.polls else "the instruction does not get done"
    slot = shown.slot(run.addr >> PAGE_SHIFT, run.until)
    if slot is not None and run.writes * 2 > run.faults and slot.get("flags", 0) & READ_ONLY:
        return "read_only", f"writes to the read-only slot {slot['slot']}, {where}: each ends in KVM_EXIT_MMIO (6)"
    if run.marked * 2 > run.faults > 0:
        return (
            "mmio_uncached",
            f"emulated MMIO {where}, whose SPTE is made anew for each access; each ends in KVM_EXIT_MMIO (6)",
        )
    return "mmio", f"emulated MMIO {where}: each exit ends in KVM_EXIT_MMIO (6); {does}"


def _faults(run: RipRun, shown: ShownOfVm, kernel: Kernel | None, where: str) -> tuple[str, str]:
    slot = shown.slot(run.addr >> PAGE_SHIFT, run.until)
    served = run.installed + run.fixed
    if run.marked * 2 > run.faults:
        return "mmio_uncached", f"faults {where}, whose MMIO SPTE is made anew for each access"
    if shown.in_no_slot(run) and not served:
        if shown.none_of(run, "kvm_userspace_exit"):
            return (
                "mmio_in_kernel",
                f"faults {where}, which KVM emulates itself: a device of the kernel's, or an eventfd",
            )
        return "mmio", f"faults {where}: emulated MMIO, by KVM or by userspace: its exits are not in the recording"
    if slot is not None and run.writes * 2 > run.faults and slot.get("flags", 0) & READ_ONLY:
        return "read_only", f"writes to the read-only slot {slot['slot']}, {where}"
    if not served and not shown.none_of(run, "kvm_mmu_set_spte"):
        return "unexplained", f"not explained: faults {where}; whether anything is mapped for them is not recorded"
    if served * 2 >= run.faults:
        after = f", {run.notified:,} invalidations by MMU notifiers meanwhile" if run.notified else ""
        return "served_again", f"faults {where} that are served and come again{after}"
    if served * 100 >= run.faults or run.requested * 100 >= run.faults:
        return "unexplained", f"not explained: faults {where}, of which {served:,} of {run.faults:,} were served"
    if run.notified:
        return "invalidated", (
            f"faults {where} that are retried: {run.notified:,} invalidations by MMU notifiers go on meanwhile, and a "
            "fault that meets one begins again"
        )
    if not shown.knows_slots and run.reserved * 2 >= run.faults:
        return "mmio", f"faults {where}, on an SPTE with a reserved bit set, as those of emulated MMIO have"
    if run.reserved * 2 >= run.faults:
        return "reserved_bits", f"faults {where} on an SPTE with a reserved bit set, which nothing repairs"
    blind = [kind for kind in ("kvm_unmap_hva_range", "kvm_userspace_exit") if not shown.none_of(run, kind)]
    if kernel is not None and kernel.mmu_seq_int and not blind and shown.knows_slots:
        return "mmu_seq", (
            f"faults {where} that are always taken for stale and retried, with no invalidation meanwhile: so it goes "
            "after 2^31 invalidations on kernels whose mmu_seq is an int (5.17 to 6.2; 6.1.y before 6.1.50), as here"
        )
    each = (run.until - run.since) // max(run.exits - 1, 1)
    if each >= _SLOW:
        return "host_page", (
            f"faults {where} for which nothing is mapped, {duration(each)} each: they wait for the host's page "
            "(userfaultfd, swap, async faults)"
        )
    seen = f"{' and '.join(blind)} not recorded" if blind else "with no invalidation meanwhile"
    return "unexplained", f"not explained: faults {where} for which nothing is mapped, {seen}"


_BY_OTHERS: Final = ("served_again", "invalidated")
_WHO: Final = ("kvm_unmap_hva_range", "kvm_set_spte_hva", "zap_leafs", "kvm_mmu_zap_all_fast")
_TASKS: Final = 3
_SOON: Final = 256  # an invalidation that delays a run's faults may have begun up to this many rows before the run


def _invalidators(trace: Trace, vm: Mapping[str, Any], run: RipRun) -> str:
    """Name the tasks that invalidated mappings during the run or shortly before it, with the kinds of their rows.

    An MMU notifier that is in progress delays all faults in its range, so one that began earlier counts too.
    """
    found: dict[int, dict[str, None]] = {}
    since = max(run.seq - _SOON, 0)
    for row in _rows(trace, vm, since, min(run.last, since + _READ), _WHO):
        found.setdefault(row["tid"], {})[row["kind"]] = None
    names = VmNames(trace.metadata)
    return "; ".join(f"{names.task(tid)}: {', '.join(kinds)}" for tid, kinds in list(found.items())[:_TASKS])


_SLOW: Final = 1_000_000  # ns for an exit: longer than KVM's own handling takes


def _unbacked(shown: ShownOfVm, gfn: int, time: int) -> str:
    """Say what EFAULT means for the accessed page: it is in no memslot, or its slot has no host page for it."""
    slot = shown.slot(gfn, time)
    if slot is not None:
        return f": gfn {gfn:#x} of slot {slot['slot']} has no host page"
    return f": gfn {gfn:#x} " + ("is in no memslot" if shown.knows_slots else "has no host page")


def _evidence(trace: Trace, vm: Mapping[str, Any], run: RipRun) -> Iterator[str]:
    """Yield in words earlier changes of the faulting page's SPTE, then the rows of the run's last complete round."""
    comms = {
        int(each["tid"]): str(each.get("comm", ""))
        for each in trace.metadata.threads
        if isinstance(each.get("tid"), int)
    }
    history: list[dict[str, Any]] = []
    gfn = run.addr >> PAGE_SHIFT
    if run.faults:
        for row in _rows(trace, vm, run.seq, min(run.before, run.seq + _READ), _SPTES):
            if row["gfn"] is not None and row["gfn"] == gfn:
                history.append(row)
                if len(history) == _HISTORY:
                    break
    yield from (_told(row, run, comms) for row in history)
    shown = len(history)
    for row in _rows(trace, vm, run.before or run.seq, run.last):
        if row["vcpu"] == run.vcpu or row["kind"] in _HOST or (row["kind"] in _SPTES and row["gfn"] == gfn):
            yield _told(row, run, comms)
            shown += 1
            if shown == _ROWS:
                return


def _rows(
    trace: Trace, vm: Mapping[str, Any], first: int, last: int, kinds: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the VM's rows with numbers in [first, last] as dictionaries.

    If `kinds` are given, only rows of these kinds.
    """
    for batch in trace.batches(_COLUMNS, vm=int(vm["id"]), seqs=(first, last)):
        seq = batch.column("seq").to_numpy()
        low, high = np.searchsorted(seq, [first, last + 1])
        kind = batch.column("kind")
        wanted = [code for code, name in enumerate(kind.dictionary.to_pylist()) if not kinds or name in kinds]
        for at in (low + np.flatnonzero(np.isin(kind.indices.to_numpy()[low:high], wanted))).tolist():
            yield {name: batch.column(name)[at].as_py() for name in _COLUMNS}


def _told(row: Mapping[str, Any], run: RipRun, comms: Mapping[int, str]) -> str:
    """Describe a row in words."""
    words = [f"row {row['seq']:,}", f"+{duration(max(row['time'] - run.since, 0))}", str(row["kind"])]
    if row["kind"] == "kvm_userspace_exit":
        words.append(f"errno {-row['ret']}" if row["ret"] < 0 else f"{user_exit_name(row['code'])} ({row['code']})")
    else:
        words += [f"{name}={row[name]:#x}" for name in _HEX if row[name]]
    if row["vcpu"] is None:
        words.append(f"by {comms.get(row['tid'], '')}[{row['tid']}]")
    return " ".join(words)


def summed_up(found: Sequence[Diagnosis], who: Named = plainly) -> list[str]:
    """Return one sentence for each diagnosis.

    vCPUs that run without progress come first, the longest first. vCPUs that ended for the same reason share a
    sentence.
    """
    going = sorted((each for each in found if not each.ended), key=lambda each: each.since - each.until)
    sentences = [each.said(who) for each in going]
    for why, alike in groupby(sorted((each for each in found if each.ended), key=_alike), key=lambda each: each.why):
        them = list(alike)
        if len(them) == 1:
            sentences.append(them[0].said(who))
            continue
        vms = sorted({each.vm for each in them})
        whole = vms == list(range(vms[0], vms[-1] + 1)) and len(vms) > 2
        which = (
            f"{vms[0]} to {vms[-1]}" if whole else ", ".join(map(str, vms[:_VMS])) + ("..." if len(vms) > _VMS else "")
        )
        sentences.append(f"{len(them):,} vCPUs (VM{'s' if len(vms) > 1 else ''} {which}) end in {why}")
    return sentences


_VMS: Final = 8


def _alike(each: Diagnosis) -> tuple[str, int, int]:
    return each.why, each.vm, each.vcpu
