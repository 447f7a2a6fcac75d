# SPDX-License-Identifier: Apache-2.0
"""What every report asks of rows: the compiled groups are what polars' group_by makes of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.passes import groups
from analysis.queries import exit_times, mapped_pages, recorded
from analysis.reading import grouped, rows
from analysis.reading.grouped import Grouped, UnservedPages, UsedRoots, Windowed
from analysis.reading.sources import Recording
from tests.analysis.sources import CORPUS
from tests.replay.plain import plain

FIRST, WIDTH, PRESENT, RESERVED = 3, 7, 1, 8
_KIND, _TIME, _CODE = pl.col("kind"), pl.col("time"), pl.col("code")
COUNTED = {
    "rows": pl.len().cast(pl.Int64),
    "first_time": _TIME.min(),
    "last_time": _TIME.max(),
}
Oracle = Callable[[pl.DataFrame], pl.DataFrame]


def _sum(value: pl.Expr) -> pl.Expr:
    return value.cast(pl.Int64).sum()


def roots(every: pl.DataFrame) -> pl.DataFrame:
    told = _KIND.is_in(["mmu_load", "root_get", "kvm_mmu_get_page"]) & (pl.col("role") != 0)
    return every.filter(pl.col("root") != 0).group_by("vm", "root").agg(
        **COUNTED, role=pl.col("role").filter(told).min(),
        loads=_sum(_KIND == "mmu_load"), faults=_sum(_KIND == "kvm_page_fault"),
    )  # fmt: skip


def pages(every: pl.DataFrame) -> pl.DataFrame:
    requested = _KIND == "kvm_mmu_spte_requested"
    fixed = (_KIND == "fast_page_fault") & (pl.col("old") != pl.col("new"))
    page = pl.when(requested).then("gfn").otherwise((pl.col("addr") // 4096).cast(pl.Int64))
    about = _KIND.is_in(["kvm_page_fault", "kvm_mmu_spte_requested", "fast_page_fault"])
    return every.filter(pl.col("vcpu").is_not_null() & about).with_columns(gfn=page).group_by("vm", "vcpu", "gfn").agg(
        **COUNTED, faults=_sum(_KIND == "kvm_page_fault"), served=_sum(requested | fixed)
    ).filter(pl.col("faults") - pl.col("served") > 1)  # fmt: skip


def windows(every: pl.DataFrame, first: int, width: int, present: int, reserved: int) -> pl.DataFrame:
    window = (_TIME - first) // width
    there, odd = (pl.lit(mask, pl.UInt64) for mask in (present, reserved))
    about = _KIND.is_in(["kvm_entry", "kvm_exit", "kvm_page_fault", "kvm_smm_transition", "mmu_load"])
    kept = every.filter(pl.col("vcpu").is_not_null() & about).with_columns(window=window)
    entry, exit_, fault = (kind == _KIND for kind in ("kvm_entry", "kvm_exit", "kvm_page_fault"))
    at = _TIME - first - pl.col("window") * width
    return kept.group_by("vm", "vcpu", "window").agg(
        entries=_sum(entry), exits=_sum(exit_), faults=_sum(fault), loads=_sum(_KIND == "mmu_load"),
        crossed=at.filter(exit_).sum() - at.filter(entry).sum(),
        entered=_TIME.filter(entry).max(), left=_TIME.filter(exit_).max(),
        smis=_sum((_KIND == "kvm_smm_transition") & (pl.col("flags") & 1 == 1)),
        fixes=_sum(fault & (_CODE & there != 0) & (_CODE & odd == 0)),
    )  # fmt: skip


def by(where: pl.Expr, *keys: str) -> Oracle:
    return lambda every: every.filter(where).group_by("vm", *keys).agg(**COUNTED)


ASKED: list[tuple[Grouped, Oracle]] = [
    (UsedRoots(), roots),
    (UnservedPages(), pages),
    (
        Windowed("windows", FIRST, WIDTH, PRESENT, RESERVED),
        lambda every: windows(every, FIRST, WIDTH, PRESENT, RESERVED),
    ),
    (mapped_pages.installs(), by(_KIND == "kvm_mmu_set_spte", "gfn", "level")),
    (exit_times.faulting_rips(), by(_KIND == "kvm_page_fault", "rip")),
    (exit_times.changed_by(), by(_KIND.is_in(exit_times.CHANGES), "kind", "tid")),
]

SCHEMA: dict[str, Any] = {
    "vm": pl.Int32, "vcpu": pl.Int16, "kind": pl.String, "time": pl.Int64, "tid": pl.Int32, "root": pl.Int32,
    "role": pl.UInt32, "level": pl.Int8, "gfn": pl.Int64, "addr": pl.UInt64, "code": pl.UInt64, "old": pl.UInt64,
    "new": pl.UInt64, "rip": pl.UInt64, "flags": pl.UInt8,
}  # fmt: skip
KINDS = (
    "kvm_entry", "kvm_exit", "kvm_page_fault", "fast_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte",
    "kvm_smm_transition", "mmu_load", "root_get", "kvm_mmu_get_page", "kvm_unmap_hva_range", "ioctl",
)  # fmt: skip
HIGH = (1 << 64) - 1
ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, 1, 2]), st.sampled_from([None, 0, 1, 300]), st.sampled_from(KINDS),
        st.integers(FIRST, 40),
        st.integers(1, 2), st.integers(-2, 2), st.integers(0, 2), st.integers(1, 2), st.integers(0, 2),
        st.sampled_from([0, 4095, 4096, HIGH]), st.integers(0, 9), st.integers(0, 1), st.integers(0, 1),
        st.sampled_from([0, 1, HIGH]), st.integers(0, 3),
    )
)  # fmt: skip


def fed(counting: rows.Counting, frame: pl.DataFrame) -> None:
    """Give rows to a question, by VM, as they come out of a trace."""
    batches = frame.with_columns(_KIND.cast(pl.Enum(KINDS))).to_arrow().to_batches()
    for batch in batches:
        for vm, part in rows.by_vm(batch):
            counting.feed(vm, part)


def assert_same(answer: pl.DataFrame, wanted: pl.DataFrame) -> None:
    names = sorted(wanted.columns)
    wanted = wanted.select(names)
    found = answer.with_columns(pl.col(pl.Enum).cast(pl.String)).select(names)
    assert found.schema == wanted.schema
    assert sorted(found.rows(), key=str) == sorted(wanted.rows(), key=str)


@pytest.mark.slow
@pytest.mark.parametrize("made", [groups.Groups, plain("analysis.passes.groups").Groups], ids=["compiled", "plain"])
@pytest.mark.parametrize(("asked", "oracle"), ASKED, ids=[asked.name for asked, _ in ASKED])
@given(found=ROWS, cuts=st.lists(st.integers(0, 40)))
def test_any_rows_in_any_parts(
    asked: Grouped, oracle: Oracle, made: type[groups.Groups], found: list[tuple[Any, ...]], cuts: list[int]
) -> None:
    every = pl.DataFrame(found, schema=SCHEMA, orient="row")
    counting = grouped.Grouping(asked, made(len(asked.sums), 1))
    for begin, end in pairwise(sorted({0, *cuts, len(every)})):
        fed(counting, every[begin:end])
    assert_same(counting.answer(), oracle(every))


@pytest.mark.parametrize("name", ["two-vms-6.1-async", "smi-storm-6.1-shadow", "smi-storm-6.1-ept"])
@pytest.mark.parametrize("batch", [997, 1 << 18])
def test_recordings_in_any_batches(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_ROWS", batch)
    recording = Recording.open(CORPUS / f"{name}.parquet")
    every = recording.scan().with_columns(_KIND.cast(pl.String)).collect()
    windowed = recorded.in_windows(recording, 3_000_000)
    asked = [
        (
            windowed,
            lambda rows_: windows(rows_, windowed.first, windowed.width_ns, windowed.present, windowed.reserved),
        ),
        *((question, oracle) for question, oracle in ASKED if question.name != "windows"),
    ]
    for (question, oracle), answer in zip(asked, recording.ask(*(question for question, _ in asked)), strict=True):
        assert len(answer) or isinstance(question, UnservedPages)
        assert_same(answer, oracle(every))
