# SPDX-License-Identifier: Apache-2.0
"""The parts of the table of probes (probes.py): points in the kernel, probes and hooks, and what a point needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Version = tuple[int, int]
OLDEST: Version = (5, 10)
FUTURE: Version = (99, 0)


@dataclass(frozen=True)
class Point:
    how: str
    where: str
    fill: Mapping[str, str] = field(default_factory=dict)
    since: Version = OLDEST
    until: Version = FUTURE
    signature: tuple[str, ...] = ()  # leading parameter types to insist on, where BTF can tell
    printed: tuple[str, ...] = ()  # of a raw tracepoint: its format's fields, in place of a signature that BTF lacks
    needs: str = ""  # what the machine must have besides the kernel: one of the constants below
    shared: str = ""  # C declaration of a variable that several expressions read
    only_if: str = ""  # C condition; where it is false the function's call is not this event
    in_interrupt: bool = False  # runs in interrupt context: the interrupted thread says nothing about the event
    before: str = ""  # C statement run first: what the recorder learns from this point
    after: str = ""


@dataclass(frozen=True)
class Probe:
    kind: str
    points: tuple[Point, ...]
    preset: str  # the smallest preset that has it: roots < mmu < all

    @property
    def name(self) -> str:
        return f"{self.kind}__{self.points[0].where.replace(':', '_')}"


@dataclass(frozen=True)
class Hook:
    """A point that writes no row: it tells the probes of `serves` what the thread is working on there."""

    points: tuple[Point, ...]
    serves: tuple[str, ...]


# What a raw point reads from memory, where not every machine has it: a tracepoint's own code asks the CPU for it.
RIP_IN_MEMORY = "a vCPU's RIP in memory (SVM)"
EXIT_IN_MEMORY = "an exit's reason in memory (SVM)"
PHYSICAL = "the direct map's base"
