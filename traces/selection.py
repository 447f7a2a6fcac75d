# SPDX-License-Identifier: Apache-2.0
"""The part of a recording that is asked about: VMs, vCPUs, a window of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from traces.errors import Problem
from traces.text import some, vms_text
from traces.wall_clock import moment

if TYPE_CHECKING:
    from traces.reader import Trace


@dataclass(frozen=True)
class Selection:
    """What options select; moments are text until there is a recording to interpret them by."""

    vms: Sequence[int] = ()
    vcpus: Sequence[int] = ()
    since: str = ""
    until: str = ""

    def __bool__(self) -> bool:
        return bool(self.vms or self.vcpus or self.since or self.until)

    @property
    def text(self) -> str:
        """The selection as a report states it; empty where it is everything."""
        parts = [f"VM {vm}" for vm in self.vms] + [f"vCPU {vcpu}" for vcpu in self.vcpus]
        parts = [f"of {', '.join(parts)}"] if parts else []
        parts += [f"from {self.since}"] if self.since else []
        return ", ".join(parts + ([f"to {self.until}"] if self.until else []))

    @property
    def remark(self) -> str:
        """The sentence with which a report explains the selection."""
        of_all = "policies and roots are of all its vCPUs; " if self.vcpus else ""
        return f"only {self.text}; {of_all}losses are those of the whole recording"

    def window(self, trace: Trace) -> tuple[int | None, int | None]:
        """Return `since` and `until` in boot ns. Raises Problem where the recording has no time between them."""
        first, last = trace.metadata.span
        since = moment(trace.metadata, self.since, "--from") if self.since else None
        until = moment(trace.metadata, self.until, "--to") if self.until else None
        if since is not None and since > last:
            raise Problem(
                f"{trace.path}: --from {self.since}: the recording ends {(last - first) / 1e9:.6f} s after its begin"
            )
        if until is not None and until <= max(first, since or first):
            raise Problem(f"{trace.path}: --to {self.until}: nothing of the recording is before it")
        return since, until

    def of(self, trace: Trace) -> Trace:
        """Return the trace with these VMs, up to `until`.

        Rows before `since` are kept, for the state that they lead to. Raises Problem where no row is left, or where
        there is no such vCPU.
        """
        since, until = self.window(trace)
        chosen = trace.selected(self.vms or None, until)
        known = {int(vcpu["id"]) for vm in chosen.metadata.vms for vcpu in vm["vcpus"]}
        if unknown := sorted(set(self.vcpus) - known):
            whose = f" of {vms_text(self.vms)}" if self.vms else ""
            raise Problem(
                f"{trace.path}: no vCPU {some(unknown)}{whose} in it; there are {some(sorted(known)) or 'none'}"
            )
        if since is not None and not any(last >= since for _, last in chosen.metadata.spans.values()):
            begin, _ = trace.metadata.span
            last = max((last for _, last in chosen.metadata.spans.values()), default=begin)
            raise Problem(
                f"{trace.path}: --from {self.since}: the last row of what is selected is {(last - begin) / 1e9:.6f} s "
                "after the recording's begin"
            )
        return chosen


ALL = Selection()
