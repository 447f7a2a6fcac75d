# SPDX-License-Identifier: Apache-2.0
"""The design questions other than the root policy: queues against arithmetic, what a trace brings, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvmtrace
from benchmarks import design_questions
from replay import plan, run
from replay.decode.capabilities import Capabilities
from replay.simulate import dispatch
from replay.simulate.operations import Word
from replay.timing.costs import Costs, LockCosts
from replay.timing.reference_clock import Clock
from replay.whatif import aging, questions, range_zaps, table_accounting
from replay.whatif.answers import VCPUS, parse, spread
from replay.whatif.locks import Lock
from replay.whatif.workload import MOMENTS, FaultProgram, Workload, workload
from tests.profiles import examples
from tests.replay.recording import Guest
from traces import kernels
from traces.errors import Problem
from traces.kernels.fold import since
from traces.kernels.policies import PRESERVE
from traces.metadata import Metadata
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"


def made(gaps: list[list[int]], hold: int = 100, links: int = 0, shares: bool = True, window: int = 500) -> Workload:
    """A VM whose vCPUs have these gaps between faults; on the table's machine."""
    programs = [FaultProgram(np.array(gap, np.int64), np.full(len(gap), links, np.int64)) for gap in gaps]
    return Workload(1, len(gaps), programs, hold, window, Costs(), 1.0, True, shares, False, 10**9, alive=1)


def even(faults: int, low: int, high: int, **more: Any) -> Workload:
    """One vCPU with random gaps."""
    return made([np.random.default_rng(7).integers(low, high, faults).tolist()], **more)


def of_corpus(name: str) -> Workload:
    capabilities = Capabilities(Trace.open(CORPUS / f"{name}.parquet"))
    return workload(capabilities, capabilities.trace.metadata.vms[0])


programs = st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=12), min_size=1, max_size=3)
requests = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200), st.booleans()), max_size=40)


# Queues


@given(requests)
def test_a_lock_is_the_clocks_mmu_lock_and_first_come_first_served(asked: list[tuple[int, int, bool]]) -> None:
    lock, clock = Lock(), Clock(dispatch.begin(PRESERVE, [Word(0)], 2), Costs())
    had: list[tuple[int, bool]] = []  # until when, whether it shared
    for at, ns, shares in sorted(asked):
        pace = clock.paces[0]
        pace.clock = at
        clock._wait(pace, not shares)
        clock._take(not shares, pace.clock, pace.clock + ns)
        expected = max([at, *(until for until, shared in had if not (shares and shared))])
        had.append((expected + ns, shares))
        assert lock.take(at, ns, shares) == pace.clock == expected


@given(programs, st.integers(1, 4), st.integers(1, 400), st.integers(50, 2000), st.integers(1, 300))
def test_no_fault_waits_for_more_than_one_walk_and_one_reader(
    gaps: list[list[int]], vcpus: int, ns: int, period: int, hold: int
) -> None:
    work = made(gaps, hold)
    alone = aging.meet(work, vcpus, None, 0)
    met = aging.meet(work, vcpus, period, ns)
    free = aging.meet(work, vcpus, period, ns, locks=False)
    assert alone.waited == free.waited == free.longest == 0, "faults share the lock, and nobody else takes it"
    assert alone.end == free.end <= met.end
    assert met.longest <= ns + hold
    assert met.waited <= met.faults * (ns + hold)
    assert met.ager_waited <= met.calls * hold
    assert met.calls * ns <= met.end + ns, "one walk at a time"
    assert free.calls >= met.calls - 1 - (met.end - free.end) / min(period, ns)


@given(programs, st.integers(1, 4), st.integers(1, 300))
def test_faults_that_exclude_each_other_queue_even_without_an_ager(
    gaps: list[list[int]], vcpus: int, hold: int
) -> None:
    met = aging.meet(made(gaps, hold, shares=False), vcpus, None, 0)
    assert met.end >= met.faults * hold
    if vcpus == 1:
        assert met.waited == 0


def test_a_saturated_lock_serves_one_over_its_hold() -> None:
    full = aging.meet(even(500, 0, 100, hold=100, shares=False), 64, None, 0)
    assert full.end / (full.faults * 100) == pytest.approx(1, rel=0.01)
    idle = made([[10**6]])
    alone = aging.meet(idle, 1, 1, 250)
    assert alone.calls / alone.end == pytest.approx(1 / 250, rel=0.01), "asked for one each ns"
    storm = table_accounting.meet(even(500, 0, 1, hold=0, links=3), 64, 1000)
    assert storm.end / (storm.links * 1000) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("vcpus", [1, 8, 64])
@pytest.mark.parametrize("ns", [50, 400, 3000])
def test_waits_at_moments_of_chance_are_what_the_arithmetic_says(vcpus: int, ns: int) -> None:
    work = even(20_000 // vcpus, 500, 4000)
    met = aging.meet(work, vcpus, 10_007, ns)
    least, most = aging.limit(work, vcpus, met.calls, 1e9 / 10_007, ns)
    assert 0.9 * least <= met.waited <= 1.1 * most
    assert most <= met.faults * (ns + work.hold)


@given(programs, st.integers(1, 4), st.integers(1, 400), st.integers(500, 3000), st.booleans(), st.booleans())
def test_only_the_write_lock_with_count_and_sequence_leaves_nothing_stale(
    gaps: list[list[int]], vcpus: int, ns: int, period: int, shares: bool, shared: bool
) -> None:
    work = made(gaps, shares=shares)
    with_both = range_zaps.meet(work, vcpus, period, ns, False, True)
    assert with_both.stale == 0
    without = range_zaps.meet(work, vcpus, period, ns, shared, False)
    assert without.retried == without.again == without.hung == 0
    assert with_both.faults == without.faults == sum(len(program.gap) for program, _ in work.crowd(vcpus))
    if shared and shares:
        assert without.waited == 0


@pytest.mark.parametrize(("shared", "counted"), [(False, True), (False, False), (True, True), (True, False)])
def test_retries_and_stale_installs_are_what_the_arithmetic_says(shared: bool, counted: bool) -> None:
    work = even(5000, 500, 6000, window=400)
    met = range_zaps.meet(work, 8, 20_011, 300, shared, counted)
    retried, stale = range_zaps.caught(work, 8, 1e9 / 20_011, 300, shared, counted, 0)
    assert met.retried == pytest.approx(retried, rel=0.15)
    assert met.stale == pytest.approx(stale, rel=0.2)
    assert met.hung == 0
    if shared:
        assert met.waited == 0


@examples(50)
@given(
    programs,
    st.integers(1, 3),
    st.integers(20, 90),
    st.floats(20, 90),
    st.integers(1, 300),
    st.booleans(),
    st.booleans(),
)
def test_calls_that_nobody_meets_need_not_be_made(
    gaps: list[list[int]], vcpus: int, ns: int, period: float, hold: int, shares: bool, flag: bool
) -> None:
    work = made([[gap * 3 for gap in each] for each in gaps], hold, shares=shares)
    quick = aging.meet(work, vcpus, period, ns, flag), range_zaps.meet(work, vcpus, period, ns, flag, not flag)
    with pytest.MonkeyPatch.context() as patched:
        for module in (aging, range_zaps):
            patched.setattr(module, "skipped", lambda *_: 0)
        assert quick == (
            aging.meet(work, vcpus, period, ns, flag),
            range_zaps.meet(work, vcpus, period, ns, flag, not flag),
        )


def test_an_idle_guest_takes_no_longer() -> None:
    """A million seconds, a call each ns."""
    met = aging.meet(made([[10**15] * 3]), 1, 1, 300)
    assert met.calls == pytest.approx(3 * 10**15 / 300, rel=1e-6)
    assert range_zaps.meet(made([[10**15] * 3]), 1, 1000, 300, True, True).zaps == pytest.approx(3 * 10**12, rel=1e-6)


def test_a_fault_that_retries_for_ever_is_seen() -> None:
    """A zap comes more often than a fault takes."""
    met = range_zaps.meet(made([[5000]], window=5000), 1, 1000, 10, False, True)
    assert (met.hung, met.retried) == (1, 100)


@given(programs, st.integers(1, 4), st.integers(0, 3), st.integers(1, 300))
def test_links_take_turns(gaps: list[list[int]], vcpus: int, links: int, ns: int) -> None:
    work = made(gaps, links=links)
    met = table_accounting.meet(work, vcpus, ns)
    assert met.links == links * met.faults
    assert met.held == met.links * ns <= met.end
    assert met.waited <= met.links * (vcpus - 1) * ns
    if vcpus == 1:
        assert met.waited == met.contended == 0


def test_a_list_holds_longer_than_a_counter() -> None:
    for vcpus in VCPUS:
        assert table_accounting.hold(LockCosts(), "list", vcpus) > table_accounting.hold(LockCosts(), "counter", vcpus)


# What a trace brings


@pytest.mark.parametrize("name", ["smi-storm-6.1-async", "notifier-6.1", "huge-7.x", "two-vms-6.12", "smi-both-5.10"])
def test_a_workload_counts_what_the_replay_counts(name: str) -> None:
    capabilities = Capabilities(Trace.open(CORPUS / f"{name}.parquet"))
    replayed = run.replay(plan.make(capabilities, [capabilities.own.name]))
    for vm, outcome in zip(capabilities.trace.metadata.vms, replayed.outcomes, strict=True):
        work = workload(capabilities, vm)
        counts, counters = outcome.counts(), outcome.counters
        assert work.tables == counters.tables
        assert work.roots == counts["creations"]
        assert len(work.moments) <= MOMENTS
        assert max(moment.leaves for moment in work.moments) <= counts["faults"] + counters.prefetched
        assert all(moment.apic == 0 for moment in work.moments), "the lab's guests do not touch it"
        assert sum(work.zaps) <= counters.zapped
        assert 0 < work.hold <= work.hold + work.window


def test_recorded_zaps_are_the_notifiers() -> None:
    work = of_corpus("notifier-6.1")
    assert (len(work.zaps), sum(work.zaps)) == (16, 1024)
    assert aging.non_present(work, 1e5, 300, 1) > 0
    assert aging.non_present(of_corpus("smi-storm-6.1"), 1e5, 300, 1) == 0


def test_split_huge_pages_are_mapped() -> None:
    """SPTEs that no fault made."""
    leaves = [moment.leaves for moment in of_corpus("dirty-log-huge-6.1").moments]
    assert max(leaves) > 512
    assert min(leaves) == 1, "the recording goes back to one huge page between"


def test_recorded_agers_are_the_rate(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 512, 0x7F0000000000)
    guest.load()
    for gfn in range(40):
        guest.vm("kvm_age_hva", w0=0x7F0000000000 + (gfn << 12), w1=0x7F0000000000 + (gfn + 4 << 12))
        guest.fault(gfn)
    capabilities = guest.write(tmp_path / "aged.parquet", kernel="6.14.0")
    ((work, (answer,)),), _ = questions.answer(capabilities, questions.asked(aging="lockless"))
    assert (work.aged, work.aged_pages) == (40, 160)
    assert "as recorded), 4 pages each, 1 SPTE a page" in answer.notes[0]
    assert answer.own == "locked"
    assert set(answer.rows[0]) >= {"locked", "lockless"}, "the recorded kernel's own way is shown with what was asked"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("5.10.150", ("locked", "write", False, "memslot", "list", 3)),
        ("5.14.21", ("locked", "read", False, "memslot", "list", 0)),
        ("5.15.0", ("locked", "write", True, "gfn", "list", 0)),
        ("6.1.192", ("locked", "write", True, "gfn", "list", 14)),
        ("6.2.0", ("locked", "write", True, "gfn", "counter", 14)),
        ("6.14.11", ("locked", "write", True, "gfn", "counter", 14)),
        ("6.15.0", ("lockless", "write", True, "gfn", "counter", 14)),
    ],
)
def test_the_recorded_kernels_way(kernel: str, expected: tuple[Any, ...]) -> None:
    found = kernels.recorded(cast("Metadata", SimpleNamespace(raw={"host": {"kernel": kernel}}, seen_policy="")))
    names = ("aging", "zap_lock", "zap_counted", "apicv", "tdp_pages", "pte_list_ext")
    assert tuple(getattr(found, name) for name in names) == expected


def test_since_when_a_kernel_does_it() -> None:
    assert since("aging", "lockless").startswith("6.15 (b146a9b34aed")
    assert since("zap_lock", "write").startswith("5.10 and from 5.15 (")


# The command


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "locked,x",
        "locked@",
        "locked@0",
        "locked@5x0",
        "locked@5x99999999999999",
        "locked@1e4",
        "@5",
        "locked,",
    ],
)
def test_what_is_no_question_is_one_line(text: str) -> None:
    with pytest.raises(Problem, match=r"^--aging .*: give locked, lockless or locked,lockless, such as"):
        parse("aging", text)


def test_a_rate_is_for_what_has_one() -> None:
    assert parse("zap_lock", "read@50x512").text == "read@50x512"
    with pytest.raises(Problem, match=r"--tdp-pages list@5: give list, counter or list,counter$"):
        parse("tdp_pages", "list@5")


@pytest.mark.slow
def test_the_command_answers(tmp_path: Path) -> None:
    runner = CliRunner()
    command = ["replay", str(CORPUS / "notifier-6.1.parquet")]
    options = ["--aging", "lockless", "--zap-lock", "read@1000x1", "--apicv", "memslot", "--tdp-pages", "counter"]
    done = runner.invoke(kvmtrace.app, [*command, *options])
    assert done.exit_code == 0
    for axis in ("aging: this kernel's way is locked", "zap-lock: this kernel's way is write, counted"):
        assert axis in done.stdout
    assert "of the dated table" not in done.stdout
    assert "the dated table's, times" in done.stdout
    (vm,) = json.loads(runner.invoke(kvmtrace.app, [*command, *options, "--json"]).stdout)["designs"]
    axes = {each["axis"]: each for each in vm["questions"]}
    assert list(axes) == ["aging", "zap_lock", "apicv", "tdp_pages"]
    assert [row["vcpus"] for row in axes["aging"]["rows"]] == list(VCPUS)
    assert all(row["lockless"]["waited"] == 0 for row in axes["aging"]["rows"])
    assert {row["variant"] for row in axes["apicv"]["rows"]} == {"memslot", "gfn"}
    counted = [row for row in axes["tdp_pages"]["rows"] if row["variant"] == "counter"]
    assert all(row["acquisitions"] == [0, 0] for row in counted), "the lab has the NX workaround off"


def test_a_trace_without_times_is_one_line(tmp_path: Path) -> None:
    guest = Guest()
    guest.of("kvm_mmu_get_page", root=0x1001, role=guest.role, level=4, w1=0x1001, flags=1)
    guest.of("root_get", root=0x1001, role=guest.role, n=2)
    guest.fault(3, enter=False)
    capabilities = guest.write(tmp_path / "untimed.parquet", lacking=("kvm_entry",))
    with pytest.raises(Problem, match="no entry into the guest is recorded"):
        questions.answer(capabilities, questions.asked(aging="locked"))


def test_a_number_with_its_ends() -> None:
    assert spread(1, 5.5, 3) == "5.50 ns (1 ns .. 5.50 ns)"


# The document


@pytest.fixture(scope="module")
def tables() -> list[design_questions.Found]:
    return design_questions.tables()


@pytest.mark.slow
@pytest.mark.xdist_group("designs")
def test_the_document_is_current(tables: list[design_questions.Found]) -> None:
    assert design_questions.document(tables) == design_questions.DOCUMENT.read_text(), (
        "python -m benchmarks.design_questions"
    )


@pytest.mark.slow
@pytest.mark.xdist_group("designs")
def test_what_the_document_concludes(tables: list[design_questions.Found]) -> None:
    for found in tables:
        axis, rows = found.asked.axis, found.answer.rows
        if axis == "aging":
            for row in rows:
                least, most = row["locked"]["limit"]
                assert least * 0.75 <= row["locked"]["waited"] <= most * 1.1, (found.trace, row)
                assert row["lockless"]["waited"] == 0
                assert (
                    row["lockless"]["calls"] * row["locked"]["end"]
                    >= row["locked"]["calls"] * row["lockless"]["end"] * 0.99
                )
        elif axis == "zap_lock":
            assert all(row["stale"] == 0 for row in rows if row["lock"] == "write" and row["counted"])
            for row in (row for row in rows if row["vcpus"] == 64):
                assert row["stale"] == pytest.approx(row["stale_limit"], rel=0.5, abs=10)
                assert row["waited"] == 0 or 0.5 < row["waited"] / row["limit"][1] < 1.5
        elif axis == "apicv":
            memslot, gfn = rows
            assert gfn["zapped"][2] <= 2 <= memslot["zapped"][2]
            assert memslot["refills"][1] == memslot["zapped"][1]
        else:
            pairs = [(row, other) for row, other in zip(rows[::2], rows[1::2], strict=True)]
            assert all(row["variant"] == "list" and row["spent"] > other["spent"] for row, other in pairs)
            assert all(row["waited"] <= row["limit"][1] for row in rows)
            assert all(row["acquisitions"] == [row["links"]] * 2 for row, _ in pairs)
