# SPDX-License-Identifier: Apache-2.0
"""Perfetto files, parsed back with the package's definitions: spans, roots, workers and flows are those of the file."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

from analysis.perfetto import export
from analysis.perfetto.packets import PacketWriter
from analysis.reading.recorded_time import recorded_times
from analysis.reading.result_source import Result
from analysis.reading.sources import open_source
from replay.decode.capabilities import Capabilities
from replay.decode.spans.vcpu_states import VcpuState
from replay.decode.vm_inputs import VmInputs, vcpu_ids
from replay.result import KEY
from replay.timing.measuring.measure import SpanTimes
from tests.thinned import thinned
from tests.verbs import printed
from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.outputs import TIMELINE, Output
from traces.reader import Trace
from traces.synth import Parameters, synthesize

pytestmark = pytest.mark.xdist_group("perfetto")  # one storm for all of them

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
NAMES = tuple(state.name.lower() for state in VcpuState)


@dataclass
class Slice:
    track: str
    group: str
    name: str
    begin: int
    end: int
    notes: dict[str, Any]
    flows: list[int]


@dataclass
class Parsed:
    slices: list[Slice] = field(default_factory=list)
    counters: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def of(self, track: str, group: str = "") -> list[Slice]:
        return [each for each in self.slices if each.track == track and group in each.group]


def parsed(path: Path) -> Parsed:
    """What a viewer makes of the file: packets in order of time, those of one time in order of the file."""
    trace = pb.Trace.FromString(path.read_bytes())
    tracks = {
        packet.track_descriptor.uuid: packet.track_descriptor
        for packet in trace.packet
        if packet.HasField("track_descriptor")
    }
    names: dict[int, str] = {}
    annotations: dict[int, str] = {}
    for packet in trace.packet:
        names |= {each.iid: each.name for each in packet.interned_data.event_names}
        annotations |= {each.iid: each.name for each in packet.interned_data.debug_annotation_names}
    found = Parsed()
    stacks: dict[int, list[Slice]] = defaultdict(list)
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    for packet in sorted(events, key=lambda packet: packet.timestamp):
        event = packet.track_event
        track = tracks[event.track_uuid]
        group = tracks[track.parent_uuid].name
        if event.type == pb.TrackEvent.TYPE_COUNTER:
            found.counters[group, track.name].append((packet.timestamp, event.double_counter_value))
        elif event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            assert packet.sequence_flags & pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
            notes = {
                each.name or annotations[each.name_iid]: each.string_value or each.int_value
                for each in event.debug_annotations
            }
            name = event.name or names[event.name_iid]
            stacks[event.track_uuid].append(
                Slice(track.name, group, name, packet.timestamp, -1, notes, list(event.flow_ids))
            )
        else:
            ended = stacks[event.track_uuid].pop()
            ended.end = packet.timestamp
            found.slices.append(ended)
    assert not any(stacks.values()), "a span without an end"
    return found


def exported(source: Path, out: Path) -> Parsed:
    export(open_source(source), out)
    return parsed(out)


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vCPU whose roots go at each SMI, which soft-hangs it."""
    path = tmp_path_factory.mktemp("storm") / "storm.parquet"
    synthesize(path, Parameters(policy="async", smi_rate=2000, working_set=3000, events=600_000))
    return path


@pytest.fixture(scope="module")
def result(storm: Path) -> Path:
    out = storm.with_name("result.parquet")
    printed("replay", str(storm), "-o", str(out))
    return out


RECORDINGS = [
    "smi-storm-6.1-async", "smi-storm-6.1", "smi-storm-5.10", "two-vms-6.1-async", "slot-delete-6.1-async",
    "smi-both-7.x", "huge-6.12-shadow",
]  # fmt: skip


@pytest.mark.parametrize("name", [*thinned(2, RECORDINGS), pytest.param("synthetic", marks=pytest.mark.slow)])
def test_spans_sum_up_to_the_times_of_the_replay(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue("storm") if name == "synthetic" else CORPUS / f"{name}.parquet"
    found = exported(source, tmp_path / "out.pftrace")
    trace = Trace.open(source)
    seen = 0
    for vm in trace.metadata.vms:
        times = SpanTimes(Capabilities(trace), vm)
        for _ in VmInputs(Capabilities(trace), vm, times=times):
            pass
        ids, timeline = vcpu_ids(vm), times.timeline
        # A prefetch is part of its fault in pictures.
        timeline.totals[:, VcpuState.FAULT] += timeline.totals[:, VcpuState.PREFETCH]
        timeline.totals[:, VcpuState.PREFETCH] = 0
        for number, totals in zip(ids, timeline.totals.tolist(), strict=True):
            sums: Counter[str] = Counter()
            for each in found.of(f"vCPU {number}", f"VM {vm['id']} "):
                sums[{"SMI": "smm", "RSM": "smm"}.get(each.name, each.name)] += each.end - each.begin
            assert {k: v for k, v in sums.items() if v} == {n: t for n, t in zip(NAMES, totals, strict=True) if t}
            seen += sum(totals)
    assert seen > 0


@pytest.mark.slow
def test_spans_sum_up_to_the_result(storm: Path, result: Path, tmp_path: Path) -> None:
    found = exported(storm, tmp_path / "out.pftrace")
    rows = pl.read_parquet(result).filter(pl.col("row").cast(pl.String) == "vcpu")
    assert len(rows) >= 2
    for vcpu, recorded in rows.select("vcpu", "recorded_ns").iter_rows():
        assert sum(each.end - each.begin for each in found.of(f"vCPU {vcpu}")) == recorded > 0


@pytest.mark.slow
def test_spans_of_a_vcpu_neither_cross_nor_leave_a_gap(storm: Path, tmp_path: Path) -> None:
    found = exported(storm, tmp_path / "out.pftrace")
    spans = found.of("vCPU 0")
    assert len(spans) > 1000
    for before, after in itertools.pairwise(spans):
        assert before.end == after.begin
        assert before.name != after.name or after.name in ("SMI", "RSM")


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 97])
def test_batches_cut_no_span(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CORPUS / "smi-both-6.1-async.parquet"
    whole = exported(source, tmp_path / "whole.pftrace")
    batches = Trace.batches
    # The costs are as whole batches give them: a replay's batches are not this test's.
    times = recorded_times(Trace.open(source))
    monkeypatch.setattr("analysis.perfetto.recording.recorded_times", lambda _: times)
    monkeypatch.setattr(
        Trace, "batches", lambda self, columns, **asked: batches(self, columns, **{**asked, "size": size})
    )
    cut = exported(source, tmp_path / "cut.pftrace")
    key = lambda each: (each.group, each.track, each.begin, each.end, each.name)  # noqa: E731
    assert sorted(cut.slices, key=key) == sorted(whole.slices, key=key)


def test_roots_live_from_creation_to_free(tmp_path: Path) -> None:
    source = CORPUS / "smi-storm-6.1-async.parquet"
    found = exported(source, tmp_path / "out.pftrace")
    rows = pl.read_parquet(source).with_columns(pl.col("kind").cast(pl.String))
    born = rows.filter(pl.col("kind") == "kvm_mmu_get_page", pl.col("root") > 0, pl.col("flags") & 1 == 1)
    freed = dict(rows.filter(pl.col("kind") == "table_free", pl.col("root") > 0).select("root", "time").iter_rows())
    roots = [each for each in found.slices if each.track.startswith("roots of role")]
    assert len(born) == len(roots) == 9
    by_name = {each.name: each for each in roots}
    for root, time, role in born.select("root", "time", "role").iter_rows():
        one = by_name[f"root {root}" if root in freed else f"root {root} (not freed)"]
        assert one.begin == time
        assert one.end == freed.get(root, rows["time"].max())
        assert one.track == f"roots of role {role:#010x}" + (" (SMM)" if role >> 24 else "")
    assert sum(each.track.endswith("(SMM)") for each in roots) == 4


def test_workers_zap(tmp_path: Path) -> None:
    source = CORPUS / "smi-storm-6.1-async.parquet"
    found = exported(source, tmp_path / "out.pftrace")
    rows = pl.read_parquet(source).filter(
        pl.col("vcpu").is_null(), pl.col("kind").cast(pl.String).str.starts_with("zap_root")
    )
    zaps = [each for each in found.slices if each.name == "zap" and not each.track.startswith("vCPU")]
    wanted = []
    for (tid,), of in rows.group_by("tid"):
        times = of["time"].to_list()  # a task zaps one at a time: begin, end, begin, end
        wanted += [(begin, end, str(tid)) for begin, end in zip(times[::2], times[1::2], strict=True)]
    assert sorted(wanted) == sorted((each.begin, each.end, each.track.split()[-1]) for each in zaps)
    begins = rows.filter(pl.col("kind").cast(pl.String) == "zap_root_begin")
    assert [each.notes["root"] for each in sorted(zaps, key=lambda each: each.begin)] == begins["root"].to_list()
    assert any(each.track.startswith("kworker/") for each in zaps)


@pytest.mark.parametrize(("name", "refills"), [("smi-storm-6.1-async", 8), ("smi-storm-6.1", 1), ("smi-storm-5.10", 8)])
def test_flows_lead_from_smis_to_refills(name: str, refills: int, tmp_path: Path) -> None:
    source = CORPUS / f"{name}.parquet"
    found = exported(source, tmp_path / "out.pftrace")
    rows = pl.read_parquet(source).with_columns(pl.col("kind").cast(pl.String))
    smm = rows.filter(pl.col("kind") == "kvm_smm_transition")["time"].to_list()
    ends: dict[int, list[Slice]] = defaultdict(list)
    for each in found.slices:
        for flow in each.flows:
            ends[flow].append(each)
    assert sorted(each.end for each in found.slices if each.name in ("SMI", "RSM")) >= smm
    assert len(ends) == len(smm) == 8
    led = [each for each in ends.values() if len(each) == 2]
    assert len(led) == refills
    for cause, fault in led:
        assert cause.name in ("SMI", "RSM")
        assert fault.name == "fault"
        assert fault.begin >= cause.end
        assert not any(cause.end < time <= fault.begin for time in smm), "another transition came between"
        before = rows.filter(pl.col("time") <= cause.end)["root"].max()
        assert fault.notes["root"] > before, "that root was there before"


@pytest.mark.slow
def test_soft_hangs_of_a_recording(storm: Path, tmp_path: Path) -> None:
    found = exported(storm, tmp_path / "out.pftrace")
    hangs = [each for each in found.slices if each.track.endswith("soft-hangs")]
    assert hangs
    assert all(each.end - each.begin >= 100_000_000 and "in the guest" in each.name for each in hangs)


def test_without_entries_soft_hangs_are_not_known(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "golden" / "trace-1.0.parquet"
    remarks = export(open_source(source), tmp_path / "out.pftrace")
    assert remarks
    assert all("soft-hangs are not known" in each for each in remarks)


def test_vms_are_named_and_one_that_never_ran_hides_no_other(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"
    (remark,) = export(open_source(source), tmp_path / "out.pftrace")
    assert b"VM 4 (fieldvm 110)" in (tmp_path / "out.pftrace").read_bytes()
    assert remark.startswith("VM 1 (fieldvm 98), VM 10 (fieldvm 113), VM 11 (fieldvm 113), and 13 more: soft-hangs are")


@pytest.mark.slow
def test_stalls_and_shares_of_a_result(result: Path, tmp_path: Path) -> None:
    found = exported(result, tmp_path / "out.pftrace")
    rows = pl.read_parquet(result).with_columns(pl.col("row", "policy", "bound", "cause").cast(pl.String))
    began = {vm.vm: vm.began for vm in Result.open(result).vms}
    stalls = rows.filter(pl.col("row") == "stall")
    assert len(stalls) >= 1
    wanted = []
    for row in stalls.iter_rows(named=True):
        group, begin = f"{row['policy']} ({row['bound']}): VM {row['vm']}", began[row["vm"]] + row["clock"]
        track, end = f"vCPU {row['vcpu']} soft-hangs", begin + row["wall_ns"]
        wanted.append((group, track, begin, end, row["guest_ns"], row["cause"]))
    assert sorted(wanted) == sorted(
        (each.group, each.track, each.begin, each.end, each.notes["guest_ns"], each.notes["cause"])
        for each in found.slices
    )
    progress = rows.filter(pl.col("row") == "progress")
    assert len(found.counters) == progress.select("policy", "bound", "vm", "vcpu").n_unique() >= 2
    for (group, track), samples in found.counters.items():
        policy, vcpu = group.split(" (")[0], int(track.split()[1])
        one = progress.filter(pl.col("policy") == policy, pl.col("vcpu") == vcpu)
        ends = [time for time, _ in samples[1:]] + [began[1] + int(one["clock"].max())]
        ran = sum(share * (end - time) for (time, share), end in zip(samples, ends, strict=True)) / 100
        assert ran == pytest.approx(one["guest_ns"].max())


@given(
    st.lists(st.tuples(st.integers(0, 1 << 61), st.integers(0, 1 << 61), st.integers(0, 3)), min_size=1, max_size=9),
    st.data(),
)
def test_bulk_packets_hold_the_numbers(spans: list[tuple[int, int, int]], data: st.DataObject) -> None:
    begin, length, name = (np.array(column, np.int64) for column in zip(*spans, strict=True))
    at = np.array(sorted(data.draw(st.sets(st.integers(0, len(spans) - 1)))), np.int64)
    flow = np.array(data.draw(st.lists(st.integers(1, 1 << 62), min_size=len(at), max_size=len(at))), np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bulk.pftrace"
        with Output(path, TIMELINE) as output:
            writer = PacketWriter(output, ("a", "b", "c", "d"), ("seq",))
            track = writer.track("t")
            writer.spans(track, begin, begin + length, name, {"seq": length}, (at, flow))
            writer.flush()
        trace = pb.Trace.FromString(path.read_bytes())
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    flows = dict(zip(at.tolist(), flow.tolist(), strict=True))
    assert len(trace.packet) == writer.packets
    for i, (start, stop) in enumerate(zip(events[::2], events[1::2], strict=True)):
        assert (start.timestamp, stop.timestamp) == (spans[i][0], spans[i][0] + spans[i][1])
        assert start.track_event.name_iid == spans[i][2] + 1
        assert start.track_event.debug_annotations[0].int_value == spans[i][1]
        assert list(start.track_event.flow_ids) == ([flows[i]] if i in flows else [])


def test_an_export_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Problem, match="cannot be written"):
        exported(CORPUS / "huge-6.1.parquet", tmp_path / "none" / "out.pftrace")
    out = tmp_path / "out.pftrace"
    monkeypatch.setattr(Progress, "at", lambda self, done: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        export(open_source(CORPUS / "huge-6.1.parquet"), out)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out.pftrace"
    command = [sys.executable, "-m", "kvmtrace", "export", CORPUS / "huge-6.1.parquet", "-o", out]
    done = subprocess.run([*command, "--perfetto"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert f"{out.stat().st_size:,} bytes" in done.stderr
    assert parsed(out).slices
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


@pytest.mark.parametrize(
    ("column", "value"),
    [("clock", None), ("clock", -1), ("clock", 1 << 62), ("guest_ns", -5), ("vm", 77), ("vcpu", None)],
)
def test_times_that_no_clock_shows_are_damage(result: Path, column: str, value: int | None, tmp_path: Path) -> None:
    rows = pq.read_table(result)
    row = [str(each) for each in rows["row"].to_pylist()].index("progress")
    values = rows[column].to_pylist()
    values[row] = value
    at = rows.schema.get_field_index(column)
    rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    meta = {KEY: pq.read_metadata(result).metadata[KEY]}
    pq.write_table(rows.replace_schema_metadata(meta), tmp_path / "bad.parquet")
    with pytest.raises(Problem, match="damaged"):
        exported(tmp_path / "bad.parquet", tmp_path / "out.pftrace")
    assert [each.name for each in tmp_path.iterdir()] == ["bad.parquet"]
