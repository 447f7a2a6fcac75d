# SPDX-License-Identifier: Apache-2.0
"""What a trace can show: the recorded kernel, the kinds of event that
were observed, and what is missing for a replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from typing import Any, Final

from replay.decode.spans.suspends import Suspend, suspends
from traces import kernels, source_notes
from traces.errors import Problem
from traces.kernels import roles
from traces.kernels.policies import POLICIES
from traces.kernels.vendors import OFF, VENDORS, VMX
from traces.reader import Trace
from traces.text import count
from traces.untrusted import count_at, object_at

LEFT_OUT: Final = "the recorder left out"  # begins the line in `missing` about kinds that were left out to save time
_NEEDED: Final = {
    "kvm_mmu_set_spte": "leaf installs",
    "kvm_page_fault": "page faults",
}
_LOADS: Final = ("root_get", "mmu_load", "kvm_entry")  # loads of roots are known if the trace has one of these kinds
# By kind of event: what a result lacks if the kind was not recorded.
_WANTED: Final = {
    "kvm_entry": "entries into the guest are not recorded: times are not known (--events time has them)",
    "kvm_exit": "exits are not recorded: times are not known, nor what resets were for (--events time has them)",
    "kvm_smm_transition": "SMIs are not recorded: unloads for them are missing",
    "mmu_reset": "resets are not recorded: unloads are those of SMIs, and of registers whose values are known",
    "memslot": "memslot changes are not recorded",
    "kvm_mmu_zap_all_fast": "invalidations are not recorded",
    "vm_destroy": "the end of VMs is not recorded: their last roots are not freed",
}
_RETURNS: Final = ("kvm_userspace_exit", "kvm_exit")  # kinds after which a vCPU's MMU context may have been reset
_UNLOADING: Final = {"kvm_smm_transition": "SMIs", "kvm_mmu_zap_all_fast": "invalidations"}
_SEEN: Final = ("kvm_entry", "kvm_page_fault", "mmu_load")  # without rows of any of these, no vCPU did anything


class Capabilities:
    """A trace that can be replayed, with what it shows.

    Raises Problem (bad input) for a trace that cannot be replayed.
    """

    def __init__(self, trace: Trace) -> None:
        meta = trace.metadata
        path = trace.path
        if not meta.events or not meta.vms:
            raise Problem(f"{path}: there is {'no event' if not meta.events else 'no VM'} in it: nothing to replay")
        trace.check_span()
        try:
            self.kernel = kernels.recorded(meta)
            if self.kernel.policy not in POLICIES:
                found = meta.policy or "none given"
                raise Problem(f"the recorder could not tell this kernel's root policy ({found})")
            self.own = self.kernel.parameters()
            # Other policies that the kernel may have had, if the trace does not decide between them.
            self.own_or = tuple(map(self.kernel.parameters, source_notes.other_policies(meta)))
        except Problem as problem:
            raise Problem(f"{path}: {problem}") from None
        self.trace = trace
        if any(self.off(vendor.module, vendor.paging) for vendor in VENDORS):
            raise Problem(
                f"{path}: nested paging was off: roots then follow the guest's page tables, which replay has not"
            )
        known = {str(probe.get("kind")) for probe in meta.probes if probe.get("how") != "none"}
        self.kinds = frozenset(known | {kind for kind, rows in meta.kinds.items() if rows})
        lacking = [what for kind, what in _NEEDED.items() if kind not in self.kinds]
        if not any(kind in self.kinds and not source_notes.lacks(meta.probes, kind, "root") for kind in _LOADS):
            lacking.append("loads of roots")
        if lacking:
            where = "in its source" if source_notes.imported(meta.raw) else "recorded (--events mmu has them)"
            raise Problem(f"{path}: {', '.join(lacking)} are not {where}: nothing to replay")
        if not any(meta.kinds.get(kind) for kind in _SEEN):
            raise Problem(
                f"{path}: no entry into a guest, no fault and no load of a root is in it (this kernel shows none of "
                "them for these guests): nothing to replay"
            )
        # The tids of kernel workers, which zap roots on behalf of VMs.
        self.workers = frozenset(_workers(meta.threads))
        self.intel = self.kernel.vendor is VMX
        self.hides_wp = self.intel and self.kernel.guest_owns_wp  # with nested paging, which is on (checked above)
        self.shadow = self.own.mmu == "shadow"
        # 5.10 shows neither notifiers nor SPTE changes, so removals by the host can only be inferred. The same holds
        # for an import without memslots, since they are needed to translate host addresses into guest frames.
        placed = any(slot.get("hva") for vm in meta.vms for slot in vm["slots"])
        self.imported = source_notes.imported(meta.raw)
        unplaced = self.imported and not placed
        # A text does not print CR0.WP and EFER.NX, which old kernels have in role words. So it is not known which vCPUs
        # share a root.
        self.open_roles = source_notes.from_text(meta.raw) and self.kernel.layout.guest_bits
        self.infers = "kvm_unmap_hva_range" not in self.kinds or unplaced
        # Whether a vCPU may have unloaded its roots without a row that shows it, and the reasons why nothing bounds how
        # often.
        shown = meta.kinds.get("root_get") or meta.kinds.get("mmu_load")
        self.open_resets = "mmu_reset" not in self.kinds and not shown
        self.unbounded = tuple(self._unbounded(trace))
        self.missing = tuple(self._missing(trace))

    @cached_property
    def suspends(self) -> tuple[Suspend, ...]:
        """When the host was suspended."""
        return suspends(self.trace)

    @cached_property
    def ad_disabled(self) -> bool:
        """Whether the recorded kernel did not use accessed and dirty bits: a bit in every root's role word."""
        if known := [int(root["role"]) for root in self.trace.metadata.uncreated_roots if root["role"]]:
            return roles.has_ad_disabled(known[0])
        for batch in self.trace.batches(["root", "role"], size=1 << 12):
            root, role = (batch.column(name).to_numpy() for name in ("root", "role"))
            found = role[(root > 0) & (role > 0)]
            if len(found):
                return roles.has_ad_disabled(int(found[0]))
        return False

    def reopened(self) -> Capabilities:
        """Return a copy with a reader of its own, for use in another thread."""
        self.ad_disabled, self.suspends  # noqa: B018  (compute them once, not once in each thread)
        own = copy(self)
        own.trace = self.trace.reopened()
        return own

    def has(self, kind: str) -> bool:
        """Return whether a kind of event was observed."""
        return kind in self.kinds

    def of_vm(self, vm: Mapping[str, Any]) -> list[str]:
        """Return what is missing for the replay of one VM, one line each."""
        lines = []
        if vm.get("origin") != "created":
            lines.append(f"VM {vm['id']} was running before: what it had mapped then is not known")
        if omitted := count_at(vm, "slots_omitted"):
            lines.append(f"VM {vm['id']}: {omitted:,} memslot entries are not in the metadata")
        if vm.get("until") is None and self.has("vm_destroy"):
            lines.append(f"VM {vm['id']} was still running at the end: its last roots are not freed")
        return lines

    def _unbounded(self, trace: Trace) -> Iterator[str]:
        """Yield the reasons why there may have been more unloads than any number that the rows give."""
        unseen = [kind for kind in _RETURNS if kind not in self.kinds]
        if self.open_resets and unseen:
            yield f"neither resets nor {' and '.join(unseen)} are in it"
        for kind, what in _UNLOADING.items():
            if kind not in self.kinds:
                yield f"{what} are not in it"
        if trace.metadata.left_out:
            yield "kinds of event were left out at times, so that recording cost less"
        if self.imported and (trace.metadata.gap_count or source_notes.overrun(trace.metadata.raw)):
            yield "events were lost, of which kinds is not known"

    def _missing(self, trace: Trace) -> list[str]:
        meta = trace.metadata
        lines = [*source_notes.notes(meta.raw), *(line for line in meta.discrepancies if line)]
        if meta.lost:
            lines.append(meta.lost_text)
        if meta.left_out:
            since, until = meta.left_out[0]["since"], meta.left_out[-1]["until"]
            kinds = sorted({kind for each in meta.left_out for kind in each["kinds"]})
            ended = "the end" if until is None else f"{until / 1e9:.3f} s"
            lines.append(
                f"{LEFT_OUT} {count(len(kinds), 'kind')} of event, to cost less, at times between {since / 1e9:.3f} s "
                f"and {ended} of boot time: what happened then is not known"
            )
        if not meta.complete and not lines:
            lines.append("the recording is not complete")
        if rows := count_at(object_at(meta.raw, "cut"), "rows_missing"):
            lines.append(f"{rows:,} rows are missing: segments were damaged")
        if skipped := sum(meta.missed.values()):
            lines.append(f"the kernel skipped {skipped:,} runs of probes: events nobody saw")
        return lines + [line for kind, line in _WANTED.items() if kind not in self.kinds]

    def off(self, module: str, name: str) -> bool:
        """Return whether the trace says that a parameter of a module was off."""
        modules = self.trace.metadata.raw.get("modules")
        values = modules.get(module) if isinstance(modules, dict) else None
        return isinstance(values, dict) and str(values.get(name, "")) in OFF


def _workers(threads: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    for thread in threads:
        tid = thread.get("tid")
        if str(thread.get("comm", "")).startswith("kworker") and isinstance(tid, int) and 0 <= tid < 1 << 31:
            yield tid
