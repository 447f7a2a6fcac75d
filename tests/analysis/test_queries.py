# SPDX-License-Identifier: Apache-2.0
"""Queries against what the rows say when they are gone through one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis.queries import mapped_pages, recorded, replayed
from analysis.queries.registry import named, queries
from analysis.reading.result_source import Result
from analysis.reading.sources import GuestOfVm, Recording
from replay import bounds, plan, run
from replay.decode.capabilities import Capabilities
from tests.analysis.sources import CORPUS, OLD_STORM, ROOT, STORM, TIMING, result_of
from tests.replay.recording import ALL_KINDS, Guest, manifest
from tests.thinned import thinned
from tests.traces.making import stream, trace
from traces import kernels
from traces.errors import Problem
from traces.imports.guest_switches import GuestTasks
from traces.reader import Trace

RECORDINGS = [CORPUS / f"{name}.parquet" for name in ("churn-6.1", "two-vms-6.1-async", "mmio-6.12", "huge-5.10")]


def asked(frame: pl.LazyFrame) -> pl.DataFrame:
    return frame.collect(engine="streaming")


def rows(recording: Recording) -> list[dict[str, Any]]:
    found = [row for batch in recording.trace.batches() for row in batch.to_pylist()]
    return sorted(found, key=lambda row: row["seq"])


@pytest.mark.parametrize("window", [1_000_000, 7_000_000, 100_000_000])
@pytest.mark.parametrize("path", thinned(4, RECORDINGS), ids=lambda path: path.stem)
def test_guest_time_of_windows_is_that_of_each_entry_to_its_exit(path: Path, window: int) -> None:
    recording = Recording.open(path)
    every = rows(recording)
    first, last = min(row["time"] for row in every), max(row["time"] for row in every)
    guest: Counter[tuple[int, int, int]] = Counter()
    faults: Counter[tuple[int, int, int]] = Counter()
    inside: dict[tuple[int, int], int] = {}

    def spread(vcpu: tuple[int, int], begin: int, end: int) -> None:
        while begin < end:
            stop = min(end, first + ((begin - first) // window + 1) * window)
            guest[(*vcpu, (begin - first) // window)] += stop - begin
            begin = stop

    for row in every:
        vcpu = (row["vm"], row["vcpu"])
        if row["vcpu"] is None:
            continue
        if row["kind"] == "kvm_entry":
            inside[vcpu] = row["time"]
        elif row["kind"] == "kvm_exit" and vcpu in inside:
            spread(vcpu, inside.pop(vcpu), row["time"])
        elif row["kind"] == "kvm_page_fault":
            faults[(*vcpu, (row["time"] - first) // window)] += 1
    for vcpu, since in inside.items():
        spread(vcpu, since, last + 1)

    found = asked(recorded.windows(recording, window_ns=window))
    assert len(found)
    for row in found.iter_rows(named=True):
        key = (row["vm"], row["vcpu"], row["since_ns"] // window)
        assert row["guest_ns"] == guest[key], row
        assert row["faults"] == faults[key]
        assert row["time"] == first + row["since_ns"]
    assert found["faults"].sum() == recording.metadata.kinds["kvm_page_fault"] == sum(faults.values())
    assert found["faults"].to_list() == sorted(found["faults"].to_list(), reverse=True)


def test_a_window_with_lost_entries_has_no_guest_time(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    for _ in range(3):
        guest.exit(0x400)
    guest.write(tmp_path / "t.parquet")
    (row,) = asked(recorded.windows(Recording.open(tmp_path / "t.parquet"))).iter_rows(named=True)
    assert row["exits"] == 3
    assert row["guest_ns"] is None
    assert row["guest_share"] is None


def test_what_was_not_watched_is_refused_or_null_but_never_zero(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.exit(0x400)
    lacking = ("kvm_mmu_set_spte", "kvm_page_fault", "kvm_smm_transition")
    trace(tmp_path / "t.parquet", stream(guest.rows), manifest(lacking=lacking))
    recording = Recording.open(tmp_path / "t.parquet")
    (row,) = asked(recorded.windows(recording)).iter_rows(named=True)
    assert (row["faults"], row["smis"], row["exits"]) == (None, None, 1)
    for query in (mapped_pages.gfns, mapped_pages.regions, mapped_pages.slots):
        with pytest.raises(Problem, match=r"query \w+: kvm_mmu_set_spte not recorded"):
            query(recording)
    with pytest.raises(Problem, match="query unserved: kvm_page_fault not recorded"):
        mapped_pages.unserved(recording)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_installs_by_page_region_and_slot_are_those_of_the_rows(path: Path) -> None:
    recording = Recording.open(path)
    installs = Counter(
        (row["vm"], row["gfn"], row["level"]) for row in rows(recording) if row["kind"] == "kvm_mmu_set_spte"
    )
    pages = asked(mapped_pages.gfns(recording))
    assert {(row["vm"], row["gfn"], row["level"]): row["installs"] for row in pages.iter_rows(named=True)} == installs
    assert asked(mapped_pages.gfns(recording, top=3)).equals(pages.head(3))
    regions = asked(mapped_pages.regions(recording))
    assert regions["installs"].sum() == installs.total()
    assert regions["pages"].sum() == len(installs)
    by_region: Counter[tuple[int, int]] = Counter()
    for (vm, gfn, _), count in installs.items():
        by_region[vm, gfn // 512 * 512] += count
    assert {(row["vm"], row["region"]): row["installs"] for row in regions.iter_rows(named=True)} == by_region
    assert asked(mapped_pages.slots(recording))["installs"].sum() == installs.total()
    known = {(vm["id"], s["slot"], s["gfn"], s["pages"]) for vm in recording.metadata.vms for s in vm["slots"]}
    for row in pages.filter(pl.col("slot").is_not_null()).iter_rows(named=True):
        assert (row["vm"], row["slot"], row["slot_gfn"], row["slot_pages"]) in known
        assert row["slot_gfn"] <= row["gfn"] < row["slot_gfn"] + row["slot_pages"]


def test_pages_find_their_slot_and_holes_have_none(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 16, 1 << 40, number=0)
    guest.slot(16, 16, 1 << 41, number=1)
    guest.slot(64, 1, 1 << 42, number=2)
    guest.load()
    for gfn in (0, 15, 16, 31, 32, 63, 64, 65):
        guest.fault(gfn)
    guest.write(tmp_path / "t.parquet")
    found = asked(mapped_pages.gfns(Recording.open(tmp_path / "t.parquet")))
    where = dict(found.select("gfn", "slot").iter_rows())
    assert where == {0: 0, 15: 0, 16: 1, 31: 1, 32: None, 63: None, 64: 2, 65: None}


def test_slots_of_impossible_vms_are_left_out(tmp_path: Path) -> None:
    recording = Recording.open(STORM)
    odd = [{**recording.metadata.vms[0], "id": 1 << 40}, *recording.metadata.vms]
    recording.trace.metadata = replace(recording.metadata, vms=tuple(odd))
    assert asked(mapped_pages.gfns(recording))["slot"].null_count() == 0
    assert asked(recorded.stuck(recording)).is_empty()


def test_faults_that_map_nothing_are_found_and_refaults_are_not(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 16, 1 << 40)
    guest.load()
    for _ in range(5):
        guest.fault(1)  # mapped each time: roots come and go
        guest.of("kvm_page_fault", w0=2 << 12)  # spurious, or stale
        guest.of("kvm_page_fault", w0=99 << 12)  # no slot: a device
        guest.of("kvm_page_fault", w0=3 << 12)
        guest.of("fast_page_fault", w0=3 << 12, w1=2, w2=1, w3=3)  # a permission, fixed
    guest.of("kvm_page_fault", w0=4 << 12)
    guest.write(tmp_path / "t.parquet")
    found = asked(mapped_pages.unserved(Recording.open(tmp_path / "t.parquet")))
    assert [(row["gfn"], row["slot"], row["unserved"]) for row in found.iter_rows(named=True)] == [
        (2, 0, 5), (99, None, 5),
    ]  # fmt: skip


def test_unserved_is_not_for_the_shadow_mmu() -> None:
    with pytest.raises(Problem, match="the guest's own under the shadow MMU"):
        mapped_pages.unserved(Recording.open(CORPUS / "smi-storm-6.1-shadow.parquet"))


def test_roots_live_as_long_as_they_are_seen() -> None:
    recording = Recording.open(OLD_STORM)
    seen: dict[int, list[int]] = {}
    for row in rows(recording):
        if row["root"]:
            seen.setdefault(row["root"], []).append(row["time"])
    lives = asked(recorded.lives(recording))
    assert {row["root"]: row["life_ns"] for row in lives.iter_rows(named=True)} == {
        root: max(times) - min(times) for root, times in seen.items()
    }
    roles = asked(recorded.roles(recording))
    assert roles["roots"].sum() == len(seen) == recording.metadata.root_count
    assert roles["faults"].sum() == recording.metadata.kinds["kvm_page_fault"]
    assert {f"{role:#x}" for role in roles["role"]} == {"0x3784", "0x1003784"}


@pytest.mark.parametrize(
    ("watched", "kind"), [(ALL_KINDS, "mmio"), ((*ALL_KINDS, "kvm_userspace_exit"), "mmio_in_kernel")]
)
def test_a_vcpu_at_one_instruction_is_stuck(tmp_path: Path, watched: tuple[str, ...], kind: str) -> None:
    guest = Guest()
    guest.load()
    for _ in range(40):
        guest.of("kvm_exit", w0=0x400, w1=0x1234)
        guest.of("kvm_page_fault", w0=2 << 12)
        guest.of("kvm_entry", root=guest.root, w0=0x1234)
    probes = [{"kind": each, "how": "raw"} for each in watched]
    guest.write(tmp_path / "t.parquet", kernel="6.1.20", probes=probes)
    recording = Recording.open(tmp_path / "t.parquet")
    assert asked(recorded.stuck(recording)).is_empty()
    (row,) = asked(recorded.stuck(recording, exits=30)).iter_rows(named=True)
    assert (row["vcpu"], row["exits"], row["kind"]) == (0, 40, kind), "no memslot is there"
    shown = asked(recorded.stuck_rows(recording, exits=30))["row"].to_list()
    assert [row.split()[-1] for row in shown if "kvm_entry" in row] == ["rip=0x1234"]


@pytest.mark.parametrize("path", [STORM, OLD_STORM, CORPUS / "two-vms-6.1.parquet"], ids=lambda path: path.stem)
def test_policies_are_what_the_replay_counts(path: Path, tmp_path: Path) -> None:
    counted = run.replay(plan.make(Capabilities(Trace.open(path)), []))
    found = asked(replayed.vms(result_of(path, tmp_path)))
    assert len(found)
    for row in found.iter_rows(named=True):
        outcomes = [one for one in counted.outcomes if one.target.name == row["policy"] and one.vm == row["vm"]]
        for name, count in bounds.counts(outcomes, counted.plan.refault, 0.0).items():
            name = "roots_created" if name == "creations" else name
            assert (row[f"{name}_low"], row[f"{name}_high"]) == (count.low, count.high), name


def test_policies_sum_vms_and_causes_sum_to_frees(tmp_path: Path) -> None:
    result = result_of(CORPUS / "two-vms-6.1.parquet", tmp_path)
    whole, vms, causes = (asked(query(result)) for query in (replayed.policies, replayed.vms, replayed.causes))
    for row in whole.iter_rows(named=True):
        mine = vms.filter(policy=row["policy"])
        assert len(mine) == 2
        assert row["faults_high"] == mine["faults_high"].sum()
        assert row["roots_peak_high"] == mine["roots_peak_high"].max()
        assert row["memory_bytes_high"] == mine["memory_bytes_high"].max()
        assert row["frees_high"] == causes.filter(policy=row["policy"])["freed_high"].sum()


def test_times_are_those_of_the_rows(tmp_path: Path) -> None:
    result = result_of(TIMING / "smi-storm-loops-20-6.1-async.parquet", tmp_path)
    vcpus, stalls = asked(replayed.vcpus(result)), asked(replayed.stalls(result))
    for row in asked(replayed.policies(result)).iter_rows(named=True):
        mine = vcpus.filter(policy=row["policy"])
        assert row["wall_ns_high"] == mine["wall_ns"].max()
        assert row["stall_share_high"] == pytest.approx(mine["stalled_ns"].sum() / mine["wall_ns"].sum())
        assert row["longest_stall_ns_high"] == (stalls.filter(policy=row["policy"])["wall_ns"].max() or 0)
        assert row["band_ns_low"] < row["wall_ns_low"] <= row["wall_ns_high"] < row["band_ns_high"]
    assert len(stalls)


@pytest.fixture(scope="module")
def replayed_storm(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(OLD_STORM, tmp_path_factory.mktemp("storm"))


@pytest.mark.parametrize("name", sorted(queries()))
def test_every_query_answers_and_says_what_it_asks(name: str, replayed_storm: Result, tmp_path: Path) -> None:
    query = named(name)
    assert query.about.endswith((".", ":"))
    assert len(query.about) < 120
    of = {"rmaps": CORPUS / "smi-storm-6.1-shadow.parquet", "memory_types": CORPUS / "smi-storm-6.1-ept.parquet"}
    recording = Recording.open(of.get(name, OLD_STORM))
    ran = pl.DataFrame({"cpu": [0], "time": [0], "pid": [7], "task": ["sh"]})
    recording.guest = GuestOfVm(1, GuestTasks(tmp_path, ran, "", 0, 0))
    source = recording if query.source is Recording else replayed_storm
    assert isinstance(query(source), pl.LazyFrame)
    assert set(asked(query(source).head(1)).columns)
    other: Recording | Result = replayed_storm if query.source is Recording else recording
    with pytest.raises(Problem, match=f"query {name} is for"):
        query(other)


def test_a_query_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(Problem, match=r"no such query; there are .*windows"):
        named("nothing")


def test_an_old_name_of_a_query_still_works() -> None:
    assert named("doings") is named("vcpu_states")
    assert "doings" not in queries()


def test_every_query_is_documented_with_what_it_needs() -> None:
    text = (ROOT / "analysis" / "REPORT.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): row[1:3] for row in rows if row[1] in ("recording", "result")}
    assert told == {
        name: [
            "recording" if query.source is Recording else "result",
            ", ".join(f"`{kind}`" for kind in query.needs),
        ]
        for name, query in queries().items()
    }


def test_reverse_maps_grow_with_shadow_pages_and_go_with_them(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 64, 0x4000)
    guest.load()

    def spte(gfn: int, table: int, level: int = 1) -> None:
        guest.of("kvm_mmu_set_spte", w0=gfn, w1=0xE67, w2=table, level=level)

    for table in (0x100, 0x101, 0x102):
        spte(5, table)
    spte(5, 0x102)  # the same SPTE again
    guest.of("kvm_mmu_prepare_zap_page", w1=0x101, level=1)
    spte(5, 0x103)
    spte(5, 0x101)  # the table's frame has been given to another page
    spte(6, 0x103)
    spte(5, 0x103, level=2)
    path = guest.write(tmp_path / "shadow.parquet", policy="shadow").trace.path
    found = mapped_pages.rmaps(Recording.open(path)).collect()
    assert found.select("gfn", "level", "sptes", "descs", "slot").rows() == [
        (5, 1, 4, 1, 0), (5, 2, 1, 0, 0), (6, 1, 1, 0, 0),
    ]  # fmt: skip


def test_chains_are_as_long_as_the_kernel_makes_them() -> None:
    assert [kernels.at(version).pte_list_ext for version in ("5.10", "6.12")] == [3, 14]
    with pytest.raises(Problem, match="the TDP MMU has no reverse maps"):
        mapped_pages.rmaps(Recording.open(CORPUS / "smi-storm-6.1.parquet"))
    longest = mapped_pages.rmaps(Recording.open(CORPUS / "wp-toggle-6.1-npt0.parquet")).collect()
    assert longest["sptes"].max() == 2
    assert longest["descs"].max() == 1
