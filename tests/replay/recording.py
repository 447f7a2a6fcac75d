# SPDX-License-Identifier: Apache-2.0
"""Small recordings of a made-up guest on a made-up kernel, event by event, for the tests of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from replay.decode.capabilities import Capabilities
from tests.traces.making import KVM_A, event, stream, trace
from traces.reader import Trace

ROLE, SMM_ROLE = 0x3784, 0x01003784
OLD_ROLE, OLD_WP = 0x3794, 1 << 13
TID = 11
ALL_KINDS = (
    "kvm_mmu_get_page", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed", "mark_mmio_spte",
    "kvm_page_fault", "kvm_entry", "kvm_exit", "kvm_smm_transition", "kvm_cr", "kvm_unmap_hva_range", "mmu_reset",
    "mmu_unload", "root_get", "memslot", "kvm_mmu_zap_all_fast", "vm_destroy", "zap_all", "fast_page_fault",
)  # fmt: skip


def manifest(
    kernel: str = "6.1.55", policy: str = "async", lacking: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    """What the recorder would have said."""
    return {
        "host": {"kernel": kernel, "vendor": "AuthenticAMD"},
        "policy": {"name": policy, "why": ""},
        "probes": [{"kind": kind, "how": "none" if kind in lacking else "raw"} for kind in ALL_KINDS],
        **more,
    }


class Guest:
    """Appends the rows of what one VM does. `role` and `root` are those of the root that the vCPU has."""

    def __init__(self, role: int = ROLE) -> None:
        self.rows: list[np.ndarray[Any, Any]] = []
        self.role, self.root = role, 0x1000
        self._roots = 0x1000
        self.vm("vm_create")

    def vm(self, kind: str, **fields: Any) -> None:
        self.rows.append(event(kind, kvm=KVM_A, tid=TID - 1, tgid=TID - 1, **fields))

    def of(self, kind: str, vcpu: int = 0, **fields: Any) -> None:
        self.rows.append(event(kind, kvm=KVM_A, vcpu=vcpu, tid=TID + vcpu, tgid=TID - 1, **fields))

    def slot(self, gfn: int, pages: int, hva: int, number: int = 0, flags: int = 0) -> None:
        self.vm("memslot", w0=gfn, w1=hva, w2=pages, w3=flags, n=number)
        self.vm("ioctl_end", w0=0x4020AE46)

    def load(self, vcpu: int = 0, role: int | None = None, created: bool = True) -> None:
        self.role = self.role if role is None else role
        if created:
            self._roots += 1
            self.root = self._roots
        self.of("kvm_mmu_get_page", vcpu, root=self.root, role=self.role, level=4, w1=self.root, flags=int(created))
        self.of("root_get", vcpu, root=self.root, role=self.role, n=2)
        self.of("kvm_entry", vcpu, root=self.root)

    def fault(
        self, gfn: int, vcpu: int = 0, level: int = 1, code: int = 6, enter: bool = True, installs: bool = True
    ) -> None:
        self.of("kvm_exit", vcpu, w0=0x400)
        self.of("kvm_page_fault", vcpu, w0=gfn << 12, w1=code, root=self.root, role=self.role)
        self.of("kvm_mmu_spte_requested", vcpu, w0=gfn, level=level, root=self.root)
        if installs:
            self.of("kvm_mmu_set_spte", vcpu, w0=gfn, level=level, root=self.root, w1=0xE67)
        if enter:
            self.of("kvm_entry", vcpu, root=self.root)

    def exit(self, code: int, vcpu: int = 0, **fields: Any) -> None:
        self.of("kvm_exit", vcpu, w0=code, **fields)

    def write(self, path: Path, **given: Any) -> Capabilities:
        """The trace, ready to be decoded."""
        trace(path, stream(self.rows), manifest(**given))
        return Capabilities(Trace.open(path))
