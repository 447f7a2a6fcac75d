# SPDX-License-Identifier: Apache-2.0
"""The description of kernels against recordings of real ones, field by field."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import RECORDINGS, each
from tests.traces.shown import Recording
from traces import kernels
from traces.kernels import Facts, Kernel
from traces.kernels.fold import release_of
from traces.kernels.triggers import Trigger
from traces.reader import Trace

ALL = [*RECORDINGS, *sorted((Path(__file__).parent.parent / "recordings").glob("*-ept.parquet"))]

pytestmark = pytest.mark.xdist_group("kernels-corpus")  # each recording's rows are looked at once

# No recording that ships shows these, and why.
UNSEEN = {
    "name": "what it is called", "version": "what it is of",
    "flush_per_table": "no event tells TLB flushes",
    "zap_tables": "no kernel from 5.12 to 5.17, and 5.10 shows no SPTE change",
    "zap_leafs_once": "no recording of a newer kernel has a range zap: AVIC is off under emulation",
    "set_spte_when_spurious": "no scenario has two vCPUs fault on one page at a time",
    "page_struct": "offsets, checked in the lab by the role words and frames that 5.10's tracepoints print",
    "loads_share": "no event tells mmu_lock", "faults_share": "no event tells mmu_lock",
    "aging": "no event tells mmu_lock", "zap_lock": "no event tells mmu_lock",
    "zap_counted": "no event tells the notifier's sequence", "nx_recovery": "no event tells mmu_lock",
    "apicv": "AVIC is off under emulation", "tdp_pages": "no event tells the accounting of tables",
    "old_shadow_mmu": "no page is out of sync when it is looked up, in any recording",
    "pte_list_ext": "no event tells how reverse maps are laid out",
    "ret_pf.retry": "not a return code that fast_page_fault shows", "ret_pf.emulate": "the same",
    "ret_pf.spurious": "no scenario has two vCPUs fault on one page at a time",
    "ret_pf.write_protected": "no scenario writes to a read-only slot",
    "unloads.CR0": "paging is switched on before the first load, and never again",
    "unloads.CR4_PCIDE": "no scenario toggles it", "unloads.INVPCID": "no scenario executes it",
    "unloads.EXIT": "what nothing recorded explains", "unloads.OTHER": "the same",
    "unloads.CR0_SILENT": "an open end of a recording, not a cause", "unloads.CR4_SILENT": "the same",
    "unloads.CR0_RESET": "the same", "unloads.CR4_RESET": "the same",
    "unloads.UNSEEN": "the same",
    "vendor.name": "of the hardware", "vendor.cpu": "the same", "vendor.module": "the same",
    "vendor.paging": "the same", "vendor.accessed": "of the hardware",
    "vendor.dirty": "the same", "vendor.interrupt": "the emulated machine interrupts as it likes",
    "vendor.asynchronous": "the same", "vendor.mwait": "no guest of a scenario executes it",
    "mmu_seq_int": "no recording has 2^31 invalidations before it",
    "vendor.undefined": "the vendors' RSM has an exit of its own, or is this: one of both is shown",
    "vendor.invpcid": "no scenario executes it", "vendor.cr": "replay's tests have it",
    "vendor.cr0_write": "by name of the scenario only (unloads.CR0_WP)", "vendor.cr4_write": "the same",
    "vendor.msr": "one of both ways is shown (msr_write)", "vendor.fault.walk": "no scenario has page tables to walk",
    "spte.host_writable": "with mmu_writable as one (spte.writable)", "spte.mmu_writable": "the same",
}  # fmt: skip


@cache
def shown(path: Path) -> dict[str, Any]:
    """What a recording's rows show."""
    return Recording(path).of()


@cache
def described(path: Path) -> Kernel:
    """A recording's kernel by version, vendor and policy alone: neither BTF nor what the trace stores."""
    meta = Trace.open(path).metadata
    modified = "async" if path.stem.endswith(("-async", "-async-ept")) else ""  # modules with edbdb43fc96b undone
    return kernels.at(release_of(meta.raw), Facts(policy=modified, cpu=meta.raw["host"]["vendor"]))


def agrees(kernel: Kernel, name: str, value: Any) -> bool:
    """Whether the description says what was shown."""
    outer, _, inner = name.partition(".")
    if outer == "unloads":
        return (inner in {trigger.name for trigger in kernel.unloads}) == value
    if name == "points":
        tracepoints = {point for point in kernel.points if ":" in point}
        return value <= kernel.points and {point for point in value if ":" in point} <= tracepoints
    if name == "layout.fields":
        return kernel.layout.shifts == value
    if name == "spte.writable":
        ept = kernel.vendor.paging == "ept"
        return kernel.spte.host_writable[ept] | kernel.spte.mmu_writable[ept] == value
    if outer == "vendor":
        held = getattr(kernel.vendor.fault, inner.removeprefix("fault.")) if "." in inner else None
        if held is not None:
            return all(code & held for code in value)
        allowed = {
            "rsm": kernel.vendor.rsm + kernel.vendor.undefined,
            "msr_write": kernel.vendor.msr_write + ((kernel.vendor.msr,) if kernel.vendor.msr is not None else ()),
        }.get(inner, getattr(kernel.vendor, inner))
        return value <= set(allowed)
    said = getattr(getattr(kernel, outer), inner) if inner else getattr(kernel, outer)
    return bool(said == value)


@pytest.mark.slow
@pytest.mark.parametrize("path", each(ALL))
def test_a_recording_shows_what_the_description_says(path: Path) -> None:
    kernel = described(path)
    wrong = {name: value for name, value in shown(path).items() if not agrees(kernel, name, value)}
    assert not wrong, {name: (value, kernel.name) for name, value in wrong.items()}


def names() -> set[str]:
    """Every field of the description, those of what it is made of one by one."""
    kernel = kernels.at("6.12")
    found = set()
    for field in fields(Kernel):
        value = getattr(kernel, field.name)
        if field.name in ("layout", "spte", "ret_pf", "vendor"):
            found |= {f"{field.name}.{inner.name}" for inner in fields(value)}
        elif field.name == "unloads":
            found |= {f"unloads.{trigger.name}" for trigger in Trigger}
        else:
            found.add(field.name)
    found |= {f"vendor.fault.{inner.name}" for inner in fields(kernel.vendor.fault)}
    return found - {"vendor.fault"}


@pytest.mark.corpus
def test_every_field_is_shown_by_a_recording_or_named_as_not_shown() -> None:
    seen = {name for path in ALL for name in shown(path)} - {"spte.writable"}
    assert seen | UNSEEN.keys() >= names(), names() - seen - UNSEEN.keys()
    assert not UNSEEN.keys() - names(), UNSEEN.keys() - names()
    assert not seen & UNSEEN.keys(), "shown by now: take them off the list"


@pytest.mark.corpus
def test_what_is_shown_would_tell_another_kernel() -> None:
    """Where two kernels of the corpus differ in a field that recordings show, theirs deny each other's."""
    checked: dict[str, int] = defaultdict(int)
    denied: dict[str, int] = defaultdict(int)
    described_kernels = {described(path) for path in ALL}
    for path in ALL:
        own = described(path)
        for name, value in shown(path).items():
            for other in described_kernels:
                if not name.startswith("vendor") and _said(other, name) != _said(own, name):
                    checked[name] += 1
                    denied[name] += not agrees(other, name, value)
    del checked["points"]  # a newer kernel may have all that an older one has, and more
    assert {name: denied[name] for name in checked} == checked
    assert len(checked) >= 15, sorted(checked)


def _said(kernel: Kernel, name: str) -> Any:
    outer, _, inner = name.partition(".")
    if outer == "unloads":
        return inner in {trigger.name for trigger in kernel.unloads}
    if name == "spte.writable":
        ept = kernel.vendor.paging == "ept"
        return kernel.spte.host_writable[ept] | kernel.spte.mmu_writable[ept]
    return getattr(getattr(kernel, outer), inner) if inner else getattr(kernel, outer)
