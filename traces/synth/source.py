# SPDX-License-Identifier: Apache-2.0
"""Makes one trace file of VMs: their rows are merged by time, and compacted as a recorder's would be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.columns import kind_name
from traces.command_line.progress import Progress
from traces.encoding import TraceFile
from traces.kernels import at
from traces.outputs import SYNTHETIC
from traces.record import Columns
from traces.recording.compact import _Compaction
from traces.recording.recording_summary import Summary
from traces.recording.segments import Segment, SegmentReader
from traces.synth.parameters import Parameters
from traces.synth.row_columns import join, take
from traces.synth.vm import SynthVm

KERNEL: Final = "6.1-synthetic"
GENERATOR: Final = 1  # raised when the same parameters give other rows

# Watched, as the recorder's default preset does; a synthetic VM has no event of some of them, and that is the truth.
WATCHED: Final = (
    "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page", "kvm_mmu_spte_requested", "kvm_mmu_set_spte",
    "kvm_tdp_mmu_spte_changed", "fast_page_fault", "kvm_mmu_zap_all_fast", "kvm_mmu_split_huge_page",
    "mark_mmio_spte", "handle_mmio_page_fault", "check_mmio_spte", "kvm_page_fault", "kvm_entry", "kvm_exit",
    "kvm_smm_transition", "kvm_cr", "kvm_msr", "kvm_userspace_exit", "kvm_unmap_hva_range", "kvm_age_hva",
    "kvm_test_age_hva", "kvm_set_spte_hva", "kvm_apicv_inhibit_changed", "kvm_nested_vmenter", "kvm_nested_vmexit",
    "kvm_fast_mmio", "kvm_inj_exception", "mmu_load", "root_get", "mmu_unload", "mmu_reset", "mmu_free_roots",
    "mmu_free_obsolete_roots", "new_pgd", "root_put", "table_free", "roots_invalidate", "zap_invalidated_begin",
    "zap_invalidated_end", "zap_leafs", "zap_all", "vm_destroy", "vm_create", "ioctl", "ioctl_end", "memslot",
)  # fmt: skip
ZAPS: Final = ("kvm_mmu_prepare_zap_page", "zap_root_begin", "zap_root_end")

_LEFT_OUT: Final = "left out: made with --zap-rows"
_FAULTS_ONLY: Final = "changes by faults only; those by zaps were left out"

_PART_ROWS: Final = 1 << 18  # a row group ends with the part that fills it, so parts must be small compared with it


class _Synthetic(SegmentReader):
    """Takes the place of a recording's segments in compaction, and makes their rows as they are asked for."""

    def __init__(self, parameters: Parameters, progress: Progress) -> None:
        share = None if parameters.events is None else math.ceil(parameters.events / parameters.vms)
        self.segments: list[Segment] = []
        self.manifest_problem = ""
        self._machines = [SynthVm(parameters, vm, share) for vm in range(parameters.vms)]
        self._progress = progress
        self._emitted = np.zeros((256, 256), np.int64)  # kind, CPU
        threads = {name: comm for machine in self._machines for name, comm in machine.threads.comms().items()}
        self.manifest: dict[str, Any] = manifest(parameters) | {"threads": threads}

    def batches(self) -> Iterator[tuple[int, Columns]]:
        written = 0
        for columns in merge([machine.batches() for machine in self._machines]):
            cells = columns["kind"].astype(np.int64) << 8 | columns["cpu"]
            self._emitted += np.bincount(cells, minlength=1 << 16).reshape(256, 256)
            for first in range(0, len(cells), _PART_ROWS):
                part = take(columns, slice(first, first + _PART_ROWS))
                yield written, part
                written += len(part["time"])
            self._progress.at(written)
        self.manifest |= {"closed": {"rows": written}, "finished": True, "loss": self._loss()}

    def _loss(self) -> dict[str, Any]:
        loss: dict[str, Any] = {}
        for kind, cpu in np.argwhere(self._emitted).tolist():
            counts = loss.setdefault(kind_name(kind), {"emitted": {}, "lost": {}})
            counts["emitted"][str(cpu)] = int(self._emitted[kind, cpu])
        return loss


def merge(streams: list[Iterator[Columns]]) -> Iterator[Columns]:
    """Yield the rows of several VMs in order of time, holding one part of each VM."""
    heads = {index: part for index, stream in enumerate(streams) if (part := next(stream, None)) is not None}
    while heads:
        until = min(part["time"][-1] for part in heads.values())
        ready = []
        for index, part in list(heads.items()):
            count = int(np.searchsorted(part["time"], until, side="right"))
            ready.append(take(part, slice(count)))
            if count < len(part["time"]):
                heads[index] = take(part, slice(count, None))
            elif (following := next(streams[index], None)) is not None:
                heads[index] = following
            else:
                del heads[index]
        columns = join(ready)
        yield columns if len(ready) == 1 else take(columns, np.argsort(columns["time"], kind="stable"))


def synthesize(path: Path, parameters: Parameters, *, force: bool = False) -> Summary:
    """Write the trace that `parameters` order, in bounded memory; the same parameters give the same bytes.

    Raises Problem (exit code 2) for parameters that make no sense, or where the file cannot be written; `force`: see
    `traces.outputs`.
    """
    parameters = parameters.settled()
    file = TraceFile(path, SYNTHETIC, force=force)
    try:
        with Progress(f"making {path}", parameters.events) as progress:
            return _Compaction(_Synthetic(parameters, progress), file).run()
    finally:
        file.discard()


def manifest(parameters: Parameters) -> dict[str, Any]:
    """Return what a recorder's manifest would say, and that there was no recorder."""
    zaps = parameters.zap_rows
    kernel = at(KERNEL)  # 6.1 on AMD
    role = {name: list(place) for name, place in kernel.layout.shifts.items()}
    probes = [{"kind": kind, "point": "synthetic", "how": "synthetic", "why": ""} for kind in WATCHED]
    how = "synthetic" if zaps else "none"
    probes += [{"kind": kind, "point": "synthetic", "how": how, "why": "" if zaps else _LEFT_OUT} for kind in ZAPS]
    if not zaps:
        next(probe for probe in probes if probe["kind"] == "kvm_tdp_mmu_spte_changed")["why"] = _FAULTS_ONLY
    return {
        "origin": "synthetic",
        "synthetic": {"by": "kvmtrace synth", "generator": GENERATOR, "parameters": parameters.to_dict()},
        "recorder": "none: made by kvmtrace synth",
        "command": ["kvmtrace", "synth"],
        "preset": "synthetic",
        "host": {
            "kernel": KERNEL, "build": "synthetic", "machine": "x86_64", "cpus": 256,
            "vendor": "AuthenticAMD", "model": "synthetic: no machine recorded this",
        },
        "policy": {"name": parameters.policy, "why": "synthetic: as ordered"},
        "layout": {
            "role": role, "spte": kernel.spte.to_dict(), "source": "6.1", "missing": [], "table_is_physical": True,
        },
        "probes": probes,
        "clock": {"name": "boottime", "samples": []},
        "missed": {},
    }  # fmt: skip
