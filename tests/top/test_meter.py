# SPDX-License-Identifier: Apache-2.0
"""What `top` shows of a recording is what its rows say, counted one by one."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.corpus import CORPUS
from tests.flight.test_triggers import HLT, MS, halted, off, on_vcpu, running, stream
from tracer.flight.vcpu_time import idle_codes
from tracer.top.meter import Meters, VcpuSecond
from tracer.top.playback import Played, seconds
from tracer.top.top_table import NAMES, cells, chosen, text
from traces.reader import Trace

SECOND = 10**9
RECORDINGS = ["smi-storm-6.1-async", "two-vms-6.1", "slot-delete-6.12"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    columns = ["time", "vm", "vcpu", "kind", "code", "flags", "root", "addr"]
    found = [row for batch in Trace.open(path).batches(columns) for row in batch.to_pylist()]
    return sorted(found, key=lambda row: row["time"])


@pytest.mark.parametrize("name", RECORDINGS)
def test_counts_and_guest_time_are_those_of_the_rows(name: str) -> None:
    path = CORPUS / f"{name}.parquet"
    counted, guest, entered = Counter[str](), Counter[tuple[int, int]](), dict[tuple[int, int], int]()
    for row in rows_of(path):
        kind, vcpu = row["kind"], (row["vm"], row["vcpu"])
        counted["faults"] += kind == "kvm_page_fault" and row["vm"] is not None
        counted["exits"] += kind == "kvm_userspace_exit"
        counted["smis"] += kind == "kvm_smm_transition" and row["flags"] & 1
        counted["zaps"] += kind == "kvm_mmu_prepare_zap_page" and row["vm"] is not None
        counted["roots"] += kind == "kvm_mmu_get_page" and row["flags"] & 1 and row["root"] > 0
        if kind == "kvm_entry":
            entered[vcpu] = row["time"]
        elif kind == "kvm_exit" and vcpu in entered:
            guest[vcpu] += row["time"] - entered.pop(vcpu)
    found = list(seconds(path))
    lines = [line for _, lines in found for line in lines]
    assert {name: sum(getattr(line, name) for line in lines) for name in counted} == counted
    assert counted["faults"] > 100
    assert len(found) == 1, "shorter than a second: its shares are of what it has"
    shown = sorted(line.guest * found[0][0] for line in lines if line.guest is not None)
    assert shown == pytest.approx(sorted(guest.values()), rel=1e-6)


def second_of(rows: list[np.ndarray[Any, Any]], *cuts: int, time_of: Any = None) -> VcpuSecond:
    """The only vCPU's line of the first second, its rows given in parts."""
    given = stream(rows)
    meters = Meters((HLT,), time_of)
    meters.second(0)
    bounds = [0, *cuts, len(given)]
    for first, last in pairwise(bounds):
        meters.see(given[first:last])
    (line,) = meters.second(SECOND)
    return line


def faults(begin: int, end: int, gfns: int) -> list[np.ndarray[Any, Any]]:
    return [
        each
        for at in range(begin, end, MS)
        for each in (
            on_vcpu("kvm_entry", at), on_vcpu("kvm_exit", at + 10_000, w0=0x400),
            on_vcpu("kvm_page_fault", at + 20_000, w0=(at // MS % gfns) << 12),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (running(0, SECOND, MS, 0.9), "runs"),
        (running(0, SECOND, MS, 0.02), "hangs"),
        (running(0, SECOND, MS, 0.3), "exits"),
        (halted(1, SECOND), "idle"),
        ([each for at in range(0, SECOND, 20 * MS) for each in (
            on_vcpu("kvm_entry", at), on_vcpu("kvm_exit", at + MS, w0=0x60),
            *off(at + MS, at + 20 * MS - 1, state=0, waited=19 * MS))], "starved"),
        (faults(0, SECOND, 10**6), "hangs"),
        (faults(0, SECOND, 7), "refaults"),
        ([on_vcpu("kvm_userspace_exit", at) for at in range(0, SECOND, MS)], "unseen"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 500)])
def test_one_word_for_each_way_to_spend_a_second(rows: Any, verdict: str, cuts: tuple[int, ...]) -> None:
    line = second_of(rows, *cuts)
    assert line.verdict == verdict
    assert cells(line)[NAMES.index("verdict")] == verdict


def test_the_longest_exit_may_reach_over_batches_and_idle_is_none() -> None:
    rows = [*halted(0, 400 * MS), on_vcpu("kvm_exit", 500 * MS, w0=0x400), on_vcpu("kvm_entry", 530 * MS),
            on_vcpu("kvm_exit", 531 * MS, w0=0x400), on_vcpu("kvm_entry", 532 * MS)]  # fmt: skip
    assert {second_of(rows, cut).longest_ns for cut in range(1, len(rows))} == {30 * MS}


def test_a_silent_threads_time_is_looked_up() -> None:
    """Asleep in its VMM it is idle; at work in the kernel it is not."""
    for ran, idle in ((0, 1.0), (10**12, 0.0)):
        times = iter([(5, False), (5 + ran, False)])
        meters = Meters((HLT,), lambda *_: next(times))  # noqa: B023 - used within the round
        meters.see(stream([on_vcpu("kvm_entry", 0), on_vcpu("kvm_exit", 1, w0=0x7B)]))
        meters.second(SECOND)
        (line,) = meters.second(2 * SECOND)
        assert line.idle == pytest.approx(idle)


def test_a_vcpu_that_is_gone_is_not_shown_for_ever() -> None:
    meters = Meters((HLT,))
    meters.see(stream([on_vcpu("kvm_entry", 0), on_vcpu("kvm_exit", 1, w0=0x7B)]))
    shown = [len(meters.second(at * SECOND)) for at in range(1, 12)]
    assert shown[0] == 1
    assert shown[-1] == 0


def test_sorting_and_choosing() -> None:
    _, lines = next(iter(seconds(CORPUS / "two-vms-6.1.parquet")))
    by_faults = [line.faults for line in chosen(lines, "faults", "")]
    assert by_faults == sorted(by_faults, reverse=True)
    assert {line.vm[:4] for line in chosen(lines, "VM", "vm 2")} == {"VM 2"}
    for width in (200, 80, 40, 30):
        shown = text(lines, width).splitlines()
        assert len(shown) == len(lines) + 1
        assert max(map(len, shown)) <= max(width, 38)
        assert "verdict" in shown[0]


def test_playing_stops_when_nobody_looks() -> None:
    shown: list[list[VcpuSecond]] = []
    played = Played(CORPUS / "two-vms-6.1.parquet")
    played.close()
    played._run(shown.append)
    assert len(shown) == 1


def test_idle_exits_are_the_vendors() -> None:
    assert HLT in idle_codes({"vendor": "AuthenticAMD"})
    assert 12 in idle_codes({"vendor": "GenuineIntel"})
    assert idle_codes({}) == ()
