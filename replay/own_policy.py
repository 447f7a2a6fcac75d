# SPDX-License-Identifier: Apache-2.0
"""Check, VM by VM, that a replay under the recording's own policy gives the counts that the recorded rows show.

The rows are counted while they are decoded (`decode.row_counts`), the replay by the engine. If the model of the
recorded kernel is right, both give the same numbers; where they differ, no other prediction of the model for that VM
can be trusted. Most counts are read twice from the rows, from two kinds of event that do not depend on each other.

Counts that a recording cannot show are not compared: those whose events it lacks, and all counts of VMs that ran before
it began. Lost events widen a reading to an interval. A difference that begins after events were lost, or where the
recording lacks what a replay needs, is reported as undecided and not as an error of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Capabilities
from replay.decode.row_counts import RowCount, RowCounts
from replay.decode.vm_inputs import VmInputs
from replay.parting import Apart, first_rows
from replay.simulate.simulator import Simulator
from traces.text import events_lost, some

# By RowCount: what is counted, the event from which it is read in the rows, and the replay's counts that add up to it.
_READINGS: Final = {
    RowCount.CREATED: ("roots created", "root_get", ("creations",)),
    RowCount.GOT_ROOT: ("roots created", "kvm_mmu_get_page", ("creations",)),
    RowCount.FOUND: ("roots found", "root_get", ("reuses",)),
    RowCount.LOADED: ("roots loaded", "mmu_load", ("creations", "reuses")),
    RowCount.PUT: ("roots freed", "root_put", ("frees",)),
    RowCount.FREED: ("roots freed", "table_free", ("frees",)),
    RowCount.LINKED: ("tables built", "kvm_tdp_mmu_spte_changed", ("tables",)),
    RowCount.GOT_TABLE: ("tables built", "kvm_mmu_get_page", ("tables",)),
    RowCount.UNLINKED: ("tables removed", "kvm_tdp_mmu_spte_changed", ("tables_freed",)),
    RowCount.INSTALLED: ("leaf installs", "kvm_tdp_mmu_spte_changed", ("installs",)),
    RowCount.FIXED: ("permission faults", "fast_page_fault", ("fixes",)),
    RowCount.TRIED: ("permission faults", "kvm_page_fault", ("fixes",)),
    RowCount.SET: ("leaf installs and permission faults", "kvm_mmu_set_spte", ("installs", "fixes")),
    RowCount.REQUESTED: ("leaf installs and permission faults", "kvm_mmu_spte_requested", ("installs", "fixes")),
    RowCount.ZAPPED: ("leaf SPTEs zapped", "kvm_tdp_mmu_spte_changed", ("zapped",)),
}
_NO_CHANGES: Final = "no kvm_tdp_mmu_spte_changed is recorded"


class Agreement(Enum):
    """The result of comparing a VM's replay under its own policy with its rows."""

    AGREES = "agrees"
    DIFFERS = "differs"
    OPEN = "open"  # not compared, or the difference may come from the recording and not from the model


@dataclass(frozen=True)
class Reading:
    """One count, as read from the rows by one kind of event and as replayed.

    The rows allow `low` to `high`; `high` is None if they set no upper bound. `row` (trace row) and `time` (boot clock,
    ns) say where the replay and the rows agreed for the last time before they parted for good; both are None where they
    agree.
    """

    of: RowCount
    count: str
    event: str
    low: int
    high: int | None
    replayed: int
    row: int | None = None
    time: int | None = None

    @property
    def agrees(self) -> bool:
        return self.low <= self.replayed and (self.high is None or self.replayed <= self.high)

    @property
    def apart(self) -> int:
        """By how much the replayed count lies outside the interval that the rows allow; 0 if it lies inside."""
        return max(self.low - self.replayed, 0 if self.high is None else self.replayed - self.high, 0)

    @property
    def text(self) -> str:
        """The replayed count and what the rows allow, in words."""
        most = " or more" if self.high is None else "" if self.high == self.low else f" to {self.high:,}"
        return f"{self.count} {self.replayed:,} (its rows: {self.low:,}{most})"

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as it stands in JSON."""
        rows = self.low if self.high == self.low else [self.low, self.high]
        place = {} if self.agrees else {"from_row": self.row, "from_time": self.time}
        return {"count": self.count, "event": self.event, "rows": rows, "replayed": self.replayed, **place}


@dataclass(frozen=True)
class OwnPolicyCheck:
    """One VM's replay under the recording's own policy, compared with its rows.

    `why` is the reason if the comparison decides nothing, else empty. `unseen` are pairs of a count that the recording
    cannot show and the reason.
    """

    vm: int
    policy: str
    readings: tuple[Reading, ...]
    why: str = ""
    unseen: tuple[tuple[str, str], ...] = ()

    @property
    def differences(self) -> tuple[Reading, ...]:
        """The readings that differ.

        If several events show the same count, only the first of them in the order of `RowCount`.
        """
        found = [reading for reading in self.readings if not reading.agrees]
        return tuple({reading.count: reading for reading in reversed(found)}.values())[::-1]

    def apart(self, open_: Collection[str]) -> int:
        """Return the largest difference between replay and rows, ignoring
        counts in `open_`, which are undetermined anyway.
        """
        decided = [reading for reading in self.readings if not {*_READINGS[reading.of][2]} & {*open_}]
        return max((reading.apart for reading in decided), default=0)

    @property
    def agreement(self) -> Agreement:
        if self.why:
            return Agreement.OPEN
        return Agreement.DIFFERS if self.differences else Agreement.AGREES

    @property
    def row(self) -> int | None:
        """The earliest trace row at which a count differs for good; None if all agree or the row is unknown."""
        return min((r.row for r in self.readings if r.row is not None), default=None)

    @property
    def text(self) -> str:
        """The result as one line of text; empty if replay and rows agree."""
        if self.agreement is Agreement.AGREES:
            return ""
        if not self.differences:
            return f"VM {self.vm}: not compared with its rows: {self.why}"
        differ = some([reading.text for reading in self.differences])
        place = f", from row {self.row:,} on" if self.row is not None else ""
        open_ = f" (not decided: {self.why})" if self.why else ""
        return f"VM {self.vm}, replayed under {self.policy}: {differ}{place}{open_}"

    def to_dict(self) -> dict[str, Any]:
        """Return the check as it stands in JSON."""
        return {
            "vm": self.vm,
            "policy": self.policy,
            "agreement": self.agreement.value,
            "text": self.text,
            "why": self.why,
            "from_row": self.row,
            "differences": len(self.differences),
            "counts": [reading.to_dict() for reading in self.readings],
            "not_observable": [{"count": name, "why": why} for name, why in self.unseen],
        }


def untrusted(checks: Sequence[OwnPolicyCheck]) -> list[str]:
    """Return one warning line for each VM whose replay differs from its rows."""
    differ = [check.text for check in checks if check.agreement is Agreement.DIFFERS]
    return told(differ, len(checks))


def told(differ: Sequence[str], vms: int) -> list[str]:
    """Return the warning lines for the VMs whose differences are described in `differ`, out of `vms` VMs in all."""
    if not differ:
        return []
    where = f" in {len(differ):,} of {vms:,} VMs" if vms > 1 else ""
    what = f"UNTRUSTED: the replay under the recording's own policy is not what its rows show{where}"
    return [f"{what}: {differ[0]}", *differ[1:]]


def to_dict(checks: Sequence[OwnPolicyCheck]) -> dict[str, Any]:
    """Return the checks as they stand in JSON. `agrees` is null if no VM differs but some VM could not be decided."""
    found = {check.agreement for check in checks}
    agrees = False if Agreement.DIFFERS in found else True if found == {Agreement.AGREES} else None
    return {"agrees": agrees, "vms": [check.to_dict() for check in checks]}


def compare(
    capabilities: Capabilities, vm: Mapping[str, Any], inputs: VmInputs, rows: RowCounts, own: Simulator
) -> OwnPolicyCheck:
    """Compare the finished replay of one VM under its own policy with its
    rows, which were counted while they were decoded.
    """
    used, unseen = _used(capabilities, rows.counts)
    replayed = _counts(own)
    readings = tuple(_readings(capabilities, used, rows, replayed, ended=inputs.decoder.ended))
    check = OwnPolicyCheck(int(vm["id"]), capabilities.own.name, readings, unseen=unseen)
    if vm.get("origin") != "created":
        return replace(check, why="it was running before the recording began")
    if not check.differences:
        return replace(check, why=_unjudged(capabilities, vm))
    apart = [_apart(reading, int(rows.counts[reading.of])) for reading in readings if not reading.agrees]
    places = first_rows(capabilities, vm, apart)
    placed = []
    for reading in readings:
        row, time = places.get(reading.of, (None, None))
        placed.append(replace(reading, row=row, time=time))
    check = replace(check, readings=tuple(placed))
    return replace(check, why=_doubt(capabilities, vm, inputs, check))


def _unjudged(capabilities: Capabilities, vm: Mapping[str, Any]) -> str:
    """Say why equal counts prove nothing; empty if they do prove that the model is right."""
    meta = capabilities.trace.metadata
    first, last = meta.spans.get(int(vm["id"]), meta.span)
    over = [each for each in meta.left_out if each["since"] <= last and (each["until"] or last) >= first]
    return "the recorder left out kinds of event in its time, so that recording cost less" if over else ""


def _counts(own: Simulator) -> dict[str, int]:
    """Return the totals of a replay under the names of `engine.CHANGES`."""
    vcpus, counters = own.vcpus, own.counters
    of_vcpus = {name: int(getattr(vcpus, name).sum()) for name in ("creations", "reuses", "fixes", "faults")}
    return {**vars(counters), **of_vcpus, "installs": of_vcpus["faults"] + counters.prefetched}


def _used(capabilities: Capabilities, counts: NDArray[np.int64]) -> tuple[list[RowCount], tuple[tuple[str, str], ...]]:
    """Return the readings that a VM's rows allow, and the counts that its rows cannot show, each with the reason."""
    kernel, kinds = capabilities.kernel, capabilities.trace.metadata.kinds
    tdp = not capabilities.shadow
    changes = bool(tdp and kernel.spte_changed and kernel.spte.present and kinds.get("kvm_tdp_mmu_spte_changed"))
    loads = kinds.get("root_get") or kinds.get("mmu_load")
    # A mapped leaf implies tables, and a freed root implies zapped leaves and tables. If the rows have the former and
    # none of the latter, these rows do not show them: 5.10 does not, nor does `kvmtrace synth` without --zap-rows.
    tables = counts[RowCount.GOT_TABLE] > 0 or not counts[RowCount.SET]
    links = changes and (counts[RowCount.LINKED] > 0 or not counts[RowCount.SET])
    zaps = changes and (counts[RowCount.ZAPPED] + counts[RowCount.UNLINKED] > 0 or not counts[RowCount.PUT])
    allowed = {
        RowCount.CREATED: loads,
        RowCount.FOUND: loads,
        RowCount.GOT_ROOT: kinds.get("kvm_mmu_get_page") and (kernel.root_get_page or not tdp),
        RowCount.LOADED: kinds.get("root_get") and kinds.get("mmu_load"),
        RowCount.PUT: kinds.get("root_put"),
        RowCount.FREED: tdp and kinds.get("table_free"),
        RowCount.GOT_TABLE: tables and kinds.get("kvm_mmu_get_page"),
        RowCount.LINKED: links,
        RowCount.INSTALLED: changes,
        RowCount.FIXED: changes,
        RowCount.TRIED: changes and kernel.fast and kinds.get("fast_page_fault"),
        RowCount.SET: not changes,
        # A fault that holds mmu_lock for read may lose a race and request its mapping a second time.
        RowCount.REQUESTED: not changes and tdp and not kernel.faults_share and kinds.get("kvm_mmu_spte_requested"),
        RowCount.UNLINKED: zaps,
        RowCount.ZAPPED: zaps,
    }
    used = [of for of in RowCount if allowed[of]]
    shown = {_READINGS[of][0] for of in used}
    apart = "leaf installs and permission faults"
    unseen = {_READINGS[of][0]: f"no {_READINGS[of][1]} shows it" for of in RowCount if _READINGS[of][0] not in shown}
    if changes:
        del unseen[apart]
    else:
        unseen |= dict.fromkeys(("leaf installs", "permission faults"), f"only both together: {_NO_CHANGES}")
    return used, tuple(unseen.items())


def _readings(
    capabilities: Capabilities, used: list[RowCount], rows: RowCounts, replayed: Mapping[str, int], *, ended: bool
) -> Iterator[Reading]:
    meta = capabilities.trace.metadata
    seen = {of: int(rows.counts[of]) for of in used}
    # A root without references is zapped and freed some time later, by a worker or by RCU.
    waiting = not ended and seen.get(RowCount.PUT, 1) > seen.get(RowCount.FREED, 0)
    for of in used:
        name, event, parts = _READINGS[of]
        event = event if of not in (RowCount.CREATED, RowCount.FOUND) or meta.kinds.get("root_get") else "mmu_load"
        low = seen[of]
        high: int | None = low
        match of:
            case RowCount.FREED:
                high = max(low, seen[RowCount.PUT]) if RowCount.PUT in seen else low if ended else None
            case RowCount.GOT_TABLE:
                low = min(low - rows.late_tables, seen.get(RowCount.LINKED, low))
            case RowCount.SET | RowCount.REQUESTED:
                low -= rows.late_sets
            case RowCount.ZAPPED:
                high = None if waiting else low + rows.mmio
                if ended and not waiting and not rows.replaced and not meta.lost:
                    low += rows.mmio  # the VM has ended, so every MMIO SPTE was zapped as well
            case RowCount.UNLINKED:
                high = None if waiting else low
        if high is not None:
            high += meta.lost_of(event) if event in meta.loss else 0
        if meta.left_out_of(event):
            high = None
        yield Reading(of, name, event, low, high, sum(replayed[part] for part in parts))


def _apart(reading: Reading, seen: int) -> Apart:
    most = None if reading.high is None else reading.high - seen
    return Apart(reading.of, _READINGS[reading.of][2], reading.low - seen, most)


def _doubt(capabilities: Capabilities, vm: Mapping[str, Any], inputs: VmInputs, check: OwnPolicyCheck) -> str:
    """Say why a difference may come from the recording and not from the model; empty if there is no such reason."""
    meta = capabilities.trace.metadata
    lines = [line for line in capabilities.missing if line]
    if meta.lost and meta.gaps:
        since = min(int(gap["since"]) for gap in meta.gaps)
        lines = [line for line in lines if line != meta.lost_text]
        times = [reading.time for reading in check.differences if reading.time is not None]
        if not times or min(times) >= since:
            lines.append(f"{events_lost(meta.lost)}, and it begins after the first of them")
    if vm.get("slots_omitted"):
        lines.append("not all its memslots are known")
    if inputs.decoder.nested:
        lines.append(f"{inputs.decoder.nested:,} entries of nested guests, whose roots are not replayed")
    return "; ".join(lines[:2])
