# SPDX-License-Identifier: Apache-2.0
"""A replay's result as Perfetto tracks: each vCPU's soft-hangs and guest share, under each policy and bound.

Virtual time is drawn on the recording's clock and begins at the VM's first entry. From there on the two clocks diverge,
so that only lengths can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl

from analysis.perfetto.packets import PacketWriter
from analysis.reading.result_source import Result
from traces.errors import Problem
from traces.text import printable

_KEY: Final = ("policy", "bound", "vm", "vcpu")
_SPLIT: Final = ("guest_ns", "fault_ns", "load_ns", "unload_ns", "wait_ns", "other_ns", "switch_ns")
_LATEST: Final = 1 << 62  # ns; later than any machine's clock


@dataclass
class _Vcpu:
    share: int  # its track of guest shares; `hangs` is that of its soft-hangs
    hangs: int
    began: int
    clock: int = 0  # ns, of the last moment written; `guest` is the guest time until then
    guest: int = 0


def write(result: Result, writer: PacketWriter) -> None:
    """Write all policies of a result, a batch at a time. Raises Problem where rows are not what the format says."""
    if not result.timed:
        raise Problem(f"{result.path}: a replay without times has nothing to draw: replay without --no-time")
    groups: dict[tuple[str, str, int], int] = {}
    vcpus: dict[tuple[str, str, int, int], _Vcpu] = {}
    began = {vm.vm: vm.began for vm in result.vms}
    for batch in result.batches():
        frame = pl.DataFrame(pl.from_arrow(batch)).filter(pl.col("row").is_in(["progress", "stall"]))
        _check(result, frame)
        for key, part in frame.group_by(_KEY, maintain_order=True):
            one = vcpus.get(key)
            if one is None:
                policy, bound, vm, vcpu = key
                if vm not in began:
                    raise Problem(
                        f"{result.path}: damaged: there are times of VM {vm}, of which its metadata says nothing"
                    )
                if (policy, bound, vm) not in groups:
                    name = f"{printable(policy)} ({bound}): VM {vm}"
                    groups[policy, bound, vm] = writer.track(name, description="in virtual time")
                parent = groups[policy, bound, vm]
                hangs = writer.track(f"vCPU {vcpu} soft-hangs", parent)
                share = writer.track(f"vCPU {vcpu} guest share", parent, unit="%")
                one = vcpus[policy, bound, vm, vcpu] = _Vcpu(share, hangs, began[vm])
            _shares(writer, one, part.filter(pl.col("row") == "progress"))
            _stalls(writer, one, part.filter(pl.col("row") == "stall"))


def _check(result: Result, frame: pl.DataFrame) -> None:
    """Raise Problem unless all times are there and within the range of a clock."""
    if frame.is_empty():
        return
    last = max([vm.began for vm in result.vms], default=0)
    needed = frame.select(
        "vcpu", "clock", *_SPLIT, pl.col("wall_ns").fill_null(pl.when(pl.col("row") == "progress").then(0))
    )
    bad = needed.select(
        pl.all().is_null().any() | (pl.all() < 0).any() | (pl.all() > _LATEST - min(last, _LATEST)).any()
    )
    if any(bad.row(0)):
        name = next(name for name, wrong in zip(bad.columns, bad.row(0), strict=True) if wrong)
        raise Problem(f"{result.path}: damaged: `{name}` of a row of times is missing, or no time")


def _shares(writer: PacketWriter, vcpu: _Vcpu, moments: pl.DataFrame) -> None:
    """Write the guest share between consecutive moments, each from the earlier moment on."""
    clock = np.append(vcpu.clock, moments["clock"].to_numpy())
    guest = np.append(vcpu.guest, moments["guest_ns"].to_numpy())
    passed = np.diff(clock)
    at = np.flatnonzero(passed > 0)
    if len(at):
        writer.counter(vcpu.share, vcpu.began + clock[at], 100 * np.diff(guest)[at] / passed[at])
    vcpu.clock, vcpu.guest = int(clock[-1]), int(guest[-1])


def _stalls(writer: PacketWriter, vcpu: _Vcpu, stalls: pl.DataFrame) -> None:
    for row in stalls.iter_rows(named=True):
        begin = vcpu.began + row["clock"]
        cause = printable(row["cause"] or "other")
        notes = {"cause": cause, **{name: row[name] for name in _SPLIT}}
        writer.span(vcpu.hangs, begin, begin + row["wall_ns"], f"soft-hang ({cause})", notes)
