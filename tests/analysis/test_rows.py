# SPDX-License-Identifier: Apache-2.0
"""Questions about rows: what a pass in batches answers is what the rows say together, and there is one pass."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from analysis.formats import drawn as drawn_by
from analysis.formats import renderer
from analysis.queries import drawn, recorded
from analysis.reading import rows
from analysis.reading.rows import DecodedRows, Tallies, Tally
from analysis.reading.sources import Recording
from analysis.report_model.assemble import asked
from analysis.reporting import Wanted, reported
from tests.analysis.sources import CORPUS
from traces.errors import Problem
from traces.kernels import policy_rows
from traces.reader import Trace

TWO_VMS = CORPUS / "two-vms-6.1-async.parquet"
FEW = len(policy_rows.COLUMNS)  # columns, of the first rows: for the root policy, when a trace is opened


NUMBERED = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(1, 3)), st.integers(0, 4), st.one_of(st.none(), st.integers(-9, 9)))
)


@given(NUMBERED, st.lists(st.integers(0, 60)), st.integers(1, 20))
def test_any_rows_in_any_parts(values: list[tuple[int | None, int, int | None]], cuts: list[int], at_once: int) -> None:
    schema = {"vm": pl.Int32, "key": pl.Int8, "value": pl.Int64}
    every = pl.DataFrame(values, schema=schema, orient="row")
    value = pl.col("value")
    tally = Tally(
        "any", where=pl.col("key") > 0, by={"key": pl.col("key")}, sums={"sum": value, "odd": value % 2 == 1},
        least={"least": value}, most={"most": value},
    )  # fmt: skip
    whole = every.to_arrow().combine_chunks()
    counting = Tallies([tally], pa.RecordBatch.from_pylist([], schema=whole.schema))
    with patch.object(rows, "TALLIED_ROWS", at_once):
        for begin, end in pairwise(sorted({0, *cuts, len(every)})):
            for part in whole[begin:end].to_batches():
                counting.feed(part)
    groups: dict[tuple[Any, int], list[int | None]] = {}
    for vm, key, number in values:
        if key > 0:
            groups.setdefault((vm, key), []).append(number)
    found = {(row["vm"], row["key"]): row for row in counting.answers()["any"].iter_rows(named=True)}
    assert found.keys() == groups.keys()
    for group, numbers in groups.items():
        known = [number for number in numbers if number is not None]
        assert found[group]["rows"] == len(numbers)
        assert found[group]["sum"] == sum(known)
        assert found[group]["odd"] == sum(number % 2 for number in known)
        assert found[group]["least"] == min(known, default=None)
        assert found[group]["most"] == max(known, default=None)


@pytest.mark.parametrize("batch", [pytest.param(29, marks=pytest.mark.slow), 1 << 18])
@pytest.mark.parametrize("ranges", [1, 5, 50])
def test_heat_is_of_the_smallest_ranges_there_is_room_for(
    ranges: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", batch)
    recording = Recording.open(TWO_VMS)
    wanted: Counter[tuple[Any, ...]] = Counter()
    for vm, (first, last) in recording.metadata.spans.items():
        width, pages = (last - first) // 10 + 1, 1
        mapped = [
            row
            for part in recording.trace.batches(["time", "vm", "kind", "gfn"], vm=vm)
            for row in part.to_pylist()
            if row["kind"] == "kvm_mmu_set_spte"
        ]
        while len({row["gfn"] // pages for row in mapped}) > ranges:
            pages *= 2
        for row in mapped:
            time = first + (row["time"] - first) // width * width
            wanted[vm, time, width, row["gfn"] // pages * pages, pages] += 1
    found = drawn.heat(recording, parts=10, rows=ranges).collect()
    assert found.rows() == sorted((*cell, count) for cell, count in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("format_", ["text", "html"])
def test_a_report_and_its_replay_decode_the_rows_once(
    format_: str, replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = Trace._decode

    def decoding(self: Trace, index: int, fields: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
        if len(fields) > FEW:
            decoded.append(index)
        return decode(self, index, fields, size)

    monkeypatch.setattr(Trace, "_decode", decoding)
    with reported(TWO_VMS, Wanted(replay=replay, drawn=drawn_by(format_))) as report:
        renderer(format_)(report)
    # What the page draws of the recorded time comes with a replay; without one it is found by a pass of its own.
    passes = 2 if format_ == "html" and not replay else 1
    booked = [group.vm is not None for group in Trace.open(TWO_VMS).metadata.row_groups]
    assert Counter(decoded) == {index: passes if of_vm else 1 for index, of_vm in enumerate(booked)}


def test_rows_that_a_replay_reads_answer_as_rows_that_are_read_for_them() -> None:
    questions = [question for query in asked() for question in query.questions(Recording.open(TWO_VMS))]
    trace = Trace.open(TWO_VMS)
    beside = rows.Asking(trace, questions)
    vms = [int(vm["id"]) for vm in trace.metadata.vms]
    turns = [iter(trace.batches(vm=vm, size=1000)) for vm in vms]
    while turns:  # as from threads: VMs take turns
        for vm, turn in list(zip(vms, turns, strict=True)):
            if (batch := next(turn, None)) is not None:
                beside.feed(vm, batch)
            else:
                turns.remove(turn)
                vms.remove(vm)
    alone = rows.Asking(Trace.open(TWO_VMS), questions).answers()
    given = beside.answers()
    assert given.keys() == alone.keys()
    for name, answer in alone.items():
        assert_frame_equal(given[name], answer, check_row_order=False)


def test_rows_are_let_go_before_the_next_ones_are_decoded() -> None:
    """At any time there is one batch: what a question holds of earlier ones would grow with the recording."""
    held: list[int] = []

    class Watched:
        name = "how many batches there are"
        columns = frozenset({"time"})

        def begin(self) -> Watched:
            return self

        def feed(self, vm: int, rows: DecodedRows) -> None:
            alive.append(weakref.ref(rows))
            held.append(sum(each() is not None for each in alive))

        def answer(self) -> pl.DataFrame:
            return pl.DataFrame()

    alive: list[weakref.ref[DecodedRows]] = []
    recording = Recording.open(TWO_VMS)
    questions = [question for query in asked(drawn_by("html")) for question in query.questions(recording)]
    gc.disable()  # which would find a cycle of references, but late
    try:
        with patch.object(rows, "BATCH_ROWS", 1000):
            rows.Asking(recording.trace, [*questions, Watched()]).answers()
    finally:
        gc.enable()
    assert len(held) > 10
    assert set(held) == {1}


def test_a_damaged_row_group_is_told_once_and_no_table_is_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    data = bytearray(TWO_VMS.read_bytes())
    data[Trace.open(TWO_VMS).metadata.row_groups[1].offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(Problem, match="row group 1 does not fit its checksum"):
        recorded.lives(Recording.open(path))
    with reported(path, Wanted(replay=False)) as report:
        notes = [text for name, text in report.trust if name == "note"]
        tables = [table.query for table in report.tables]
    assert notes == ["damaged: row group 1 does not fit its checksum"]
    assert not tables
