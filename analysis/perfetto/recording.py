# SPDX-License-Identifier: Apache-2.0
"""A trace as Perfetto tracks: for each VM its vCPUs, the tasks that zap its roots, and its roots.

What a vCPU did is taken from `replay.decode.spans.timeline`; adjacent spans of one kind are joined. A flow leads from
each SMI and RSM to the first fault in a root that was not there before, where the refill begins.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.perfetto.packets import Ints, PacketWriter
from analysis.reading.recorded_time import COLUMNS, RecordedTime, Spans, recorded_times, spans_of
from analysis.reading.sources import GuestOfVm
from replay.decode.batch import Batch
from replay.decode.spans.timeline import Timeline
from replay.decode.spans.vcpu_states import VcpuState
from replay.decode.vm_inputs import dense_numbers, vcpu_ids
from replay.timing.stalls import Rule
from traces import kernels
from traces.command_line.progress import Progress
from traces.kernels import roles
from traces.reader import Trace
from traces.schema import BY_NAME
from traces.text import printable
from traces.vm_names import VmNames

if TYPE_CHECKING:
    from traces.imports.guest_switches import GuestTasks

_RSM: Final = len(VcpuState)  # an SMM transition that leaves; VcpuState.SMM then is one that enters
NAMES: Final = (*("SMI" if doing == VcpuState.SMM else doing.name.lower() for doing in VcpuState), "RSM", "zap")
_ZAP: Final = NAMES.index("zap")
NOTES: Final = ("seq", "root")
_SMM: Final = BY_NAME["kvm_smm_transition"].code
_LOADS: Final = ("kvm_mmu_get_page", "root_get", "mmu_load")
_NEVER: Final = np.iinfo(np.int64).max


@dataclass
class Told:
    """How many rows were written, and what could not be shown as it is."""

    rows: int = 0
    clipped: int = 0  # ns of spans that would begin before the span before them ends: clocks of two CPUs
    unjudged: dict[str, list[int]] = field(default_factory=dict)  # by reason, the VMs whose soft-hangs are not known


def write(trace: Trace, writer: PacketWriter, rule: Rule, guest: GuestOfVm | None = None) -> Told:
    """Write every VM of a trace. Memory is a batch, the roots alive, and 16 bytes for each ms of each vCPU.

    `guest` is what was recorded inside one of the VMs; its tasks are drawn below that VM's vCPUs.
    """
    told = Told()
    writer.clocks(_samples(trace))
    threads = {each["tid"]: printable(each.get("comm", "")) for each in trace.metadata.threads if "tid" in each}
    with Progress("writing the timeline", trace.metadata.events) as progress:
        for vm, times in zip(trace.metadata.vms, recorded_times(trace), strict=True):
            if times.switch is None:
                told.unjudged.setdefault(times.unknown, []).append(int(vm["id"]))
            own = guest.tasks if guest is not None and guest.vm == int(vm["id"]) else None
            one = _Vm(trace, vm, writer, threads, told, times, own)
            numbers = dense_numbers(trace.path, vm)
            for rows in trace.batches(COLUMNS, vm=int(vm["id"])):
                one.feed(Batch(rows, numbers))
                told.rows += rows.num_rows
                progress.at(told.rows)
            one.finish(rule)
    return told


def _samples(trace: Trace) -> list[Mapping[str, int]]:
    clock = trace.metadata.raw.get("clock")
    samples = clock.get("samples") if isinstance(clock, dict) else None
    names = ("boot", "mono", "real")
    return [
        sample
        for sample in (samples if isinstance(samples, list) else [])
        if isinstance(sample, dict) and all(isinstance(n := sample.get(k), int) and 0 <= n < 1 << 63 for k in names)
    ]


def _there_before(trace: Trace, vm: Mapping[str, Any]) -> dict[int, int]:
    """Return the role words, by root id, of the roots that a VM had when the recording began."""
    # 5.10 has no event for the creation of a TDP root: there, a root without one may be new.
    if vm.get("origin") == "created" or trace.metadata.kernel.startswith("5.10."):
        return {}
    return {int(root["id"]): int(root["role"]) for root in trace.metadata.uncreated_roots if root["vm"] == vm["id"]}


class _Vm:
    def __init__(
        self,
        trace: Trace,
        vm: Mapping[str, Any],
        writer: PacketWriter,
        threads: Mapping[int, str],
        told: Told,
        times: RecordedTime,
        guest: GuestTasks | None,
    ) -> None:
        """`times` say where vCPUs hung, as far as that is known; `guest` says which tasks of the guest ran."""
        self._writer, self._threads, self._told = writer, threads, told
        name = VmNames(trace.metadata).vm(int(vm["id"]))
        self._track = writer.track(name, description=f"process {vm.get('pid') or 'not known'}, as recorded")
        ids = vcpu_ids(vm)
        self._vcpus: list[_Vcpu] = []
        self._times = times
        self._hangs: dict[int, int] = {}  # by vCPU, its track of soft-hangs
        for each in ids:
            about = "guest: from kvm_entry to kvm_exit, the switch there and back included"
            track = writer.track(f"vCPU {each}", self._track, description=about)
            self._vcpus.append(_Vcpu(writer, track, told))
            if times.switch is not None:
                about = f"guest time without the switch, {times.switch.text} each"
                self._hangs[each] = writer.track(f"vCPU {each} soft-hangs", self._track, description=about)
        self._guest = guest
        self._of_guest = {each: writer.track(f"vCPU {each} guest tasks", self._track) for each in ids if guest}
        self._timeline = Timeline(len(ids))
        self._workers: dict[int, int] = {}
        self._zaps: dict[int, tuple[int, int, int]] = {}
        self._roots = _Roots(writer, self._track, _there_before(trace, vm))
        self._newest = 0
        self._first = trace.metadata.spans.get(int(vm["id"]), (0, 0))[0]
        self._last = 0
        self._ended = False

    def feed(self, rows: Batch) -> None:
        if not len(rows):
            return
        self._last = max(self._last, int(rows.time.max()))
        if not self._ended:  # the time of vCPUs is split only so far, as in a replay
            own, self._ended = rows.of_vm()
            self._run(own)
        self._zap(rows)
        self._roots.feed(rows)

    def finish(self, rule: Rule) -> None:
        """End what is still open at the VM's last row."""
        for vcpu in self._vcpus:
            vcpu.finish()
        for number, stalls in self._times.stalls(rule).items():
            for stall in stalls:
                share = f"{stall.guest / stall.ns:.2%} in the guest"
                track = self._hangs[number]
                self._writer.span(track, stall.begin, stall.end, f"soft-hang, {share}", {"guest_ns": stall.guest})
        for number, track in self._of_guest.items():
            self._tasks(number, track)
        for tid, (begin, seq, root) in self._zaps.items():
            self._job(tid, np.array([[begin, self._last, seq, root]]))
        self._roots.finish(self._last)

    def _tasks(self, number: int, track: int) -> None:
        """Write which task of the guest ran on a vCPU, idle excepted, between the VM's first and last row."""
        assert self._guest is not None
        ran = self._guest.ran.filter(pl.col("cpu") == number).sort("time")
        ends = [*ran["time"].to_list()[1:], self._last]
        for begin, end, pid, task in zip(ran["time"], ends, ran["pid"], ran["task"], strict=True):
            begin, end = max(begin, self._first), min(end, self._last)
            if pid and begin < end:
                self._writer.span(track, begin, end, printable(task) or f"PID {pid}", {"pid": pid})

    def _run(self, rows: Batch) -> None:
        spans = spans_of(self._timeline, rows)
        at = spans.at
        what = spans.state.astype(np.int64)
        moved = rows.kind[at] == _SMM
        what[moved & (rows.flags[at] & 1 == 0)] = _RSM
        loads = rows.of(*_LOADS)
        root = np.zeros(len(rows), np.int64)
        root[loads] = rows.root[loads]
        newest = np.maximum(np.maximum.accumulate(root), self._newest)
        self._newest = int(newest[-1])
        for v in np.unique(spans.vcpu).tolist():
            start, stop = np.searchsorted(spans.vcpu, [v, v + 1])
            part = slice(int(start), int(stop))
            mine = at[part]
            runs = rows.seq[mine], rows.root[mine].astype(np.int64), newest[mine]
            self._vcpus[v].feed(spans, part, what[part], moved[part], runs)

    def _zap(self, rows: Batch) -> None:
        at = rows.of("zap_root_begin", "zap_root_end")
        at = at[rows.vcpu[at] < 0]
        begins = rows.kind[at] == BY_NAME["zap_root_begin"].code
        done: dict[int, list[tuple[int, int, int, int]]] = {}
        columns = (rows.tid[at], begins, rows.time[at], rows.seq[at], rows.root[at])
        for tid, begin, time, seq, root in zip(*(column.tolist() for column in columns), strict=True):
            if begin:
                self._zaps[tid] = (time, seq, root)
            elif tid in self._zaps:
                since, first, of = self._zaps.pop(tid)
                done.setdefault(tid, []).append((since, max(time, since), first, of))
        for tid, jobs in done.items():
            self._job(tid, np.array(jobs))

    def _job(self, tid: int, jobs: Ints) -> None:
        if tid not in self._workers:
            self._workers[tid] = self._writer.track(f"{self._threads.get(tid) or 'thread'} {tid}", self._track)
        begin, end, seq, root = jobs.T
        none = np.empty(0, np.int64)
        name = np.full(len(jobs), _ZAP)
        self._writer.spans(
            self._workers[tid], begin, end, name, {"seq": seq, "root": np.maximum(root, 0)}, (none, none)
        )


@dataclass
class _Runs:
    """Runs of adjacent spans of one kind, as arrays.

    `seq` is the row that ended the first span of a run; `moved` is whether that row is an SMM transition.
    """

    begin: Ints
    end: Ints
    what: Ints
    seq: Ints
    root: Ints
    newest: Ints
    moved: NDArray[np.bool_]


class _Vcpu:
    """Writes the track of one vCPU."""

    def __init__(self, writer: PacketWriter, track: int, told: Told) -> None:
        self._writer, self._track, self._told = writer, track, told
        self._held: _Runs | None = None  # the last run, which may continue in the next batch
        self._since = _NEVER  # the newest root at the last transition that no refill followed yet
        self._flow = 0
        self._end = 0

    def feed(
        self, spans: Spans, part: slice, what: Ints, moved: NDArray[np.bool_], rows: tuple[Ints, Ints, Ints]
    ) -> None:
        """`rows` are, for each span, the row that ends it, that row's root, and the newest root until then."""
        seq, root, newest = rows
        time, ns = spans.time[part], spans.ns[part]
        # Clocks of CPUs differ: a row that seems earlier than its thread's last one must not make spans cross.
        past = np.maximum.accumulate(np.append(self._end, time))
        end, before = past[1:], past[:-1]
        begin = np.maximum(time - ns, before)
        self._told.clipped += int(ns.sum() - (end - np.minimum(begin, end)).sum())
        begin = np.where(ns > 0, begin, end)
        self._end = int(end[-1])
        fresh = _Runs(begin, end, self._told_apart(what, moved), seq, root, newest, moved)
        whole = fresh if self._held is None else _joined(self._held, fresh)
        runs = _merged(whole)
        self._held = _cut(runs, slice(-1, None))
        self._write(_cut(runs, slice(0, -1)))

    def finish(self) -> None:
        if self._held is not None:
            self._write(self._held)

    def _told_apart(self, what: Ints, moved: NDArray[np.bool_]) -> Ints:
        """Return `what`, with spans that continue an RSM named RSM as well."""
        carried = np.flatnonzero((what == VcpuState.SMM) & ~moved)
        if not len(carried):
            return what
        own = np.where(moved, np.arange(len(what)), -1)
        at = np.maximum.accumulate(own)[carried]
        held = self._held.what[-1] if self._held is not None and len(self._held.what) else VcpuState.SMM
        what = what.copy()
        what[carried] = np.where(at >= 0, what[np.maximum(at, 0)], held if held == _RSM else VcpuState.SMM)
        return what

    def _write(self, runs: _Runs) -> None:
        shown = (runs.end > runs.begin) | runs.moved
        runs = _cut(runs, shown)
        if not len(runs.begin):
            return
        at, flow = self._flows(runs)
        root = np.maximum(runs.root, 0)
        self._writer.spans(self._track, runs.begin, runs.end, runs.what, {"seq": runs.seq, "root": root}, (at, flow))

    def _flows(self, runs: _Runs) -> tuple[Ints, Ints]:
        """Return the places and ids of the flows that begin or end in these runs."""
        moves = np.flatnonzero(runs.moved)
        ids = runs.seq[moves] + 1  # the transition's row number plus 1, because Perfetto's ids are not 0
        of = np.searchsorted(moves, np.arange(len(runs.begin)), "right")
        since = np.append(self._since, runs.newest[moves])
        flow = np.append(self._flow, ids)
        refills = np.flatnonzero((runs.what == VcpuState.FAULT) & (runs.root > since[of]))
        refills = refills[np.unique(of[refills], return_index=True)[1]]
        since[of[refills]] = _NEVER
        self._since, self._flow = int(since[-1]), int(flow[-1])
        places = np.concatenate([moves, refills])
        order = np.argsort(places, kind="stable")
        return places[order], np.concatenate([ids, flow[of[refills]]])[order]


def _cut(runs: _Runs, part: Any) -> _Runs:
    return _Runs(*(values[part] for values in vars(runs).values()))


def _joined(first: _Runs, second: _Runs) -> _Runs:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return _Runs(*(np.concatenate(pair) for pair in pairs))


def _merged(runs: _Runs) -> _Runs:
    # A transition always begins a run of its own.
    starts = np.flatnonzero(np.append(True, (runs.what[1:] != runs.what[:-1]) | runs.moved[1:]))
    ends = np.append(starts[1:], len(runs.what)) - 1
    root = np.maximum.reduceat(runs.root, starts)
    return _Runs(
        runs.begin[starts], runs.end[ends], runs.what[starts], runs.seq[starts], root, runs.newest[starts],
        runs.moved[starts],
    )  # fmt: skip


@dataclass
class _Lanes:
    """Tracks of one name, lanes, each of which shows one root at a time."""

    tracks: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)


@dataclass
class _Root:
    begin: int
    seq: int
    lanes: _Lanes
    lane: int
    name: str


class _Roots:
    """Draws each root from its creation, or the first row that names it, until its table is freed."""

    def __init__(self, writer: PacketWriter, parent: int, there: Mapping[int, int]) -> None:
        """`there` has the role words of roots that existed before the recording began, by root id."""
        self._writer, self._parent, self._there = writer, parent, there
        self._alive: dict[int, _Root] = {}
        self._of: dict[int, _Lanes] = {}
        self._begun = False

    def feed(self, rows: Batch) -> None:
        if not self._begun:
            self._begun = True
            for root, role in self._there.items():
                self._born(root, role, int(rows.time[0]), int(rows.seq[0]), " (there before)")
        loads = rows.of(*_LOADS)
        loads = loads[rows.root[loads] > 0]
        loads = loads[np.sort(np.unique(rows.root[loads], return_index=True)[1])]
        frees = rows.of("table_free")
        frees = frees[rows.root[frees] > 0]
        gone = set(frees.tolist())
        for at in np.sort(np.concatenate([loads, frees])).tolist():
            root, time = int(rows.root[at]), int(rows.time[at])
            if at in gone:
                self._freed(root, time)
            elif root not in self._alive:
                self._born(root, int(rows.role[at]), time, int(rows.seq[at]), "")

    def finish(self, time: int) -> None:
        for root in list(self._alive):
            self._freed(root, time, " (not freed)")

    def _born(self, root: int, role: int, time: int, seq: int, remark: str) -> None:
        lanes = self._of.setdefault(role, _Lanes())
        if lanes.free:
            lane = heapq.heappop(lanes.free)
        else:
            smm = roles.states(np.array([role], np.uint32), kernels.at("6.1").layout)[0] & roles.SMM
            name = f"roots of role {role:#010x}{' (SMM)' if smm else ''}"
            lanes.tracks.append(self._writer.track(name, self._parent))
            lane = len(lanes.tracks) - 1
        self._alive[root] = _Root(time, seq, lanes, lane, f"root {root}{remark}")

    def _freed(self, root: int, time: int, remark: str = "") -> None:
        one = self._alive.pop(root, None)
        if one is None:
            return
        heapq.heappush(one.lanes.free, one.lane)
        track = one.lanes.tracks[one.lane]
        self._writer.span(track, one.begin, max(time, one.begin), one.name + remark, {"seq": one.seq})
