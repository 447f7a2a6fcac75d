# SPDX-License-Identifier: Apache-2.0
"""What to synthesize: the parameters, their defaults and limits, and the cost model that gives rows their times."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from traces.errors import Problem

POLICIES: Final = ("async", "preserve")
LOCALITIES: Final = ("sequential", "zipf", "uniform", "mixed")
PAGE_SIZES: Final = ("4k", "2m", "mixed")
RESETS: Final = ("exit", "non-fault")

HUGE: Final = 2 << 20
MAX_MEMORY: Final = 256 << 30  # one level-3 table then maps every guest page
MAX_ZAP_MEMORY: Final = 16 << 30  # a root's zap rows are made at once: 512 a table

# The published experiment (reset on every exit): 100,000 exits; 8 memslot epochs, SMM entered in 7 of them.
RESET_EXIT_RATE: Final = 10_000.0
RESET_DURATION: Final = 10.0
RESET_MEMSLOT_RATE: Final = 0.7
RESET_SMI_RATE: Final = 0.75


@dataclass(frozen=True)
class SynthCosts:
    """Mean host time in ns, of the order of a bare-metal host; each row takes 75 % to 125 % of its share.

    A zapped entry is cheap on purpose: a worker that is slower than the refill would pile up rows without bound.
    """

    exit: int = 600  # guest to host, until kvm_exit
    entry: int = 600  # until kvm_entry
    fault: int = 2_000  # handling one fault, missing tables apart
    table: int = 400  # allocating and linking one missing table
    root: int = 3_000  # allocating a root
    found: int = 300  # loading a root that is there
    unload: int = 500  # emptying the root slots
    userspace: int = 8_000  # KVM_RUN's way out to userspace and in again
    ioctl: int = 20_000  # a KVM ioctl
    zap_entry: int = 3  # one SPTE of a dead root
    worker: int = 50_000  # from the last put until the worker begins
    rcu: int = 200_000  # until a dead table returns to the allocator


@dataclass(frozen=True)
class Parameters:
    """The parameters of a synthetic trace. Rates are per second of guest time of each VM.

    None stands for the default that `settled` gives. Of a VM's vCPUs one makes faults at a time, for one SMI interval,
    while the others run what they have mapped; host work is serial within a VM. Guest time is what the VM's clock shows
    less that work.
    """

    policy: str = "preserve"  # of the host that "recorded" it
    vms: int = 1
    vcpus: int = 1
    smi_rate: float | None = None  # SMIs, each on one vCPU in turn: 100, with `reset_on` 0.75
    working_set: int = 512  # pages accessed between two SMIs (without SMIs: in 10 ms); repeats count
    memory: int = 64 << 20  # bytes, a multiple of 2 MiB
    locality: str = "sequential"
    page_size: str = "4k"
    memslot_rate: float | None = None  # a slot deleted and created again: 0, with `reset_on` 0.7
    exit_rate: float | None = None  # exits that are no page faults: 0, with `reset_on` 10,000
    cr0_wp_rate: float = 0.0  # CR0.WP writes on a host that resets the MMU for each (before 6.4)
    reset_on: str | None = None  # after these exits the host resets the MMU context
    duration: float | None = None  # seconds of guest time: 1, with `reset_on` 10
    events: int | None = None  # or: end with the step that reaches this many rows, in all
    zap_rows: bool = False
    seed: int = 0
    costs: SynthCosts = field(default_factory=SynthCosts)

    def settled(self) -> Parameters:
        """Return the parameters with every default filled in; raises Problem (exit code 2) for impossible values."""
        for name, choices in (
            ("policy", POLICIES), ("locality", LOCALITIES), ("page_size", PAGE_SIZES), ("reset_on", (None, *RESETS)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise _bad(name, f"{getattr(self, name)}: must be one of {', '.join(c for c in choices if c)}")
        stuck = self.reset_on == "exit" and self.policy == "async"
        smi_rate = 0.0 if stuck else RESET_SMI_RATE if self.reset_on else 100.0
        duration = None if self.events is not None else RESET_DURATION if self.reset_on else 1.0
        given = replace(
            self,
            smi_rate=_or(self.smi_rate, smi_rate),
            memslot_rate=_or(self.memslot_rate, RESET_MEMSLOT_RATE if self.reset_on else 0.0),
            exit_rate=_or(self.exit_rate, RESET_EXIT_RATE if self.reset_on else 0.0),
            duration=self.duration if self.duration is not None else duration,
        )
        given._check(stuck)
        return given

    def rates(self) -> tuple[float, float, float, float]:
        """Return the rates of settled parameters: SMIs, memslot churns, other exits, CR0.WP writes, each per second."""
        return self.smi_rate or 0.0, self.memslot_rate or 0.0, self.exit_rate or 0.0, self.cr0_wp_rate

    def to_dict(self) -> dict[str, Any]:
        """Return all parameters as JSON, for the trace's metadata."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "costs"}
        return own | {"costs_ns": vars(self.costs)}

    def _check(self, stuck: bool) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "vms": (1, 4096), "vcpus": (1, 1024), "working_set": (1, 1 << 28), "seed": (0, (1 << 63) - 1),
            "smi_rate": (0, 1e6), "memslot_rate": (0, 1e5), "exit_rate": (0, 1e7), "cr0_wp_rate": (0, 1e6),
            "duration": (1e-9, 1e6), "events": (1, 1 << 40), "memory": (HUGE, MAX_MEMORY),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise _bad(name, f"{value}: must be from {least:,} to {most:,}")
        if self.memory % HUGE:
            raise _bad("memory", f"{self.memory}: must be a multiple of 2M")
        if self.events is not None and self.duration is not None:
            raise _bad("events", "and --duration: give one of them")
        if self.zap_rows and self.memory > MAX_ZAP_MEMORY:
            raise _bad("zap_rows", f"is for VMs of at most 16G of memory, not {self.memory >> 20}M: leave it off")
        if stuck and self.smi_rate:
            raise _bad("smi_rate", "must be 0 with --reset-on exit under async: that guest never returns from SMM")
        if self.events is not None and not stuck and not any(self.rates()):
            raise _bad("events", "needs something that goes on for ever: a rate above 0, or --duration instead")
        if any(cost < 1 for cost in vars(self.costs).values()):
            raise Problem("costs: must be at least 1 ns each")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bad(name: str, why: str) -> Problem:
    return Problem(f"--{name.replace('_', '-')} {why}")
