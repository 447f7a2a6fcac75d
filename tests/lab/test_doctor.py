# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace doctor` inside the lab: every probe of a root's life attached on each kernel, with the kvm module's BTF."""

from __future__ import annotations

import json
import sys

import pytest

from tracer.lab.lab_kernels import Bootable
from tracer.lab.session import boot

pytestmark = pytest.mark.lab

# What 5.10 cannot show: it has no such tracepoint or function (the reference dates each).
ABSENT_IN_510 = {
    "kvm_tdp_mmu_spte_changed", "kvm_mmu_split_huge_page", "kvm_unmap_hva_range", "kvm_age_hva", "kvm_test_age_hva",
    "kvm_set_spte_hva", "mmu_free_obsolete_roots", "roots_invalidate", "zap_invalidated_begin", "zap_invalidated_end",
    "zap_leafs",
}  # fmt: skip
ABSENT_LATER = {"kvm_set_spte_hva"}  # the tracepoint went away with change_pte, before 6.12


@pytest.mark.parametrize("lab_kernel", ["5.10", "6.1", "6.1-async", "6.12"], indirect=True)
def test_every_probe_attaches(lab_kernel: Bootable) -> None:
    done = boot(lab_kernel, [sys.executable, "-m", "kvmtrace", "doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.code == 0, [check for check in report["checks"] if check["state"] == "FAIL"]
    assert report["attached"] is True, "really attached, not only looked up"
    seen = set(report["observable"])
    absent = {probe["kind"] for probe in report["probes"]} - seen
    old = lab_kernel.name == "5.10"
    assert absent <= (ABSENT_IN_510 if old else ABSENT_LATER)
    assert {"mmu_load", "mmu_unload", "root_get", "root_put", "table_free", "zap_root_begin", "vm_destroy"} <= seen
    functions = {probe["how"] for probe in report["probes"] if probe["kind"] in ("mmu_load", "mmu_unload", "root_get")}
    assert functions <= {"kprobe", "kretprobe", "fentry", "fexit"}
    btf = next(check for check in report["checks"] if check["name"] == "BTF")
    assert btf["state"] == "ok"
    assert btf["said"].startswith("BTF of vmlinux;" if old else "BTF of vmlinux and kvm")
    symbols = next(check for check in report["checks"] if check["name"] == "symbols")
    assert symbols["state"] == "ok"
