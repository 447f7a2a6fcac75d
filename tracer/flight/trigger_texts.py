# SPDX-License-Identifier: Apache-2.0
"""What a user may write after --trigger, and the detectors that are made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from tracer.flight import counting
from tracer.flight.alarms import Alarm, Detector, Rows
from tracer.flight.guest_share import GuestShare
from tracer.flight.vcpu_time import KINDS as SHARE_KINDS
from tracer.flight.vcpu_time import idle_codes
from tracer.probing import host
from traces.errors import Problem
from traces.wall_clock import span_ns

LEAST: Final = 10_000_000  # ns: rows are held back for longer than this before anybody sees them
_EXPRESSION: Final = re.compile(r"([a-z-]+)\s*([<>])\s*([\d.]+)\s*(%|/s|ns|us|ms|s|)(?:\s+for\s+(\S+))?")
_RIP: Final = 2  # the word of a kvm_page_fault record that holds the RIP
_TDP_TABLES_SHOWN: Final = (5, 12)  # the first kernel whose tracepoints show tables of TDP roots


@dataclass(frozen=True)
class TriggerKind:
    """One kind of trigger: how it is written, the kinds of rows that it looks at, and how its detector is made.

    `make` is called with the number, and with the ns of its `for`.
    """

    name: str
    example: str
    meaning: str
    kinds: tuple[str, ...]
    make: Callable[[float, int], Detector]


def _share(below: float, ns: int) -> Detector:
    return GuestShare(below / 100, ns, idle_codes(host.cpu()))


def _rate(name: str, what: str, mask: counting.Mask, per_second: float, ns: int) -> Detector:
    return counting.RowRate(name, what, mask, per_second * ns / 1e9, ns)


def _roots(per_second: float, ns: int) -> Detector:
    mask = counting.roots if host.kernel_version() >= _TDP_TABLES_SHOWN else counting.old_roots
    return _rate("roots", "roots built", mask, per_second, ns)


def _errors(limit: float, ns: int) -> Detector:
    return counting.RowRate("errors", "failures of KVM_RUN", counting.errors, limit, ns)


def _same(name: str, value: Callable[[Rows], Rows], limit: float, _ns: int) -> Detector:
    return counting.SameFault(name, value, int(limit))


def _zap(ns: float, _: int) -> Detector:
    return counting.LongZap(int(ns))


TRIGGERS: Final = (
    TriggerKind("guest-share", "guest-share < 10% for 200ms", "a busy vCPU is in the guest for less than that share",
            SHARE_KINDS, _share),
    TriggerKind("roots", "roots > 100/s for 1s", "a VM has more roots built", ("kvm_mmu_get_page",), _roots),
    TriggerKind("faults", "faults > 200000/s for 1s", "a VM has more page faults", ("kvm_page_fault",),
            partial(_rate, "faults", "page faults", counting.faults)),
    TriggerKind("user-exits", "user-exits > 100000/s for 1s", "a VM's vCPUs come back to their VMM more often",
            ("kvm_userspace_exit",), partial(_rate, "user-exits", "exits to userspace", counting.user_exits)),
    TriggerKind("errors", "errors > 0 for 1s", "KVM_RUN fails more often, or says that it cannot go on",
            ("kvm_userspace_exit",), _errors),
    TriggerKind("same-rip", "same-rip > 10000", "a vCPU faults more often at one RIP, with no other between",
            ("kvm_page_fault",), partial(_same, "same-rip", lambda rows: rows[f"w{_RIP}"])),
    TriggerKind("same-gfn", "same-gfn > 100", "a vCPU faults more often on one page, with no other between",
            ("kvm_page_fault",), partial(_same, "same-gfn", lambda rows: rows["w0"] >> np.uint64(12))),
    TriggerKind("zap", "zap > 50ms", "a zap of roots, under mmu_lock, takes longer",
            ("zap_root_begin", "zap_root_end"), _zap),
)  # fmt: skip
_BY_NAME: Final = {each.name: each for each in TRIGGERS}


class FlightTriggers:
    """The detectors of a user's trigger expressions."""

    def __init__(self, expressions: Iterable[str], kinds: frozenset[str]) -> None:
        """Raises Problem for an expression that cannot be understood, or needs other rows than `kinds`."""
        self.expressions = tuple(expressions)
        self._made = [_trigger(expression, kinds) for expression in self.expressions]
        self._detectors: list[Detector | None] = [make() for _, make in self._made]

    def needing(self, kinds: frozenset[str]) -> list[str]:
        """Return the expressions that cannot be watched without these kinds of rows."""
        made = zip(self.expressions, self._made, strict=True)
        return [expression for expression, (trigger, _) in made if not kinds.isdisjoint(trigger.kinds)]

    def leave_out(self, kinds: frozenset[str]) -> None:
        """Suspend the triggers that need these kinds of rows, which no longer come, and resume the others."""
        for at, (trigger, make) in enumerate(self._made):
            if not kinds.isdisjoint(trigger.kinds):
                self._detectors[at] = None
            elif self._detectors[at] is None:
                self._detectors[at] = make()  # anew: its earlier state no longer counts

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows, in order of time; return the alarms that begin with them."""
        return [alarm for detector in self._detectors if detector for alarm in detector.see(rows)]

    def now(self, at: int) -> list[Alarm]:
        """Return the alarms that begin by `at` (boot ns), before which no more rows will come."""
        return [alarm for detector in self._detectors if detector for alarm in detector.now(at)]


def _trigger(expression: str, kinds: frozenset[str]) -> tuple[TriggerKind, Callable[[], Detector]]:
    match = _EXPRESSION.fullmatch(expression.strip())
    trigger = _BY_NAME.get(match[1]) if match else None
    if match is None or trigger is None:
        raise Problem(f"--trigger {expression}: not a trigger; they are {', '.join(map(repr, _EXAMPLES))}")
    example = _EXPRESSION.fullmatch(trigger.example)
    assert example is not None
    units = [unit if unit in ("", "%", "/s") else "time" for unit in (match[4], example[4])]
    unlike = match[2] != example[2] or units[0] != units[1]
    if unlike or (match[5] and not example[5]) or match[3].count(".") > 1 or match[3].strip(".") == "":
        raise Problem(f"--trigger {expression}: write it like {trigger.example!r}")
    lacking = [kind for kind in trigger.kinds if kind not in kinds]
    if lacking:
        raise Problem(f"--trigger {expression}: looks at {lacking[0]}, which these --events do not have")
    lasting = span_ns(match[5] or example[5] or "1s")
    if lasting is None or lasting < LEAST:
        raise Problem(f"--trigger {expression}: {match[5]} is not a time of 10 ms or more")
    number = float(span_ns(match[3] + match[4]) or 0) if units[0] == "time" else float(match[3])
    return trigger, partial(trigger.make, number, lasting)


_EXAMPLES: Final = tuple(each.example for each in TRIGGERS)
