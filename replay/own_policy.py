# SPDX-License-Identifier: Apache-2.0
"""Whether a replay under the recording's own policy gives what the recording's rows show, VM by VM.

The rows are counted while they are decoded (`decode.row_counts`), the replay by the engine; a model that is right about
the recorded kernel gives the same numbers, so that nothing else that it says is to be believed where it does not.
Most counts have two readings, by events that do not depend on each other.

What a recording cannot show is not compared: kinds of event that it has not, VMs that ran before it began. Lost events
widen a reading to an interval; and a difference that begins after something was lost, or where the recording lacks
what a replay needs, is no verdict on the policy.
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

# RowCount -> what it is a count of, the event that it is read from, and which of the replay's counts make it.
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
    """How a VM's replay under its own policy and its rows compare."""

    AGREES = "agrees"
    DIFFERS = "differs"
    OPEN = "open"  # not compared, or the recording has a reason of its own to differ


@dataclass(frozen=True)
class Reading:
    """One count by one kind of event. `high` is None where there is no upper end.

    `row` and `time` (boot ns) are those of the first row after which the replay and the rows never agreed again; None
    where they agree.
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
        """How far the replay is from what the rows allow."""
        return max(self.low - self.replayed, 0 if self.high is None else self.replayed - self.high, 0)

    @property
    def text(self) -> str:
        """The difference in words."""
        most = " or more" if self.high is None else "" if self.high == self.low else f" to {self.high:,}"
        return f"{self.count} {self.replayed:,} (its rows: {self.low:,}{most})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = self.low if self.high == self.low else [self.low, self.high]
        place = {} if self.agrees else {"from_row": self.row, "from_time": self.time}
        return {"count": self.count, "event": self.event, "rows": rows, "replayed": self.replayed, **place}


@dataclass(frozen=True)
class OwnPolicyCheck:
    """One VM's replay under the recording's own policy, compared with its rows.

    `why`: the reason why nothing is decided, where that is so. `unseen`: counts that the recording cannot show, with
    the reason.
    """

    vm: int
    policy: str
    readings: tuple[Reading, ...]
    why: str = ""
    unseen: tuple[tuple[str, str], ...] = ()

    @property
    def differences(self) -> tuple[Reading, ...]:
        """Where they differ: each count once, by the event that shows it first."""
        found = [reading for reading in self.readings if not reading.agrees]
        return tuple({reading.count: reading for reading in reversed(found)}.values())[::-1]

    def apart(self, open_: Collection[str]) -> int:
        """By how much the replay and the rows differ at most, but for counts that are `open_` anyway."""
        decided = [reading for reading in self.readings if not {*_READINGS[reading.of][2]} & {*open_}]
        return max((reading.apart for reading in decided), default=0)

    @property
    def agreement(self) -> Agreement:
        if self.why:
            return Agreement.OPEN
        return Agreement.DIFFERS if self.differences else Agreement.AGREES

    @property
    def row(self) -> int | None:
        """The first row from which they differ."""
        return min((r.row for r in self.readings if r.row is not None), default=None)

    @property
    def text(self) -> str:
        """What is to be said of it in one line; empty where they agree."""
        if self.agreement is Agreement.AGREES:
            return ""
        if not self.differences:
            return f"VM {self.vm}: not compared with its rows: {self.why}"
        differ = some([reading.text for reading in self.differences])
        place = f", from row {self.row:,} on" if self.row is not None else ""
        open_ = f" (not decided: {self.why})" if self.why else ""
        return f"VM {self.vm}, replayed under {self.policy}: {differ}{place}{open_}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """Warnings that come first: a line for each VM whose replay differs from its rows."""
    differ = [check.text for check in checks if check.agreement is Agreement.DIFFERS]
    return told(differ, len(checks))


def told(differ: Sequence[str], vms: int) -> list[str]:
    """The same of these VMs' texts, out of this many VMs."""
    if not differ:
        return []
    where = f" in {len(differ):,} of {vms:,} VMs" if vms > 1 else ""
    what = f"UNTRUSTED: the replay under the recording's own policy is not what its rows show{where}"
    return [f"{what}: {differ[0]}", *differ[1:]]


def to_dict(checks: Sequence[OwnPolicyCheck]) -> dict[str, Any]:
    """For JSON. `agrees` is null where no VM differs, and of some it is not decided."""
    found = {check.agreement for check in checks}
    agrees = False if Agreement.DIFFERS in found else True if found == {Agreement.AGREES} else None
    return {"agrees": agrees, "vms": [check.to_dict() for check in checks]}


def compare(
    capabilities: Capabilities, vm: Mapping[str, Any], inputs: VmInputs, rows: RowCounts, own: Simulator
) -> OwnPolicyCheck:
    """Compare a finished replay of one VM under its own policy with the rows counted on the way."""
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
    """Why that they agree says nothing; empty where it does."""
    meta = capabilities.trace.metadata
    first, last = meta.spans.get(int(vm["id"]), meta.span)
    over = [each for each in meta.left_out if each["since"] <= last and (each["until"] or last) >= first]
    return "the recorder left out kinds of event in its time, so that recording cost less" if over else ""


def _counts(own: Simulator) -> dict[str, int]:
    """A replay's counts by `engine.CHANGES`."""
    vcpus, counters = own.vcpus, own.counters
    of_vcpus = {name: int(getattr(vcpus, name).sum()) for name in ("creations", "reuses", "fixes", "faults")}
    return {**vars(counters), **of_vcpus, "installs": of_vcpus["faults"] + counters.prefetched}


def _used(capabilities: Capabilities, counts: NDArray[np.int64]) -> tuple[list[RowCount], tuple[tuple[str, str], ...]]:
    """The readings that a VM's rows allow, and which counts they cannot show."""
    kernel, kinds = capabilities.kernel, capabilities.trace.metadata.kinds
    tdp = not capabilities.shadow
    changes = bool(tdp and kernel.spte_changed and kernel.spte.present and kinds.get("kvm_tdp_mmu_spte_changed"))
    loads = kinds.get("root_get") or kinds.get("mmu_load")
    # Of a leaf there are tables, and of a root that went, leaves and tables: rows without them do not show them (5.10;
    # and what no kernel wrote, as `synth` does without --zap-rows).
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
        # A fault that shares mmu_lock may lose a race, and request its mapping again.
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
    # A root that nobody holds is zapped and freed some time later: by a worker, by RCU.
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
                    low += rows.mmio  # all are gone
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
    """Why a difference may be the recording's own; empty where it may not."""
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
