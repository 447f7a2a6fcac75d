# SPDX-License-Identifier: Apache-2.0
"""Synthetic traces: KVM's own rules checked row by row, and the shape of rows compared with real recordings."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.profiles import examples
from tests.verbs import answered
from traces.errors import BAD_INPUT, Problem
from traces.reader import Trace
from traces.schema import BY_NAME
from traces.synth import Parameters, SynthCosts, synthesize, vm

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
FROZEN = 0x5A0
PRESENT, LARGE = 1 << 11, 1 << 7
ZAPS = {"kvm_mmu_prepare_zap_page", "zap_root_begin", "zap_root_end"}
FULL = {"policy": "async", "smi_rate": 2_000.0, "memslot_rate": 300.0, "exit_rate": 500.0, "cr0_wp_rate": 300.0}

Rows = list[dict[str, Any]]


def make(path: Path, **given: Any) -> Trace:
    parameters = Parameters(**given)
    summary = synthesize(path, parameters)
    assert summary.complete
    assert not summary.discrepancies
    trace = Trace.open(path)
    trace.verify()
    assert summary.events == trace.metadata.events
    return trace


def rows(trace: Trace) -> Rows:
    return trace.scan().sort("seq").with_columns(pl.col("kind").cast(pl.String)).collect().to_dicts()


def of_kind(listed: Rows, kind: str) -> Rows:
    return [row for row in listed if row["kind"] == kind]


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    policy = draw(st.sampled_from(["async", "preserve"]))
    reset_on = draw(st.sampled_from([None, None, "exit", "non-fault"]))
    rates = st.sampled_from([0.0, 300.0, 2_000.0])
    order: dict[str, Any] = {
        "policy": policy, "reset_on": reset_on, "vms": draw(st.integers(1, 3)), "vcpus": draw(st.integers(1, 3)),
        "smi_rate": 0.0 if policy == "async" and reset_on == "exit" else draw(rates),
        "working_set": draw(st.integers(1, 60)), "memory": draw(st.sampled_from([2, 4, 64, 4096])) << 20,
        "locality": draw(st.sampled_from(["sequential", "zipf", "uniform", "mixed"])),
        "page_size": draw(st.sampled_from(["4k", "2m", "mixed"])), "memslot_rate": draw(rates),
        "exit_rate": draw(rates), "cr0_wp_rate": draw(rates), "zap_rows": draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
    }  # fmt: skip
    if draw(st.booleans()) and any(order[rate] for rate in ("smi_rate", "memslot_rate", "exit_rate", "cr0_wp_rate")):
        return order | {"events": draw(st.integers(1, 1_500))}
    return order | {"duration": draw(st.sampled_from([0.0002, 0.003, 0.006]))}


class Model:
    """KVM's rules for one VM, a row at a time: references, trees, which thread is where."""

    def __init__(self, preserve: bool, zap_rows: bool) -> None:
        self.preserve, self.zap_rows = preserve, zap_rows
        self.refs: dict[int, int] = {}
        self.frame: dict[int, int] = {}
        self.role: dict[int, int] = {}
        self.tree: dict[int, dict[tuple[int, int], int]] = {}  # root: (level, first gfn): SPTE
        self.loaded: dict[int, int] = {}
        self.inside: dict[int, bool] = {}
        self.owned: dict[int, int] = {}  # frame: root
        self.child: dict[str, Any] | None = None
        self.freed: Counter[int] = Counter()
        self.invalid: set[int] = set()
        self.zapping: dict[int, int] = {}  # by thread

    def __call__(self, row: dict[str, Any]) -> None:
        if self.child is not None and row["vcpu"] is not None:
            assert row["kind"] == "kvm_tdp_mmu_spte_changed", "a new table is linked at once"
        getattr(self, "on_" + row["kind"], lambda row: None)(row)

    def on_kvm_mmu_get_page(self, row: dict[str, Any]) -> None:
        assert row["flags"] == 1
        if not row["root"]:
            self.child = row
            return
        root = row["root"]
        assert root not in self.refs
        assert root not in self.owned.values()
        same = [other for other, refs in self.refs.items() if self.role[other] == row["role"] and refs]
        assert not [other for other in same if other not in self.invalid], "one valid root for a role word"
        assert row["table"] not in self.owned, "the frame is in use"
        self.owned[row["table"]] = root
        self.frame[root], self.role[root], self.tree[root] = row["table"], row["role"], {}
        self.refs[root] = int(self.preserve)

    def on_root_get(self, row: dict[str, Any]) -> None:
        assert row["root"] not in self.invalid
        self.refs[row["root"]] += 1
        assert row["refs"] == self.refs[row["root"]]
        assert row["vcpu"] not in self.loaded
        self.loaded[row["vcpu"]] = row["root"]

    def on_root_put(self, row: dict[str, Any]) -> None:
        root = row["root"]
        assert row["table"] == self.frame[root]
        if row["vcpu"] is not None:
            assert self.loaded.pop(row["vcpu"]) == root
            assert row["refs"] == self.refs[root]
        assert row["refs"] - self.refs[root] in (0, 1)  # workers and iterators take one that is not in the rows
        self.refs[root] = row["refs"] - 1
        if self.refs[root] == 0:
            self.invalid.add(root)

    def on_roots_invalidate(self, row: dict[str, Any]) -> None:
        self.invalid |= self.refs.keys()

    def on_vm_destroy(self, row: dict[str, Any]) -> None:
        assert not any(self.inside.values())
        self.loaded.clear()

    def on_kvm_entry(self, row: dict[str, Any]) -> None:
        assert not self.inside.get(row["vcpu"])
        assert self.loaded[row["vcpu"]] == row["root"]
        self.inside[row["vcpu"]] = True

    def on_kvm_exit(self, row: dict[str, Any]) -> None:
        assert self.inside[row["vcpu"]]
        self.inside[row["vcpu"]] = False

    def on_kvm_page_fault(self, row: dict[str, Any]) -> None:
        assert self.loaded[row["vcpu"]] == row["root"]
        assert row["role"] == self.role[row["root"]]

    def on_kvm_tdp_mmu_spte_changed(self, row: dict[str, Any]) -> None:
        tree, place = self.tree[row["root"]], (row["level"], row["gfn"])
        assert row["as_id"] == self.role[row["root"]] >> 24
        if row["new"] & PRESENT:
            assert row["vcpu"] is not None
            assert row["old"] == 0
            assert place not in tree, "nothing is mapped twice in a root"
            for level in range(row["level"] + 1, 5):
                above = tree[level, row["gfn"] >> 9 * (level - 1) << 9 * (level - 1)]
                assert not above & LARGE
            leaf = row["level"] == 1 or row["new"] & LARGE
            assert (self.child is None) == bool(leaf), "a table is linked once, and only new ones are"
            if self.child is not None:
                child, self.child = self.child, None
                assert (child["level"], child["gfn"]) == (row["level"] - 1, row["gfn"])
                assert child["role"] == self.role[row["root"]] - 4 + child["level"]
                assert child["table"] == row["new"] >> 12
                assert child["table"] not in self.owned
                self.owned[child["table"]] = row["root"]
            tree[place] = row["new"]
        else:
            assert self.zap_rows
            assert row["root"] == self.zapping[row["tid"]]
            assert row["old"] == tree.pop(place, 0)

    def on_kvm_mmu_set_spte(self, row: dict[str, Any]) -> None:
        tree = self.tree[row["root"]]
        assert tree[row["level"], row["gfn"]] == row["new"]
        above = row["gfn"] >> 9 * row["level"] << 9 * row["level"]
        assert tree[row["level"] + 1, above] >> 12 == row["table"]

    def on_zap_root_begin(self, row: dict[str, Any]) -> None:
        assert row["tid"] not in self.zapping, "a thread zaps one root at a time"
        self.zapping[row["tid"]] = row["root"]

    def on_zap_root_end(self, row: dict[str, Any]) -> None:
        assert self.zapping.pop(row["tid"]) == row["root"]

    def on_table_free(self, row: dict[str, Any]) -> None:
        root = self.owned.pop(row["table"])
        if row["root"]:
            assert row["root"] == root
            assert self.refs[root] == 0, "a root goes with its last reference"
            assert not self.zap_rows or not self.tree[root], "its tree is empty by then"
            self.freed[root] += 1
            del self.refs[root]


@pytest.mark.slow
@examples(100, HealthCheck.function_scoped_fixture)
@given(order=orders(), batch=st.sampled_from([vm.BATCH_STEPS, 40, 7]))
def test_rows_keep_kvms_rules(order: dict[str, Any], batch: int, tmp_path: Path) -> None:
    """Whatever the size of the batches, over which roots live on."""
    with patch.multiple(vm, BATCH_STEPS=batch, ZAP_BATCH_STEPS=batch, MIN_BATCH_STEPS=1):
        trace = make(tmp_path / "any.parquet", **order)
    listed = rows(trace)
    times = [row["time"] for row in listed]
    assert times == sorted(times)
    assert [row["seq"] for row in listed] == list(range(len(listed)))
    models = {vm["id"]: Model(order["policy"] == "preserve", order["zap_rows"]) for vm in trace.metadata.vms}
    assert len(models) == order["vms"]
    for row in listed:
        if row["vm"] is not None:
            models[row["vm"]](row)
    for model in models.values():
        assert not model.owned, "every table went back"
    assert not trace.metadata.uncreated_roots
    assert trace.metadata.root_count == sum(sum(model.freed.values()) for model in models.values())
    counts = Counter(trace.counts())
    assert counts["kvm_entry"] == counts["kvm_exit"]
    assert counts["kvm_page_fault"] == counts["kvm_mmu_spte_requested"] == counts["kvm_mmu_set_spte"]
    if "events" in order:
        assert counts["vm_destroy"] == order["vms"]
        assert len(listed) >= order["events"]


@examples(15, HealthCheck.function_scoped_fixture)
@given(order=orders())
def test_a_preserving_host_sees_first_touches_only(order: dict[str, Any], tmp_path: Path) -> None:
    listed = rows(make(tmp_path / "any.parquet", **order | {"policy": "preserve"}))
    epoch: Counter[int] = Counter()
    seen: Counter[tuple[int, int, int, int]] = Counter()
    roots: set[tuple[int, int, int]] = set()
    for row in listed:
        epoch[row["vm"]] += row["kind"] == "kvm_mmu_zap_all_fast"
        if row["kind"] == "kvm_page_fault":
            seen[row["vm"], epoch[row["vm"]], row["role"], row["addr"] >> 12] += 1
        if row["kind"] == "kvm_mmu_get_page" and row["root"]:
            word = (row["vm"], epoch[row["vm"]], row["role"])
            assert word not in roots, "one creation for a word between two invalidations"
            roots.add(word)
    assert set(seen.values()) <= {1}


def test_an_async_host_faults_the_working_set_in_again(tmp_path: Path) -> None:
    order = {"smi_rate": 1_000.0, "working_set": 37, "duration": 0.0205}
    lost = make(tmp_path / "async.parquet", policy="async", **order)
    kept = make(tmp_path / "preserve.parquet", policy="preserve", **order)
    # 20 SMIs: the working set 20 times and a half, the code page and SMRAM with every root.
    assert len(of_kind(rows(lost), "kvm_smm_transition")) == 40
    faults = Counter(row["root"] for row in of_kind(rows(lost), "kvm_page_fault"))
    assert sorted(faults.values()) == [1] * 20 + [1 + 37 // 2] + [38] * 20
    assert kept.counts()["kvm_page_fault"] == 37 + 2
    assert kept.metadata.root_count == 2


def test_another_vcpu_keeps_the_root(tmp_path: Path) -> None:
    trace = make(tmp_path / "two.parquet", policy="async", vcpus=2, smi_rate=1_000.0, duration=0.0105)
    assert Counter(row["role"] for row in of_kind(rows(trace), "kvm_mmu_get_page") if row["root"]) == {
        0x3784: 1, 0x01003784: 10,
    }  # fmt: skip


@pytest.mark.slow
def test_the_published_experiment(tmp_path: Path) -> None:
    """Reset on every exit but faults: 15 roots where they are preserved, as many as exits where not."""
    trace = make(tmp_path / "preserve.parquet", reset_on="non-fault")
    listed = trace.scan().with_columns(pl.col("kind").cast(pl.String)).collect()
    assert trace.metadata.root_count == 15
    assert listed.filter(pl.col("kind") == "mmu_reset").height > 100_000
    trace = make(tmp_path / "async.parquet", reset_on="non-fault", policy="async")
    assert trace.metadata.root_count > 100_000


def test_reset_on_every_exit(tmp_path: Path) -> None:
    kept = rows(make(tmp_path / "preserve.parquet", reset_on="exit", duration=0.05))
    assert len({row["addr"] for row in of_kind(kept, "kvm_page_fault")}) > 10, "the guest advances"
    lost = rows(make(tmp_path / "async.parquet", reset_on="exit", policy="async", duration=0.05))
    assert {row["addr"] for row in of_kind(lost, "kvm_page_fault")} <= {0x1000, 0x1004, 0x1018}, "it never leaves"
    for listed in (kept, lost):
        for vcpu_rows in between(listed, "kvm_exit", "kvm_entry"):
            resets = [row for row in vcpu_rows if row["kind"] in ("mmu_reset", "mmu_free_obsolete_roots")]
            assert resets or vcpu_rows[-1]["kind"] != "kvm_entry", "every exit resets before the next entry"


def between(listed: Rows, first: str, last: str) -> list[Rows]:
    """The runs of vCPU 0's own rows from a `first` to the next `last`, both included."""
    tid = next(row["tid"] for row in listed if row["kind"] == "kvm_entry")
    runs: list[Rows] = []
    inside = False
    for row in listed:
        if row["tid"] != tid:
            continue
        if row["kind"] == first:
            runs.append([])
            inside = True
        if inside:
            runs[-1].append(row)
        inside = inside and row["kind"] != last
    return runs


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def made(name: str, **given: Any) -> bytes:
        order = FULL | {"vms": 2, "duration": 0.01, "locality": "mixed", "page_size": "mixed"} | given
        synthesize(tmp_path / name, Parameters(**order))
        return (tmp_path / name).read_bytes()

    assert made("a", seed=4) == made("b", seed=4)
    assert made("a", seed=4) != made("c", seed=5)


def watched(trace: Trace) -> set[str]:
    return {str(probe["kind"]) for probe in trace.metadata.probes if probe["how"] != "none"}


@pytest.mark.slow
def test_metadata_says_that_nobody_recorded_it(tmp_path: Path) -> None:
    trace = make(tmp_path / "plain.parquet", seed=9, **FULL, duration=0.01)
    raw = trace.metadata.raw
    assert raw["origin"] == "synthetic"
    assert raw["synthetic"]["parameters"]["seed"] == 9
    assert "synthetic" in trace.metadata.kernel
    probed = watched(trace)
    assert trace.counts().keys() <= probed
    assert not ZAPS & (probed | trace.counts().keys())
    zapped = make(tmp_path / "zapped.parquet", **FULL, duration=0.01, zap_rows=True)
    assert watched(zapped) == probed | ZAPS == watched(Trace.open(CORPUS / "smi-storm-6.1.parquet"))
    assert zapped.counts().keys() <= watched(zapped)
    changed = [row for row in rows(zapped) if row["kind"] == "kvm_tdp_mmu_spte_changed" and row["new"] == FROZEN]
    assert len(changed) > 512


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "sync"}, {"locality": "random"}, {"page_size": "1g"}, {"reset_on": "never"}, {"vms": 0},
        {"vcpus": 0}, {"smi_rate": -1.0}, {"working_set": 0}, {"memory": 3 << 20}, {"memory": 1 << 20},
        {"memory": 1 << 50}, {"duration": 0.0}, {"events": 0}, {"events": 5, "duration": 1.0}, {"seed": -1},
        {"zap_rows": True, "memory": 32 << 30}, {"events": 5, "smi_rate": 0.0}, {"exit_rate": float("nan")},
        {"policy": "async", "reset_on": "exit", "smi_rate": 1.0}, {"costs": SynthCosts(fault=0)},
    ],
)  # fmt: skip
def test_bad_parameters_are_a_usage_error(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        synthesize(tmp_path / "none.parquet", Parameters(**wrong))
    assert caught.value.code == BAD_INPUT
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="missing"):
        synthesize(tmp_path / "missing" / "out.parquet", Parameters(duration=0.001))


# Shape: what a real recording of the same policy shows.

SHAPES = [("preserve", ""), ("async", "-async")]


@cache
def real(scenario: str, suffix: str) -> Rows:
    return rows(Trace.open(CORPUS / f"{scenario}-6.1{suffix}.parquet"))


@pytest.fixture(scope="module")
def storms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """By policy."""
    order = {"smi_rate": 1_000.0, "working_set": 600, "duration": 0.0105, "zap_rows": True}
    directory = tmp_path_factory.mktemp("storms")
    return {policy: rows(make(directory / policy, policy=policy, **order)) for policy, _ in SHAPES}


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_kinds_fill_the_columns_that_recordings_fill(policy: str, suffix: str, tmp_path: Path) -> None:
    order = {"policy": policy, "smi_rate": 1_000.0, "memslot_rate": 300.0, "duration": 0.0105, "zap_rows": True}
    ours = filled(rows(make(tmp_path / "ours.parquet", **order)))
    theirs = filled(real("smi-storm", suffix) + real("slot-delete", suffix))
    assert ours.keys() <= theirs.keys()
    for kind, columns in ours.items():
        assert columns == theirs[kind], kind
    missing = theirs.keys() - ours.keys()
    assert {name for name in missing if not name.startswith(("kvm_unmap", "kvm_set_spte_hva", "kvm_apicv"))} == set()


def filled(listed: Rows) -> dict[str, set[str]]:
    """By kind, the columns that hold something in any of its rows, and whether rows are on a vCPU."""
    found: dict[str, set[str]] = {}
    for row in listed:
        columns = found.setdefault(row["kind"], set())
        columns |= {name for name in BY_NAME[row["kind"]].columns if row[name]}
        columns.add("on a vCPU" if row["vcpu"] is not None else "elsewhere")
    return found


@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_a_fault_is_the_rows_that_recordings_show(policy: str, suffix: str, storms: dict[str, Rows]) -> None:
    def shapes(listed: Rows) -> set[tuple[Any, ...]]:
        exits = [run for run in between(listed, "kvm_exit", "kvm_entry") if run[0]["code"] == 0x400]
        return {tuple((row["kind"], row["level"], row["role"], row["as_id"]) for row in run) for run in exits}

    assert shapes(storms[policy]) == shapes(real("smi-storm", suffix))


@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_an_smi_is_the_rows_that_recordings_show(policy: str, suffix: str, storms: dict[str, Rows]) -> None:
    def shapes(listed: Rows) -> list[tuple[Any, ...]]:
        runs, run = [], None
        for row in [row for row in listed if row["vcpu"] == 0 and row["kind"] != "ioctl_end"]:
            if row["kind"] == "kvm_exit" and row["code"] == 0x7B:
                run = []
            if run is not None:
                run.append((row["kind"], row["role"], row["refs"], row["flags"], row["value"] >> 63, row["root"] > 0))
                if row["kind"] == "kvm_entry" and row["rip"] == 0x1018:
                    runs.append(tuple(run))
                    run = None
        return runs

    ours, theirs = shapes(storms[policy]), shapes(real("smi-storm", suffix))
    assert len(theirs) >= 3
    assert ours[0] == theirs[0]
    assert set(ours[1:]) == set(theirs[1:])


@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_a_deleted_slot_is_the_rows_that_recordings_show(policy: str, suffix: str, tmp_path: Path) -> None:
    def shape(listed: Rows) -> list[tuple[Any, ...]]:
        first = next(i for i, row in enumerate(listed) if row["kind"] == "memslot" and not row["value"])
        last = next(i for i, row in enumerate(listed) if i > first and row["kind"] == "mmu_load")
        run = [row for row in listed[first:last] if not row["kind"].endswith(("spte_changed", "zap_page", "_free"))]
        return [
            (row["kind"], row["role"], row["level"], row["refs"], row["flags"], row["as_id"], row["root"] > 0)
            for row in run
        ]

    order = {"smi_rate": 0.0, "memslot_rate": 300.0, "duration": 0.005, "zap_rows": True}
    assert shape(rows(make(tmp_path / "ours.parquet", policy=policy, **order))) == shape(real("slot-delete", suffix))


@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_a_zap_is_the_rows_that_recordings_show(policy: str, suffix: str, tmp_path: Path) -> None:
    """The first root to die has the same tables as the recording's: two of level 1, under one each of 2 and 3."""

    def shape(listed: Rows) -> list[tuple[Any, ...]]:
        kinds = (*ZAPS, "kvm_tdp_mmu_spte_changed")
        run = [row for row in listed if row["kind"] in kinds and row["vcpu"] is None]
        root = run[0]["root"]
        last = max(i for i, row in enumerate(run) if row["kind"] == "zap_root_end" and row["root"] == root)
        return [
            (row["kind"], row["level"], row["role"], row["gfn"], row["old"] & 0xFFF, row["new"])
            for row in run[: last + 1]
        ]

    order = {"smi_rate": 0.0, "memslot_rate": 50.0, "duration": 0.015, "zap_rows": True}
    ours = shape(rows(make(tmp_path / "ours.parquet", policy=policy, **order)))
    assert ours[:1541] == shape(real("slot-delete", suffix))[:1541]


@pytest.mark.parametrize(("policy", "suffix"), SHAPES)
def test_a_vms_end_is_the_rows_that_recordings_show(policy: str, suffix: str, storms: dict[str, Rows]) -> None:
    def shape(listed: Rows) -> list[tuple[Any, ...]]:
        first = next(i for i, row in enumerate(listed) if row["kind"] == "zap_all")
        skipped = ("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page", "table_free")
        return [
            (row["kind"], row["role"], row["level"], row["refs"], row["flags"], row["root"] > 0, row["vcpu"])
            for row in listed[first:]
            if row["kind"] not in skipped
        ]

    assert shape(storms[policy]) == shape(real("smi-storm", suffix))


def test_a_vms_beginning_is_the_rows_that_recordings_show(tmp_path: Path) -> None:
    def shape(listed: Rows) -> list[tuple[Any, ...]]:
        last = next(i for i, row in enumerate(listed) if row["kind"] == "kvm_entry")
        kinds = ("kvm_apicv_inhibit_changed", "kvm_unmap_hva_range", "kvm_set_spte_hva")
        shapes = [
            (row["kind"], row["code"], row["ret"], row["role"], row["refs"], row["vm"], row["vcpu"])
            for row in listed[: last + 1]
            if row["kind"] not in kinds
        ]
        return list(dict.fromkeys(shapes))  # we have a slot more

    ours = shape(rows(make(tmp_path / "ours.parquet", duration=0.001)))
    assert ours == shape(real("smi-storm", ""))


@pytest.mark.slow
def test_the_command_makes_what_info_reads(tmp_path: Path) -> None:
    out = str(tmp_path / "out.parquet")
    done = answered("synth", out, "--policy", "async", "--events", "3000", "--memory", "8M", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["parameters"]["memory"] == 8 << 20
    facts = json.loads(answered("info", out, "--json").stdout)
    assert facts["events"] == document["events"] >= 3000
    assert facts["preset"] == "synthetic"
    assert "synthetic" in answered("info", out).stdout


def test_the_command_refuses_bad_parameters(tmp_path: Path) -> None:
    done = answered("synth", str(tmp_path / "out.parquet"), "--policy", "sync")
    assert done.returncode == BAD_INPUT
    assert done.stderr.count("\n") == 1
    assert "--policy sync" in done.stderr


def test_the_commands_help_has_an_example() -> None:
    assert "kvmtrace synth" in answered("synth", "--help").stdout.split("Example")[1]
