# SPDX-License-Identifier: Apache-2.0
"""What a recording shows of one VM, as a diagnosis needs it: watched kinds of event, memslots, and losses of events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from replay.timing.stuck_rip import RipRun
from traces.reader import Trace

PAGE_SHIFT: Final = 12
_EVER: Final = 1 << 62


@dataclass(frozen=True)
class ShownOfVm:
    """What a trace's metadata says of one VM; `losses` are the kinds of which events were lost."""

    trace: Trace
    vm: Mapping[str, Any]

    @property
    def gaps(self) -> tuple[Mapping[str, Any], ...]:
        return self.trace.metadata.gaps

    @cached_property
    def watched(self) -> frozenset[str]:
        """The kinds of event that were recorded, whether there was one or not."""
        meta = self.trace.metadata
        probed = {str(probe.get("kind")) for probe in meta.probes if probe.get("how") != "none"}
        return frozenset(probed | {kind for kind, count in meta.kinds.items() if count})

    @cached_property
    def losses(self) -> frozenset[str]:
        meta = self.trace.metadata
        return frozenset(kind for kind in meta.loss if meta.lost_of(kind))

    @property
    def knows_slots(self) -> bool:
        """Whether all memslots of the VM are known, so that a page outside the known ones is in no memslot."""
        return bool(self.vm["slots"] or "memslot" in self.watched) and not self.vm.get("slots_omitted")

    def slot(self, gfn: int, time: int) -> Mapping[str, Any] | None:
        """Return the memslot that contains a page at a time (boot clock, ns), or None if none is known."""
        for slot in self.vm["slots"]:
            since, until = slot.get("since"), slot.get("until")
            lasts = (since if isinstance(since, int) else 0) <= time < (until if isinstance(until, int) else _EVER)
            if lasts and slot["gfn"] <= gfn < slot["gfn"] + slot["pages"]:
                return slot  # type: ignore[no-any-return]
        return None

    def in_no_slot(self, run: RipRun) -> bool:
        """Whether the page of the run's last access is known to be in no memslot."""
        return self.knows_slots and self.slot(run.addr >> PAGE_SHIFT, run.until) is None

    def place(self, run: RipRun) -> str:
        """Say in words which address the run's last access had, and in which memslot."""
        if not run.accesses:
            return "at an address that no row shows"
        gfn = run.addr >> PAGE_SHIFT
        slot = self.slot(gfn, run.until)
        which = f"slot {slot['slot']}" if slot is not None else "no memslot"
        known = f", in {which}" if slot is not None or self.knows_slots else ", of which no row shows the memslot"
        return f"at gpa {run.addr:#x} (gfn {gfn:#x}){known}"

    def lost(self, run: RipRun, *kinds: str) -> bool:
        """Whether events (of the given kinds, or of any) may have been lost during the run."""
        if not self.losses & set(kinds or self.losses):
            return False
        if not self.gaps:
            return True
        return any(
            gap["since"] <= run.until and gap["until"] >= run.since
            for gap in self.gaps
            if not kinds or not isinstance(gap.get("kinds"), list) or not set(kinds).isdisjoint(gap["kinds"])
        )

    def none_of(self, run: RipRun, kind: str) -> bool:
        """Whether a run without a row of this kind means that there was no
        such event: it was watched, and none was lost.
        """
        return kind in self.watched and not self.lost(run, kind)
