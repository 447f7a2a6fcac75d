# SPDX-License-Identifier: Apache-2.0
"""Rows through the keeper: dumps are ordinary traces whose rows, states and counts are those of their window."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from analysis.report_model.trust import made_on
from tests.flight.rows import KVM, Flight, entries, root, row, vm
from tracer.flight.keeper import SECOND, Request
from tracer.flight.quotas import Quota
from traces.dump_texts import dump_texts
from traces.errors import Problem
from traces.reader import Trace
from traces.recording.segments import SegmentReader
from traces.schema import BY_NAME
from traces.summary import render

pytestmark = pytest.mark.slow

MS = 10**6


def ask(flight: Flight, at: int, trigger: str = "manual", text: str = "") -> Request:
    request = Request(trigger, text, at=at)
    flight.thread.ask(request)
    flight.thread.tick()
    return request


def times(path: Path) -> list[int]:
    return [time for batch in Trace.open(path).batches(["time"]) for time in batch.column("time").to_pylist()]


def test_a_dump_has_the_rows_up_to_its_end_and_those_after_are_in_the_next(tmp_path: Path) -> None:
    flight = Flight(tmp_path, after=0.5)
    flight.give(entries(SECOND, 1000, MS), 2 * SECOND - 1)
    ask(flight, SECOND + 500 * MS, text="first")
    flight.give(entries(2 * SECOND, 1000, MS), 3 * SECOND)
    ask(flight, 3 * SECOND, "other")
    flight.give(entries(3 * SECOND, 1000, MS), 4 * SECOND)
    first, second = flight.close()
    assert (min(times(first)), max(times(first))) == (SECOND, 2 * SECOND)
    assert (min(times(second)), max(times(second))) == (SECOND, 3 * SECOND + 500 * MS)
    assert len(times(second)) == 2501
    for path in (first, second):
        meta = Trace.open(path).metadata
        assert meta.complete, meta.discrepancies
        assert meta.lost == 0
    assert Trace.open(first).metadata.raw["flight"]["text"] == "first"


def test_a_window_begins_from_the_last_state_that_it_needs(tmp_path: Path) -> None:
    flight = Flight(tmp_path, seconds=1e-9)
    flight.give(entries(SECOND, 100, MS), 2 * SECOND)
    other = vm(KVM + 0x1000, tgid=9, tables=(77,))
    flight.thread._wanted = True  # as when one is being taken
    flight.give(root(True, 2 * SECOND + 5, 78, KVM + 0x1000), 2 * SECOND + 10)
    flight.checkpoint(2 * SECOND, 2 * SECOND + 50 * MS, vm(), other)
    flight.give(entries(2 * SECOND + MS, 100, MS), 3 * SECOND)
    ask(flight, 3 * SECOND)
    (dump,) = flight.close()
    meta = Trace.open(dump).metadata
    assert min(times(dump)) == 2 * SECOND + 51 * MS, "rows before the state are none of the window"
    assert [each["origin"] for each in meta.vms] == ["snapshot", "snapshot"]
    assert {(each["vm"], each["table"]) for each in meta.uncreated_roots} == {(2, 77), (2, 78)}
    assert meta.raw["flight"]["state_at"] == 2 * SECOND + 50 * MS
    assert meta.complete, meta.discrepancies


def test_a_state_that_vms_change_under_is_taken_again_and_then_said_to_be_so(tmp_path: Path) -> None:
    flight = Flight(tmp_path, seconds=1e-9)
    wanted: list[None] = []
    flight.thread.want_checkpoint = lambda: wanted.append(None)
    for number in range(1, 8):
        at = number * SECOND
        flight.give(entries(at, 10, MS), at + 20 * MS)
        flight.give(row("memslot", at + 30 * MS, kvm=KVM), at + 40 * MS)
        flight.checkpoint(at + 25 * MS, at + 35 * MS)
        flight.give(entries(at + 50 * MS, 1), at + 60 * MS)
    ask(flight, 8 * SECOND)
    (dump,) = flight.close()
    facts = Trace.open(dump).metadata.raw["flight"]
    assert facts["state_settled"] is False
    assert facts["state_at"] > 6 * SECOND
    assert len(wanted) >= 6


def test_events_that_never_came_out_of_a_ring_make_a_dump_incomplete(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 100, MS), 2 * SECOND)
    flight.counters["emitted"][1, 20] += 3
    flight.checkpoint(2 * SECOND, 2 * SECOND + MS)
    flight.give(entries(2 * SECOND + 2 * MS, 5), 3 * SECOND)
    ask(flight, 3 * SECOND)
    (dump,) = flight.close()
    meta = Trace.open(dump).metadata
    assert meta.discrepancies == ("kvm_entry: 108 emitted, but 105 stored and 0 lost",)


def test_what_was_lost_is_in_the_dumps_loss(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 100, MS), 2 * SECOND)
    flight.counters["emitted"][0, 20] += 7
    flight.counters["lost"][0, 20] += 7
    gap = row("gap", 2 * SECOND + 1, w0=7, w1=1 << 20, w2=2 * SECOND)
    flight.give(np.concatenate([gap, entries(2 * SECOND + 2, 1)]), 3 * SECOND)
    flight.counters["emitted"][1, 20] += 2
    flight.counters["lost"][1, 20] += 2
    for name, value in (("gap_count", 2), ("gap_kinds", 1 << 20), ("gap_since", 2 * SECOND)):
        flight.counters[name][1] = value
    ask(flight, 3 * SECOND)
    (dump,) = flight.close()
    meta = Trace.open(dump).metadata
    assert meta.complete, meta.discrepancies
    assert meta.lost_of("kvm_entry") == 9
    assert sorted(gap["lost"] for gap in meta.gaps) == [2, 7], "the one that is still open too"


def test_many_who_ask_at_once_share_a_dump(tmp_path: Path) -> None:
    flight = Flight(tmp_path, after=0.1)
    flight.give(entries(SECOND, 10, MS), SECOND)
    requests = [ask(flight, SECOND, text=f"{number % 3}") for number in range(1000)]
    flight.give(entries(2 * SECOND, 10, MS), 3 * SECOND)
    (dump,) = flight.close()
    assert {request.answer.result() for request in requests} == {dump}
    assert Trace.open(dump).metadata.raw["flight"]["also"] == {"0": 333, "1": 333, "2": 333}


def test_a_quota_refuses_with_a_line_and_the_next_dump_says_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.flight.keeper.MANUAL", Quota(hour=2, day=9))
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 10, MS), SECOND)
    at = SECOND
    for _ in range(2):
        ask(flight, at).answer.result(60)
        at += MS
        flight.give(entries(at, 1), at + 1)
    for _ in range(5):
        with pytest.raises(Problem, match="no dump: manual has made all that it may: 2 an hour, 9 a day"):
            ask(flight, at).answer.result(60)
    ask(flight, at, "signal")
    dumps = flight.close()
    assert len(dumps) == 3
    assert Trace.open(dumps[-1]).metadata.raw["flight"]["refused"]["manual"]["count"] == 5


def test_a_disk_that_refuses_is_one_line_and_the_flight_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 100_000, 1000), 2 * SECOND)
    held = flight.thread.window.held
    with monkeypatch.context() as full:
        full.setattr("traces.durable.write_all", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        refused = ask(flight, 2 * SECOND)
        with pytest.raises(Problem, match="No space left on device"):
            refused.answer.result(60)
    again = ask(flight, 2 * SECOND, "other")
    assert len(times(again.answer.result(60))) == 100_000
    assert flight.thread.window.held >= held, "nothing that is kept went with it"
    flight.close()
    failed, made = capsys.readouterr().err.splitlines()
    assert failed.endswith("no dump: No space left on device: make room")
    assert made == f"kvmtrace: {again.answer.result()}: dumped: other"


def test_a_dump_by_hand_that_could_not_be_written_uses_up_no_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.flight.keeper.MANUAL", Quota(hour=2, day=2))
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 10, MS), 2 * SECOND)
    with monkeypatch.context() as full:
        full.setattr("traces.durable.write_all", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        for _ in range(5):
            with pytest.raises(Problem, match="No space left on device"):
                ask(flight, 2 * SECOND).answer.result(60)
    paths = [ask(flight, 2 * SECOND).answer.result(60) for _ in range(2)]
    with pytest.raises(Problem, match="manual has made all that it may"):
        ask(flight, 2 * SECOND).answer.result(60)
    assert flight.close() == paths


def test_a_dump_says_why_it_was_made_where_nobody_was_there_and_in_info_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tracer.flight.keeper.AUTOMATIC", Quota(hour=1, day=9))
    flight = Flight(tmp_path, after=0.5)
    flight.give(entries(SECOND, 10, MS), 2 * SECOND)
    for number in range(4):
        at = (2 + number) * SECOND
        request = Request("zap", f"process 7: zap {number}", manual=False, severity=1, at=at)
        flight.thread.ask(request)
        flight.give(entries(at, 10, MS), at + SECOND - 1)
        assert (request.answer.exception(60) is None) == (number == 0)
    ask(flight, 6 * SECOND, text="web1 hangs")
    zap, manual = flight.close()
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        [  # two threads say them
            f"kvmtrace: {zap}: dumped: zap: process 7: zap 0",
            "kvmtrace: zap: no dump, for it has made its 1 an hour or 9 a day: the next ones are only counted "
            "(process 7: zap 1)",
            f"kvmtrace: {manual}: dumped: manual: web1 hangs",
        ]
    )
    assert dump_texts(Trace.open(zap).metadata)[0] == "made by the trigger zap: process 7: zap 0"
    assert dump_texts(Trace.open(zap).metadata)[1].endswith("500 ms before its end")
    by_hand = dump_texts(Trace.open(manual).metadata)
    assert by_hand[0] == "asked for by hand (`kvmtrace dump`): web1 hangs"
    assert "zap: 3 times no dump before this one, for its quota was used up" in by_hand
    for path in (zap, manual):
        meta = Trace.open(path).metadata
        assert [line for name, line in made_on(meta, meta.span) if name == "dump"] == dump_texts(meta)
        assert dump_texts(meta)[0].split(":")[0] in render(path)


@pytest.mark.usefixtures("own_process")
def test_dumps_that_a_killed_recorder_left_become_traces_at_the_next_start(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.thread.dumps._hard = True
    flight.give(entries(SECOND, 1000, MS), 2 * SECOND)
    ask(flight, 2 * SECOND)
    assert flight.close() == []
    (left,) = tmp_path.glob("*.kvmt")
    assert sum(len(columns["time"]) for _, columns in SegmentReader(left).batches()) == 1000
    Flight(tmp_path).close()
    assert len(times(left.with_suffix(".parquet"))) == 1000
    assert not left.exists()


def test_a_trigger_dumps_with_what_it_found_and_once_while_it_lasts(tmp_path: Path) -> None:
    flight = Flight(tmp_path, after=0.2, triggers=["same-gfn > 100"])
    for number in range(10):
        at = SECOND + number * 100 * MS
        rows = entries(at, 100, MS)
        if number >= 3:
            rows["kind"], rows["w0"], rows["tgid"] = BY_NAME["kvm_page_fault"].code, 0x5000, 9
        flight.give(rows, at + 100 * MS - 1)
    (dump,) = flight.close()
    facts = Trace.open(dump).metadata.raw["flight"]
    assert facts["trigger"] == "same-gfn"
    assert facts["text"].startswith("vCPU 0 of process 9: ")
    assert facts["text"].endswith("faults at gfn 0x5")
    assert facts["manual"] is False
    assert facts["triggers"] == ["same-gfn > 100"]
    assert max(times(dump)) <= facts["time"] + 200 * MS
    assert min(times(dump)) == SECOND, "what was before it began is there"
    assert dump.name.endswith("-same-gfn.parquet")


def test_who_asks_when_it_is_over_is_told(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.close()
    late = Request("manual")
    flight.thread.ask(late)
    with pytest.raises(Problem, match="the recorder is ending"):
        late.answer.result(1)
