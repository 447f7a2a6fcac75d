# SPDX-License-Identifier: Apache-2.0
"""Queries behind pictures: time, pages and counts, in as many parts as a picture has room for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.queries.recorded import lives
from analysis.queries.registry import query
from analysis.queries.replayed import progress
from analysis.reading.grouped import UsedRoots
from analysis.reading.recorded_time import PARTS
from analysis.reading.result_source import Result
from analysis.reading.rows import KIND, DecodedRows
from analysis.reading.sources import Recording
from replay.decode.spans.vcpu_states import VcpuState
from replay.timing.stalls import Rule
from traces.errors import Problem
from traces.schema import BY_NAME
from traces.text import vms_text

ROWS: Final = 100  # ranges of pages in a picture
# Pictures show no prefetches: the time of one is part of its fault's.
STATES: Final = {f"{state.name.lower()}_ns": state for state in VcpuState if state != VcpuState.PREFETCH}

HANGS: Final = {
    "vm": pl.Int32, "vcpu": pl.Int16,
    **dict.fromkeys(("time", "length_ns", "guest_ns", "switch_low_ns", "switch_ns"), pl.Int64),
}  # fmt: skip
_HEAT: Final = {"vm": pl.Int32, **dict.fromkeys(("time", "length_ns", "gfn", "pages", "installs"), pl.Int64)}


@query(Recording, needs=("kvm_entry", "kvm_exit"))
def vcpu_states(recording: Recording, vm: int | None = None) -> pl.LazyFrame:
    """What each vCPU did in each of 400 parts of its VM's time: ns in the guest, on faults, loads, unloads, zaps, SMM.

    `guest_ns` includes the switch to the guest and back. Parts without any recorded activity of a vCPU are missing. The
    recording is read when the query is made. `vm` restricts the answer to one VM.
    """
    frames = []
    for one in recording.times:
        if vm not in (None, one.vm):
            continue
        vcpu, part = np.nonzero(one.parts.sum(2))
        found = one.parts[vcpu, part]
        found[:, VcpuState.FAULT] += found[:, VcpuState.PREFETCH]
        times = {name: found[:, state] for name, state in STATES.items()}
        ids = np.array(one.ids, np.int16)
        frames.append(
            pl.DataFrame({
                "vm": np.full(len(vcpu), one.vm, np.int32), "vcpu": ids[vcpu] if len(ids) else np.empty(0, np.int16),
                "time": one.first + part * one.width, "length_ns": np.full(len(vcpu), one.width), **times,
            })
        )  # fmt: skip
    schema = {"vm": pl.Int32, "vcpu": pl.Int16, "time": pl.Int64, "length_ns": pl.Int64}
    return _counted(
        recording, pl.concat([pl.DataFrame(schema=schema | dict.fromkeys(STATES, pl.Int64)), *frames]).lazy()
    )


def _counted(recording: Recording, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Restrict rows to the recording's window: its vCPUs, and what begins in it."""
    window = recording.window
    rows = rows if window.since is None else rows.filter(pl.col("time") >= window.since)
    return rows.filter(pl.col("vcpu").is_in(list(window.vcpus))) if window.vcpus else rows


@query(Recording, needs=("kvm_entry", "kvm_exit"))
def soft_hangs(recording: Recording) -> pl.LazyFrame:
    """Soft-hangs as recorded, by the usual rule: under 10 % of 100 ms or more in the guest, the longest first.

    `guest_ns` is without the switches to the guest and back, each of which takes `switch_ns`, as a replay measures it.
    Where the recording does not determine it, `switch_ns` is the most that it can be and `switch_low_ns` the least. VMs
    of which no replay can determine it are noted; if there are no others, Problem is raised. The recording is read when
    the query is made.
    """
    found: list[dict[str, Any]] = []
    unknown: dict[str, list[int]] = {}
    with_vcpus = [vm for vm in recording.times if vm.ids]
    for vm in with_vcpus:
        if vm.switch is None:
            unknown.setdefault(vm.unknown.removeprefix(f"{recording.path}: "), []).append(vm.vm)
            continue
        found += [
            {
                "vm": vm.vm,
                "vcpu": number,
                "time": one.begin,
                "length_ns": one.ns,
                "guest_ns": one.guest,
                "switch_low_ns": vm.switch.least,
                "switch_ns": vm.switch.ns,
            }
            for number, hangs in vm.stalls(Rule()).items()
            for one in hangs
        ]
    notes = [f"query soft_hangs: {vms_text(ids)}: {why}" for why, ids in unknown.items()]
    if unknown and all(vm.switch is None for vm in with_vcpus):
        raise Problem(f"{recording.path}: {notes[0]}")
    recording.note(*notes)
    order = ["length_ns", "vm", "vcpu", "time"]
    hangs = pl.LazyFrame(found, schema=HANGS).sort(order, descending=[True, False, False, False])
    return _counted(recording, hangs)


class Heat:
    """Counts installs of leaves by part of the time and by range of gfns, in at most `rows` ranges for each VM.

    All ranges of a VM have the same size, the smallest power of two pages that is enough. The answer has `vm`, `time`
    (the part's begin), `length_ns`, `gfn` (the range's begin), `pages` (its length) and `installs`, in no order.
    """

    columns = frozenset({"time", KIND, "gfn"})

    def __init__(self, recording: Recording, parts: int, rows: int) -> None:
        self.name = f"heat in {parts} parts and {rows} ranges"
        self._spans = recording.spans
        self._parts, self._rows = parts, rows

    def begin(self) -> _Heating:
        return _Heating({vm: (first, (last - first) // self._parts + 1) for vm, (first, last) in self._spans.items()},
                        self._rows)  # fmt: skip


class _Heating:
    """Counts installs; a VM's ranges are doubled whenever there are too many, for their number can only grow.

    A VM's cells are three arrays: the part of the time, the range (-1: installs without a gfn), and installs.
    """

    def __init__(self, widths: dict[int, tuple[int, int]], rows: int) -> None:
        self._widths, self._rows = widths, rows
        self._pages = dict.fromkeys(widths, 1)
        self._cells: dict[int, NDArray[np.int64]] = {}

    def feed(self, vm: int, rows: DecodedRows) -> None:
        at = np.flatnonzero(rows[KIND] == BY_NAME["kvm_mmu_set_spte"].code)
        if vm in self._widths and len(at):
            first, width = self._widths[vm]
            part = (rows["time"][at] - first) // width
            new = _cells(part, rows["gfn"][at] // self._pages[vm], np.ones_like(part))
            self._cells[vm] = self._aligned(vm, np.concatenate([self._cells.get(vm, _NO_CELLS), new], axis=1))

    def _aligned(self, vm: int, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the cells with ranges so long that there are few enough of them."""
        part, place, installs = cells
        while len(np.unique(place[place >= 0])) > self._rows:
            self._pages[vm] *= 2
            place = place // 2  # -1 stays
        return _cells(part, place, installs)

    def answer(self) -> pl.DataFrame:
        frames = [pl.DataFrame(schema=_HEAT)]
        for vm, (part, place, installs) in self._cells.items():
            (first, width), pages = self._widths[vm], self._pages[vm]
            columns = {
                "vm": np.full(len(part), vm), "time": first + part * width, "length_ns": np.full(len(part), width),
                "gfn": place * pages, "pages": np.full(len(part), pages), "installs": installs,
            }  # fmt: skip
            frames.append(pl.DataFrame(columns, schema=_HEAT))
        return pl.concat(frames).with_columns(pl.when(pl.col("gfn") >= 0).then("gfn"))


_NO_CELLS: Final = np.zeros((3, 0), np.int64)


def _cells(part: NDArray[np.int64], place: NDArray[np.int64], installs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return cells with their installs, each cell once."""
    order = np.lexsort((part, place))
    part, place, installs = part[order], place[order], installs[order]
    begins = np.flatnonzero(np.append(True, (part[1:] != part[:-1]) | (place[1:] != place[:-1])))
    return np.array((part[begins], place[begins], np.add.reduceat(installs, begins)))


@query(Recording, needs=("kvm_mmu_set_spte",), asks=lambda recording: [Heat(recording, PARTS // 4, ROWS // 2)])
def heat(recording: Recording, parts: int = PARTS // 4, rows: int = ROWS // 2) -> pl.LazyFrame:
    """Where in guest memory leaves were installed, and when: 100 parts of the time, up to 50 ranges of gfns.

    Ranges have one size and are aligned to it; those in which nothing was ever mapped are missing.
    """
    (cells,) = recording.ask(Heat(recording, parts, rows))
    return cells.lazy().sort("vm", "time", "gfn")


@query(Result)
def shares(result: Result, parts: int = PARTS, vm: int | None = None) -> pl.LazyFrame:
    """The share of time in the guest under each policy, in 400 parts of a VM's longest virtual time.

    `vm` restricts the answer to one VM.
    """
    of_clock = progress(result).drop_nulls(("clock", "guest_ns")).filter(pl.col("clock") >= 0)
    of_clock = of_clock if vm is None else of_clock.filter(pl.col("vm") == vm)
    rows = of_clock.select("policy", "recorded", "bound", "vm", "vcpu", "clock", "guest_ns").collect(engine="streaming")
    frames = []
    longest = dict(rows.group_by("vm").agg(pl.col("clock").max()).iter_rows())
    for key, of in rows.group_by("policy", "recorded", "bound", "vm", maintain_order=True):
        width = longest[key[3]] // parts + 1
        edges = np.arange(parts + 1) * width
        guest, passed = np.zeros(parts), np.zeros(parts)
        for _, vcpu in of.group_by("vcpu", maintain_order=True):
            one = vcpu.sort("clock")
            clock = one["clock"].to_numpy()
            guest += np.diff(np.interp(edges, clock, one["guest_ns"].to_numpy()))
            passed += np.diff(np.minimum(edges, clock[-1]))
        at = np.flatnonzero(passed > 0)
        frames.append(
            pl.DataFrame(dict(zip(("policy", "recorded", "bound", "vm"), key, strict=True))).join(
                pl.DataFrame({"clock": edges[at], "length_ns": np.minimum(width, passed[at].astype(np.int64)),
                              "guest_share": np.clip(guest[at] / passed[at], 0, 1)}),
                how="cross",
            )
        )  # fmt: skip
    schema = {
        "policy": pl.String, "recorded": pl.Boolean, "bound": pl.String, "vm": pl.Int32, "clock": pl.Int64,
        "length_ns": pl.Int64, "guest_share": pl.Float64,
    }  # fmt: skip
    return pl.concat([pl.DataFrame(schema=schema), *(frame.cast(schema) for frame in frames)]).lazy()  # type: ignore[arg-type]


@query(Result)
def refills(result: Result) -> pl.LazyFrame:
    """How many pages each root was filled with, in powers of two; `refill`: a root of its role word was there before.

    The pages of a root are the most leaves that it had at any of its events; a leaf of 4 KiB, 2 MiB or 1 GiB counts as
    one.
    """
    keys = ["policy", "recorded", "bound", "vm"]
    counted = (
        result.scan()
        .filter(pl.col("row") == "root", pl.col("leaves") >= 0)
        .group_by("policy", "bound", "vm", "root")
        .agg(pl.col("role").first(), pages=pl.col("leaves").max())
        .join(_policies(result), on="policy")
    )
    return _by_size(counted, keys)


@query(Recording, needs=("kvm_page_fault",), asks=lambda _: [UsedRoots()])
def fills(recording: Recording) -> pl.LazyFrame:
    """How many faults each root took, in powers of two; `refill`: a root of its role word was there before."""
    return _by_size(lives(recording).rename({"faults": "pages"}), ["vm"])


def _policies(result: Result) -> pl.LazyFrame:
    rows = [(policy.name, policy.recorded) for policy in result.policies]
    return pl.LazyFrame(rows, schema={"policy": pl.String, "recorded": pl.Boolean}, orient="row")


def _by_size(rows: pl.LazyFrame, keys: list[str]) -> pl.LazyFrame:
    """Group roots by `pages`: 0, [1, 1], [2, 3], [4, 7], and so on."""
    least = pl.when(pl.col("pages") > 0).then(2 ** pl.col("pages").log(2).floor()).otherwise(0).cast(pl.Int64)
    again = pl.col("root") > pl.col("root").min().over(*keys, "role")
    return (
        rows.with_columns(pages_from=least, refill=again)
        .group_by(*keys, "refill", "pages_from")
        .agg(roots=pl.len().cast(pl.Int64), pages=pl.col("pages").sum())
        .with_columns(pages_to=pl.max_horizontal(2 * pl.col("pages_from") - 1, 0))
        .sort(*keys, "refill", "pages_from")
        .select(*keys, "refill", "pages_from", "pages_to", "roots", "pages")
    )


PICTURED: Final = (lives, fills, heat)  # queries of a recording's rows that pictures need
