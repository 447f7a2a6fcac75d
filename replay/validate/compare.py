# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace validate`: compare what the recorded kernel did with what the model of that kernel does, event by event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from replay.validate import expect, shadow_driver
from replay.validate.misbooked import notifiers_of_others
from replay.validate.row_tuples import RowTuple, rows_of
from replay.validate.steps.direct_shadow import ShadowSteps
from replay.validate.steps.kernel_steps import KernelSteps
from replay.validate.tdp_driver import ConformanceCheck
from replay.validate.threads import RESPONSES, Divergence, MatchTally
from traces import kernels
from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.kernels import Kernel
from traces.kernels.policies import POLICIES, PolicyParameters
from traces.kernels.vendors import OFF
from traces.metadata import Metadata
from traces.reader import Trace
from traces.text import count
from traces.untrusted import count_at, object_at
from traces.vm_names import VmNames

# The kinds of event that a recording must have, so that the model knows when root slots are filled and emptied.
_NEEDED: Final = {
    "tdp": ("kvm_mmu_get_page", "kvm_mmu_set_spte", "kvm_page_fault", "mmu_load", "mmu_free_roots", "root_put"),
    "shadow": ("kvm_mmu_get_page", "kvm_mmu_set_spte", "kvm_page_fault", "mmu_load", "mmu_free_roots"),
    "paged": ("kvm_mmu_get_page", "kvm_mmu_prepare_zap_page"),
}
_ZAPS: Final = ("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page", "zap_root_begin", "zap_root_end")
_DESTRUCTION: Final = 10**9  # ns for which a recording waits for RCU to free the tables of a VM that is gone
_STEP: Final = 1 << 14  # rows between two updates of the progress display


@dataclass(frozen=True)
class VmReport:
    """The result of one VM.

    `left` counts removed tables that were never freed, and roots that were still alive at the end.
    """

    vm: int
    tallies: Mapping[str, MatchTally]
    first: Divergence | None
    left: int
    inferred: int
    role_words_taken: int
    skipped: str = ""  # why the VM was not validated; empty if it was
    until: str = ""  # why the VM was validated only up to some point; empty if to its end
    taken: Mapping[str, int] = field(default_factory=dict)  # numbers of facts taken from the recording, not predicted
    not_modelled: Mapping[str, int] = field(default_factory=dict)  # by kind: responses of nested guests' own paging
    stopped: str = ""  # why rows from some moment on were not compared; empty if all were
    mistaken: int = 0  # rows with a root of the wrong address space, whose root was not compared


@dataclass(frozen=True)
class ConformanceReport:
    """The result of validating a recording."""

    path: Path
    kernel: str
    policy: str
    vms: list[VmReport]
    notes: list[str] = field(default_factory=list)
    policy_by: str = ""  # how the policy was determined; empty if the user named it
    part: bool = False  # only rows from some moment on were compared
    names: VmNames | None = None

    @property
    def tallies(self) -> dict[str, MatchTally]:
        """The tallies of all VMs together, by kind of response, the most frequent first."""
        total: dict[str, MatchTally] = {}
        for vm in self.vms:
            for kind, tally in vm.tallies.items():
                sum_ = total.setdefault(kind, MatchTally())
                sum_.matched += tally.matched
                sum_.mismatched += tally.mismatched
                sum_.missing += tally.missing
        return dict(sorted(total.items(), key=lambda item: -item[1].matched))

    @property
    def expected(self) -> int:
        """The number of responses recorded, plus the number of predicted ones that are missing."""
        return sum(t.matched + t.mismatched + t.missing for t in self.tallies.values())

    @property
    def matched(self) -> int:
        return sum(t.matched for t in self.tallies.values())

    @property
    def not_modelled(self) -> dict[str, int]:
        """The responses of nested guests' own paging in all VMs, by kind; they are in no other count."""
        return dict(sum((Counter(vm.not_modelled) for vm in self.vms), Counter()).most_common())

    @property
    def left(self) -> int:
        return sum(vm.left for vm in self.vms)

    @property
    def complete(self) -> bool:
        """Whether every VM was validated from its creation to its end."""
        return not self.part and not any(vm.skipped or vm.until for vm in self.vms)

    @property
    def stopped(self) -> str:
        """Why recorded responses were not compared from some moment on; empty if all were."""
        return next((vm.stopped for vm in self.vms if vm.stopped), "")

    @property
    def holds(self) -> bool:
        """Whether every response was as predicted, and nothing was left at a VM's end."""
        return self.matched == self.expected and not self.left


def validate(
    recording: Path | Trace, policy: str = "", recorded_policy: str = "", since: int | None = None
) -> ConformanceReport:
    """Compare a recording, row by row, with the model of its kernel under its own policy (or `policy`).

    `recorded_policy` is passed to `Trace.open`. Rows before `since` (boot clock, ns) give the state from which the
    comparison starts, and are not compared themselves. Raises Problem if nothing can be validated.
    """
    trace = recording if isinstance(recording, Trace) else Trace.open(recording, recorded_policy)
    path, meta = trace.path, trace.metadata
    policy_by = "" if policy else meta.policy_by
    policy = policy or meta.policy
    kernel = _kernel(path, meta)
    if kernel is None or policy not in POLICIES:
        what = f"kernel {meta.kernel or 'unknown'}, root policy {policy or 'unknown'}"
        raise Problem(f"{path}: cannot be validated: {what}; record it with `kvmtrace record` on 5.10 or later")
    parameters = kernel.parameters(policy)
    unseen = _unseen(meta)
    follows = shadow_driver.is_paged(meta) and parameters.mmu == "shadow"
    needed = _NEEDED["paged" if follows else parameters.mmu]
    needed += _ZAPS if parameters.mmu == "tdp" and kernel.spte_changed else ()
    lacking = [kind for kind in needed if kind in unseen]
    if lacking:
        why = unseen[lacking[0]] or "its probe did not attach"
        raise Problem(f"{path}: cannot be validated: {', '.join(lacking)} not recorded ({why})")
    vms = [_vm(trace, vm, None if follows else parameters, kernel, since) for vm in meta.vms]
    blind = shadow_driver.blind(meta) if follows else [kind for kind in unseen if kind in RESPONSES]
    names = VmNames(meta)
    notes = [*_notes(blind, vms, names), *_misbooked(trace, vms)]
    if skipped := sum(meta.missed.values()):
        notes.insert(0, f"the kernel skipped {skipped:,} runs of probes: events nobody saw, which may be what differs")
    if newer := kernels.newer_than_known(kernel.version):
        notes.insert(0, f"kernel {meta.kernel} is {newer}")
    if since is not None:
        notes.insert(0, "rows before --from are not compared: they give the state that later ones start from")
    report = ConformanceReport(path, meta.kernel, policy, vms, notes, policy_by, since is not None, names)
    if not report.expected:
        whys = [f"{names.vm(vm.vm)}: {why}" for vm in vms for why in (vm.skipped, vm.until) if why]
        idle = "no vCPU of its VMs ran" if since is None else "the MMU did nothing from then on"
        why = whys[0] if whys else idle if meta.vms else "it has no VM"
        raise Problem(f"{path}: cannot be validated: {why}")
    return report


def _kernel(path: Path, meta: Metadata) -> Kernel | None:
    """Return the recorded kernel, or None if the trace does not say it or it is too old."""
    try:
        return kernels.recorded(meta)
    except Problem as problem:
        if "kernel" in meta.raw:
            raise Problem(f"{path}: {problem}") from None
        return None


def machine_of(kernel: Kernel, parameters: PolicyParameters, modules: Any = None) -> KernelSteps:
    """Return a model of one VM of a recording, without any roots.

    `modules` has the parameters of KVM's modules if known.
    """
    layout = kernel.layout
    modules = modules if isinstance(modules, Mapping) else {}

    def on(module: str, parameter: str, otherwise: bool) -> bool:
        found = modules.get(module)
        return found.get(parameter) not in OFF if isinstance(found, Mapping) and parameter in found else otherwise

    return (ShadowSteps if parameters.mmu == "shadow" else KernelSteps)(
        parameters=parameters,
        kernel=kernel,
        nothing=expect.word("nothing", kernel.spte.nonpresent),
        frozen=expect.word("frozen", kernel.spte.frozen),
        invalid_bit=layout.invalid,
        smm_bit=layout.smm,
        wp_bit=layout.wp if layout.guest_bits else 0,
        nx_bit=layout.nx if layout.guest_bits else 0,
        guest_mode_bit=layout.mask("guest_mode"),
        direct_bit=layout.mask("direct"),
        eager_split=on("kvm", "eager_page_split", True),
        pml=on("kvm_intel", "pml", False) and on("kvm_intel", "eptad", True),
    )


def _vm(
    trace: Trace, vm: Mapping[str, Any], parameters: PolicyParameters | None, kernel: Kernel, since: int | None
) -> VmReport:
    """Validate one VM, comparing rows from `since` on.

    `parameters` is None if the VM's roots follow the guest's page tables.
    """
    number = int(vm["id"])
    if vm["origin"] != "created":
        why = "it was running before the recording began: what it had mapped is not known"
        return VmReport(number, {}, None, 0, 0, 0, skipped=why)
    cut, why_cut = _cut(trace.metadata)
    rows = _UntilCut(rows_of(trace, number), cut)
    check: ConformanceCheck | shadow_driver.Paged
    if parameters is None:
        check = shadow_driver.paged_of(trace, number, kernel)
    else:
        check = ConformanceCheck(machine_of(kernel, parameters, trace.metadata.raw.get("modules")))
    with Progress(f"validating VM {number}, rows") as progress:
        check.run(_counted(rows if since is None else _compared_from(since, rows, check.forget), progress))
    left, stopped = 0, why_cut if rows.stopped else ""
    until = stopped
    if not until and not check.ended:  # the recording ended first: threads are still in the middle of activities
        until = "the VM was not destroyed in the recording; what it would leave is not known"
    elif not until:
        left = check.left("table_free" in trace.metadata.kinds)
        if left and _being_destroyed(trace.metadata, number):
            left, until = 0, "the dump was made as the VM was being destroyed; what it left is not known"
        else:
            check.finish()
    found = VmReport(number, check.tallies, check.first, left, 0, 0, until=until, stopped=stopped)
    if isinstance(check, shadow_driver.Paged):
        return replace(found, taken=check.taken)
    machine = check.machine
    found = replace(found, inferred=machine.inferred, role_words_taken=machine.role_words_taken)
    return replace(found, taken=machine.taken, mistaken=check.mistaken, not_modelled=dict(check.nested.rows))


def _compared_from(since: int, rows: Iterable[RowTuple], forget: Callable[[], None]) -> Iterator[RowTuple]:
    """Yield the rows, and call `forget`, which drops all results, before the first row at or after `since`."""
    before = True
    for row in rows:
        if before and row.time >= since:
            forget()
            before = False
        yield row
    if before:
        forget()


class _UntilCut:
    """The rows before the first moment at which rows may be lacking: after it,
    the recorder may be the cause of a divergence.
    """

    def __init__(self, rows: Iterator[RowTuple], until: int | None) -> None:
        self._rows = rows
        self._until = until
        self.stopped = False

    def __iter__(self) -> Iterator[RowTuple]:
        for row in self._rows:
            if self._until is not None and row.time >= self._until:
                self.stopped = True
                return
            yield row


def _counted(rows: Iterable[RowTuple], progress: Progress) -> Iterator[RowTuple]:
    for number, row in enumerate(rows):
        if not number % _STEP:
            progress.at(number)
        yield row


def _cut(meta: Metadata) -> tuple[int | None, str]:
    """Return the moment (boot clock, ns) from which events may be lacking,
    or None, and why nothing after it is validated.
    """
    lost = [int(gap["since"]) for gap in meta.gaps]
    if count_at(object_at(meta.raw, "cut"), "rows_missing") or (meta.lost and not lost):
        lost = [0]
    left_out = [int(each["since"]) for each in meta.left_out]
    first = min([*lost, *left_out], default=None)
    if lost and first in lost:
        return first, "events were lost; validated up to the first loss"
    return first, "the recorder left out kinds of event, to cost less; validated up to there"


def _being_destroyed(meta: Metadata, vm: int) -> bool:
    """Return whether a dump ends within a second of the VM's last row, so
    that tables may have been freed after its end.
    """
    ends = object_at(meta.raw, "flight").get("ends")
    return isinstance(ends, int) and vm in meta.spans and ends - meta.spans[vm][1] < _DESTRUCTION


def _unseen(meta: Metadata) -> dict[str, str]:
    """Return the kinds of event that no probe watched, each with the reason."""
    return {
        str(probe.get("kind")): str(probe.get("why", ""))
        for probe in meta.probes
        if probe.get("how") == "none" and probe.get("kind") not in meta.kinds
    }


def _misbooked(trace: Trace, vms: list[VmReport]) -> Iterator[str]:
    """Yield notes on processes with several VMs, one of which diverges, if rows of one VM are recorded as another's."""
    differing = {vm.vm for vm in vms if vm.first is not None}
    by_process: dict[int, list[int]] = {}
    for vm in trace.metadata.vms:
        by_process.setdefault(int(vm.get("pid") or 0), []).append(int(vm["id"]))
    for process, numbers in by_process.items():
        if process and len(numbers) > 1 and differing & set(numbers):
            yield from notifiers_of_others({number: rows_of(trace, number) for number in numbers})


def _notes(blind: Iterable[str], vms: list[VmReport], names: VmNames) -> list[str]:
    notes = []
    if blind := sorted(blind):
        notes.append(f"not observable in this recording, hence not compared: {', '.join(blind)}")
    for what in dict.fromkeys(what for vm in vms for what in vm.taken):
        notes.append(f"taken from the recording, not predicted: {sum(vm.taken.get(what, 0) for vm in vms):,} {what}")
    mistaken = sum(vm.mistaken for vm in vms)
    if mistaken:
        notes.append(
            f"{count(mistaken, 'SPTE change')} of one address space booked to a root of the other, by a recorder of "
            "before 26 November 2026: the root was not compared"
        )
    inferred = sum(vm.inferred for vm in vms)
    if inferred:
        notes.append(
            f"{count(inferred, 'removal')} inferred: this kernel shows no notifier, and faulted on pages which the "
            "model still held"
        )
    taken = sum(vm.role_words_taken for vm in vms)
    if taken:
        notes.append(
            f"{count(taken, 'load')} with the role word taken from the recording, not predicted: the first of each VM, "
            "and those after a write of CR0 or EFER whose value was not recorded"
        )
    by_why: dict[str, list[int]] = {}
    for vm in vms:
        for why in filter(None, (vm.skipped, vm.until)):
            by_why.setdefault(why, []).append(vm.vm)
    return [*notes, *(f"{names.vms(ids)}: {why}" for why, ids in by_why.items())]
