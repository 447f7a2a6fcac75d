# SPDX-License-Identifier: Apache-2.0
"""What the probes record is what trace-cmd and perf record at the same time, whichever way they are attached.

Those two take the classic tracepoints; ours take the raw arguments where they can (tracer/probing/probes.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.traces.simultaneous_rows import compare, rows_of
from tracer.lab import simultaneous
from traces.imports.importing import import_file
from traces.imports.told import ToldOfText
from traces.reader import Trace

pytestmark = pytest.mark.lab

# In 5.10 a vCPU's exit cannot be read: there is no BTF that says where its VMCB is.
RAW = {"kvm_entry", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "fast_page_fault"}


@pytest.mark.parametrize("kernel", simultaneous.KERNELS)
def test_every_row_is_what_the_classic_tracepoints_show(kernel: str, tmp_path: Path) -> None:
    scenarios = ("smi-both", "dirty-log")  # two vCPUs; and faults that are fixed without the lock
    simultaneous.record(kernel, tmp_path, scenarios)
    for name in (f"{scenario}-{kernel}" for scenario in scenarios):
        native = tmp_path / f"{name}.parquet"
        hows = {each["kind"]: each["how"] for each in Trace.open(native).metadata.raw["probes"]}
        raw = {kind for kind in (*RAW, "kvm_exit") if hows[kind] == "raw"}
        # From 7.0 on a raw probe may be preempted, and its CPU then skips others.
        wanted = set() if kernel == "7.x" else RAW if kernel == "5.10" else {*RAW, "kvm_exit"}
        assert raw == wanted, json.dumps(hows)
        for tool in ("dat", "data"):
            out = tmp_path / f"{name}-{tool}.parquet"
            import_file(tmp_path / f"{name}.{tool}.xz", out, ToldOfText())
            compare(rows_of(native), rows_of(out), preempted=kernel == "7.x")
