# SPDX-License-Identifier: Apache-2.0
"""Runs that kvmtrace, trace-cmd and perf recorded at once: what is imported is what was recorded natively."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.replay.recording import Guest
from tests.thinned import thinned
from tests.traces.shown_counts import outside
from tests.traces.simultaneous_rows import compare, rows_of
from tests.verbs import invoke
from traces.errors import Problem
from traces.imports.importing import import_file
from traces.imports.told import ToldOfText
from traces.reader import Trace

DIRECTORY = Path(__file__).parents[2] / "traces" / "simultaneous"
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.parquet"))


def test_there_are_six_scenarios_on_four_kernels() -> None:
    assert len(NAMES) == 24
    for name in NAMES:
        assert (DIRECTORY / f"{name}.dat.xz").is_file()
        assert (DIRECTORY / f"{name}.data.xz").is_file()


@pytest.mark.parametrize("tool", ["dat", "data"])
@pytest.mark.parametrize("name", thinned(6, NAMES))
def test_every_event_of_both_is_in_both_with_equal_fields_in_order(name: str, tool: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.{tool}.xz", out, ToldOfText())
    native, theirs = rows_of(DIRECTORY / f"{name}.parquet"), rows_of(out)
    compare(native, theirs)
    meta = Trace.open(out).metadata
    assert meta.kernel == Trace.open(DIRECTORY / f"{name}.parquet").metadata.kernel
    assert meta.raw["clock"]["name"] == "mono"
    assert meta.raw["source"]["kind"] == {"dat": "trace.dat", "data": "perf.data"}[tool]
    assert meta.raw["source"]["odd"] == 0
    assert meta.lost == 0
    others = theirs.filter(pl.col("kind") == "other")["text"].str.split(":").list.first()
    assert dict(Counter(others.to_list())) == meta.raw["source"]["others"]


def test_times_of_one_clock_differ_by_what_recording_takes(tmp_path: Path) -> None:
    """All three run on CLOCK_MONOTONIC, or count from the boot as it does; an event's times are of one moment."""
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / "smi-storm-6.1.dat.xz", out, ToldOfText())
    native, theirs = rows_of(DIRECTORY / "smi-storm-6.1.parquet"), rows_of(out)
    times = [rows.filter(pl.col("kind") == "kvm_page_fault")["time"].to_numpy() for rows in (native, theirs)]
    assert abs(times[0] - times[1]).max() < 50_000_000  # under emulation, two other tools' handlers in between


POLICIES = ("sync", "async", "preserve", "preserve-worker")
# What tables and leaves the recorded kernel made is in every source.
SHOWN = ("creations", "faults", "refaults", "hits", "fixes", "tables_built", "prefetched", "roots_peak", "tables_peak")
# What follows a VM's end, which no tracepoint shows; and loads of roots that are there.
ENDLESS = ("frees", "tables_freed", "zapped", "flushes")


def replayed(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    asked = [part for policy in POLICIES for part in ("--policy", policy)]
    invoke(["replay", str(path), "--no-time", "--json", *asked, *more])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("tool", ["dat", pytest.param("data", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", thinned(6, NAMES))
def test_replay_s_counts_contain_those_of_the_native_recording(
    name: str, tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every policy and of every vCPU; and equal them where the source shows enough."""
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.{tool}.xz", out, ToldOfText())
    if name in ("smi-storm-5.10", "smi-both-5.10"):  # which shows no root, and two roles of them
        with pytest.raises(Problem, match="loads of roots are not in its source"):
            replayed(out, capsys)
        return
    imported, native = replayed(out, capsys), replayed(DIRECTORY / f"{name}.parquet", capsys)
    known = "6.1" not in name or name.startswith("smi")  # Debian's 6.1.0-56 does not say which update it is
    recorded = [policy["name"] for policy in imported["policies"] if policy["recorded"]]
    assert not known or recorded == [policy["name"] for policy in native["policies"] if policy["recorded"]]
    assert len(imported["vms"]) == len(native["vms"])
    for mine, theirs in zip(native["vms"], imported["vms"], strict=True):
        for one, other in zip(mine["policies"], theirs["policies"], strict=True):
            assert one["policy"] == other["policy"]
            assert not outside({**one, "vcpus": one["vcpus"]}, other, one["policy"])
            if known and one["policy"] in recorded:
                assert {count: other[count] for count in SHOWN} == {count: one[count] for count in SHOWN}
            assert all(other[count][1] is None for count in ENDLESS)


def test_a_reset_that_no_row_shows_is_within_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Userspace sets registers: an ioctl and a reset in a recording, nothing in what tracepoints show."""
    guest = Guest()
    guest.load()
    for inside in (True, False):  # and an invalidation at the end: both are seen to be switched on
        guest.of("kvm_smm_transition", flags=int(inside))
        guest.load(role=guest.role ^ 1 << 24, created=inside)
    for page in range(3):
        guest.fault(page)
        guest.of("kvm_userspace_exit", w0=2)
        guest.of("ioctl", w0=0x4138AE84)
        guest.of("mmu_reset")
        guest.load(created=False)
    guest.vm("kvm_mmu_zap_all_fast")
    native = guest.write(tmp_path / "native.parquet").trace.path
    text, out = tmp_path / "text", tmp_path / "out.parquet"
    invoke(["export", str(native), "--ftrace-text", "-o", str(text)])
    invoke(["import", str(text), "-o", str(out), "--kernel", "6.6.30"])
    capsys.readouterr()
    mine, theirs = (replayed(path, capsys, "--recorded-policy", "preserve") for path in (native, out))
    for one, other in zip(mine["vms"][0]["policies"], theirs["vms"][0]["policies"], strict=True):
        del one["frees_by_cause"], other["frees_by_cause"]  # what for is not shown, either: `other`
        assert not outside(one, other, one["policy"])
    counts = {policy["policy"]: policy for policy in theirs["vms"][0]["policies"]}
    assert (counts["preserve"]["reuses"], counts["preserve"]["creations"]) == ([1, 4], 2)
    assert counts["async"]["creations"] == [3, 6]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("smi") and "5.10" not in name])
def test_whether_roots_are_kept_is_seen_in_smm(name: str, tmp_path: Path) -> None:
    """Debian's 6.1.0-56 is 6.1.192, which preserves roots; the release alone would be one that frees them."""
    out = tmp_path / "out.parquet"
    import_file(DIRECTORY / f"{name}.dat.xz", out, ToldOfText())
    assert Trace.open(out).metadata.policy == "preserve"
