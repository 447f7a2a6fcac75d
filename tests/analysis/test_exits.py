# SPDX-License-Identifier: Apache-2.0
"""Exits by reason, returns to userspace, ioctls: against a plain walk over the rows; and what could not be seen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.formats import renderer
from analysis.passes import lasting
from analysis.queries import exit_times as queries
from analysis.reading.latencies import bucket_of, ns_of
from analysis.reading.sources import Recording
from analysis.reporting import Wanted, reported
from tests.replay.plain import plain
from tests.traces.making import event, stream
from traces.kernels.exit_names import exit_name
from traces.kernels.vendors import SVM, VMX
from traces.kvm_names import ioctl_name, user_exit_name
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter

RECORDINGS = Path(__file__).parents[1] / "recordings"
CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
FIELD = RECORDINGS / "field-6.1.parquet"


def walked(recording: Recording, begins: str, ends: tuple[str, ...], who: str) -> dict[Any, list[int | None]]:
    """By VM, code and ret of what begins: how long each lasted, None where it has no end; row by row."""
    rows = recording.scan().filter(pl.col("kind").is_in([begins, *ends])).sort("seq").collect()
    found: dict[Any, list[int | None]] = defaultdict(list)
    open_: dict[Any, Any] = {}
    for row in rows.iter_rows(named=True):
        if row[who] is None:
            continue
        key = (row["vm"], row["vcpu"]) if who == "vcpu" else row["tid"]
        before = open_.pop(key, None)
        if before is not None:
            ended = row["kind"] in ends and (who == "vcpu" or before["code"] == row["code"])
            lasted = row["time"] - before["time"] if ended else None
            found[before["vm"], before["code"], before["ret"]].append(lasted)
        if row["kind"] == begins:
            open_[key] = row
    for row in open_.values():
        found[row["vm"], row["code"], row["ret"]].append(None)
    return found


@pytest.mark.parametrize("path", [FIELD, RECORDINGS / "smi-storm-6.1-ept.parquet", CORPUS / "churn-6.1.parquet"],
                         ids=lambda path: path.stem)  # fmt: skip
def test_exits_ioctls_and_returns_are_those_of_the_rows(path: Path) -> None:
    recording = Recording.open(path)
    vendor = VMX if "ept" in path.stem else SVM
    for query, name, count, who, begins, ends in (
        (queries.exits, "reason", "exits", "vcpu", "kvm_exit", ("kvm_entry",)),
        (queries.ioctls, "ioctl", "calls", "tid", "ioctl", ("ioctl_end",)),
        (queries.user_exits, "reason", "returns", "vcpu", "kvm_userspace_exit", ("kvm_userspace_exit", "kvm_entry")),
    ):
        rows = query(recording).collect()
        expected: dict[Any, list[int | None]] = defaultdict(list)
        for (vm, code, ret), times in walked(recording, begins, ends, who).items():
            if query is queries.exits:
                expected[vm, exit_name(vendor, code)] += times
            elif query is queries.ioctls:
                expected[vm, ioctl_name(code)] += times
            else:
                expected[vm, user_exit_name(code, ret)] += times
        assert len(rows) == len(expected)
        for row in rows.iter_rows(named=True):
            times = expected[row["vm"], row[name]]
            assert row[count] == len(times)
            ended = sorted(time for time in times if time is not None)
            if not ended:
                assert (row["p50_ns"], row["p99_ns"], row["longest_ns"]) == (None, None, None)
                continue
            assert (row["ns"], row["longest_ns"]) == (sum(ended), ended[-1])
            for column, share in (("p50_ns", 0.5), ("p99_ns", 0.99)):
                exact = ended[math.ceil(len(ended) * share) - 1]
                assert row[column] == pytest.approx(exact, rel=0.01, abs=1)


@given(st.lists(st.integers(0, (1 << 53) - 1), min_size=1))
def test_a_bucket_is_within_one_percent(durations: list[int]) -> None:
    ns = np.array(durations)
    middle = pl.DataFrame({"b": bucket_of(ns)}).select(ns_of(pl.col("b")))["b"].to_list()
    for exact, told in zip(durations, middle, strict=True):
        assert abs(told - exact) <= exact / 100


_ROW = st.tuples(st.sampled_from([20, 21, 25]), st.integers(-1, 2), st.integers(0, 4), st.integers(-1, 0),
                 st.integers(0, 1 << 40))  # fmt: skip


@given(st.lists(st.lists(_ROW, max_size=20), max_size=4), st.booleans(), st.booleans())
def test_compiled_and_plain_are_equal(batches: list[list[Any]], itself: bool, failing: bool) -> None:
    made = [module.Lasting(21, 20, itself) for module in (lasting, plain("analysis.passes.lasting"))]
    now = 0
    for batch in batches:
        kind, vcpu, code, ret, step = (np.array([row[at] for row in batch], np.int64) for at in range(5))
        time = now + np.cumsum(step)
        now = int(time[-1]) if len(time) else now
        columns = (kind.astype(np.uint8), code.astype(np.uint64), ret.astype(np.int32))
        for each in made:
            each.feed(time, vcpu.astype(np.int16), columns[0], columns[1], columns[2] if failing else None)
    one, two = made
    assert one.count == two.count
    for name in ("codes", "rets", "totals"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert np.array_equal(one.histogram(), two.histogram())


@pytest.mark.parametrize("codes", [1, 30])
def test_each_duration_is_counted_in_its_bucket(codes: int) -> None:
    """However many buckets are in use: their table grows, and its first size has room for few of them."""
    rng = np.random.default_rng(5)
    ns = rng.integers(0, 1 << rng.integers(1, 50, 5000))
    code = rng.integers(0, codes, len(ns)).astype(np.uint64)
    one = lasting.Lasting(21, 20)
    time = np.cumsum(np.stack([np.ones_like(ns), ns], 1).reshape(-1))
    kind = np.tile(np.array([21, 20], np.uint8), len(ns))
    one.feed(time, np.zeros(len(kind), np.int16), kind, np.repeat(code, 2))
    row, bucket, count = one.histogram(first=7)
    found = dict(zip(zip(one.codes[row - 7].tolist(), bucket.tolist(), strict=True), count.tolist(), strict=True))
    assert found == Counter(zip(code.tolist(), bucket_of(ns).tolist(), strict=True))


def test_a_vm_whose_durations_are_alike_takes_little_memory() -> None:
    made = plain("analysis.passes.lasting").Lasting(21, 20)
    count = 1000
    kind = np.tile(np.array([21, 20], np.uint8), count)
    code = np.repeat(np.arange(count, dtype=np.uint64) % 8, 2)
    made.feed(np.arange(2 * count) * 2000, np.zeros(2 * count, np.int16), kind, code)
    assert sum(array.nbytes for array in (made.codes, made.rets, made.totals, made._keys, made._counts)) < 4096


def test_a_forged_file_of_endless_codes_takes_bounded_memory() -> None:
    many = 3_000
    one = lasting.Lasting(21, 20, False)
    one.feed(np.arange(many), np.zeros(many, np.int16), np.full(many, 21, np.uint8), np.arange(many, dtype=np.uint64))
    assert one.count == 2048
    assert one.codes[one.count - 1] == lasting.OTHERS
    assert one.totals[:, 0].sum() == many


def test_names_of_both_vendors() -> None:
    assert [exit_name(SVM, code) for code in (0x400, 0x78, (1 << 64) - 1, 0x999)] == ["NPF", "HLT", "ERR", "0x999"]
    assert [exit_name(VMX, code) for code in (48, 12, 1 << 31 | 33)] == [
        "EPT_VIOLATION", "HLT", "FAILED_VMENTRY_INVALID_STATE",
    ]  # fmt: skip
    assert [ioctl_name(code) for code in (0xAE01, 0x4020AE46, 5)] == [
        "KVM_CREATE_VM", "KVM_SET_USER_MEMORY_REGION", "0x5",
    ]  # fmt: skip
    assert [user_exit_name(*each) for each in ((8, 0), (10, -4), (99, 0))] == [
        "KVM_EXIT_SHUTDOWN", "KVM_RUN: EINTR", "KVM_EXIT_99",
    ]  # fmt: skip


def silent(path: Path, **loss: Any) -> Path:
    """A recording of a guest that runs, of which this kernel shows nothing but its returns to userspace."""
    kinds = ("kvm_entry", "kvm_exit", "kvm_page_fault", "kvm_mmu_set_spte", "kvm_userspace_exit", "ioctl", "ioctl_end")
    manifest = {"probes": [{"kind": kind, "how": "raw"} for kind in kinds], "host": {"vendor": "AuthenticAMD"}}
    place = {"kvm": 1, "tgid": 100, "tid": 101, "vcpu": 0}
    rows = [event("vm_create", kvm=1, tgid=100, tid=100)]
    for _ in range(5):
        rows += [event("kvm_userspace_exit", w0=2, **place), event("ioctl", w0=0xC008AE67, **place)]
        rows += [event("ioctl_end", w0=0xC008AE67, **place)]
    writer = SegmentWriter(path.with_suffix(".kvmt"), manifest)
    writer.write(stream(rows))
    counts = {"vm_create": 1, "kvm_userspace_exit": 5, "ioctl": 5, "ioctl_end": 5}
    emitted = {kind: {"emitted": {"0": count}, "lost": {}} for kind, count in counts.items()}
    writer.close({"loss": {**emitted, **loss}})
    compact(writer.directory, path)
    return path


def test_what_could_not_be_seen_is_never_0(tmp_path: Path) -> None:
    with reported(silent(tmp_path / "a.parquet"), Wanted()) as report:
        text = renderer("text")(report)
        tables = {table.query: table for table in report.tables}
    said = " ".join(text.split())
    assert "not observable: exits, faults" in said
    for what in ("0 exits", "0 faults", "0 root loads", "0 roots"):
        assert what not in said
    assert "5 KVM_RUN returns, 5 ioctls" in report.verdict[0]
    assert tables["user_exits"].frame["returns"].to_list() == [5]
    assert tables["user_exits"].frame["longest_ns"].to_list() == [3_000]
    assert "guest's own time" in tables["user_exits"].note
    assert tables["ioctls"].frame["longest_ns"].to_list() == [1_000]
    assert not {"windows", "exits", "gfns", "rips", "stuck"} & tables.keys()
    (note,) = (text for name, text in report.trust if name == "note" and "not observable" in text)
    assert {"windows", "stuck", "exits"} <= set(note.rpartition(": no ")[2].split(", "))


def test_a_guest_that_never_ran_is_not_hidden(tmp_path: Path) -> None:
    recording = Recording.open(silent(tmp_path / "a.parquet"))
    assert {"kvm_entry", "kvm_exit", "kvm_page_fault"} <= recording.hidden
    assert not Recording.open(FIELD).hidden


def test_what_was_lost_is_no_0(tmp_path: Path) -> None:
    lost = {kind: {"emitted": {"0": 7}, "lost": {"0": 7}} for kind in ("kvm_page_fault",)}
    with reported(silent(tmp_path / "a.parquet", **lost), Wanted(replay=False)) as report:
        assert report.headline.startswith("7 of 23 events lost: ")
        assert "0 faults" not in " ".join(report.lines)


def test_a_recording_of_roots_alone_says_what_it_lacks(tmp_path: Path) -> None:
    manifest = {"preset": "roots", "probes": [{"kind": "mmu_load", "how": "raw"}]}
    writer = SegmentWriter(tmp_path / "a.kvmt", manifest)
    writer.write(stream([event("mmu_load", kvm=1, tgid=9, tid=9, vcpu=0, root=5, role=0x3784)] * 3))
    writer.close({"loss": {"mmu_load": {"emitted": {"0": 3}, "lost": {}}}})
    compact(writer.directory, tmp_path / "a.parquet")
    with reported(tmp_path / "a.parquet", Wanted()) as report:
        assert "3 root loads" in report.headline
        assert "0 exits" not in report.headline
        assert "0 faults" not in report.headline
        (note,) = (text for name, text in report.trust if name == "note" and "not recorded (" in text)
    assert {"windows", "stuck", "exits"} <= set(note.rpartition(": no ")[2].split(", "))
