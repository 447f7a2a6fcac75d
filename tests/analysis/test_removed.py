# SPDX-License-Identifier: Apache-2.0
"""Every page that is mapped again, and every one that is removed, has its cause: on recordings, and by made rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.passes.last_mappings import roots_of
from analysis.passes.removal_causes import causes_of
from analysis.passes.removal_totals import FIELDS
from analysis.queries.removed import refaults, removals
from analysis.reading import removal_counts, rows
from analysis.reading.sources import Recording
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import replay
from tests.corpus import CORPUS
from tests.replay.plain import plain
from tests.replay.recording import TID
from tests.replay.test_apart import TimedGuest
from tests.thinned import thinned
from traces.errors import Problem
from traces.reader import Trace
from traces.schema import BY_NAME

BENEATH = tuple(f"analysis.passes.{name}" for name in ("removal_totals", "acting_threads", "last_mappings"))
NX_TID = 77
# What each scenario's pages were mapped again for, and permissions repaired for.
SCENARIOS = {
    "smi-storm-6.1-async": {"smi": "mapped", "rsm": "mapped"},
    "smi-storm-6.12": {},
    "cr4-toggle-6.1-async": {"cr4": "mapped"},
    "notifier-6.1": {"notifier": "mapped"},
    "notifier-how-dontneed-7.x": {"notifier": "mapped"},
    "dirty-log-6.1": {"get_dirty_log": "fixes", "dirty_log_begins": "fixes"},
    "dirty-log-7.x": {"get_dirty_log": "fixes", "dirty_log_begins": "fixes"},
    "dirty-log-huge-6.1": {"dirty_log_begins": "fixes", "get_dirty_log": "fixes", "dirty_log_ends": ""},
    "slot-delete-6.1": {"memslot": "mapped"},
    "slot-delete-7.x": {"memslot": "mapped"},
}


def of(path: Path) -> pl.DataFrame:
    return refaults(Recording.open(path)).collect()


@pytest.mark.parametrize("name", SCENARIOS)
def test_pages_are_mapped_again_for_what_the_scenario_does(name: str) -> None:
    found = of(CORPUS / f"{name}.parquet").filter(pl.col("cause") != "first")
    for cause, count in SCENARIOS[name].items():
        assert not count or found.filter(cause=cause)[count].sum() > 0, (name, cause, found)
    explained = ["smi", "rsm", "vm_end", "exit", *SCENARIOS[name]]
    assert set(found["cause"]) <= set(explained), (name, found)


WHOLE = sorted(
    path.stem
    for path in CORPUS.glob("*.parquet")
    # 5.10 shows no removals and gives MMIO SPTEs as leaves, too; the shadow MMU has no answer.
    if not any(word in path.stem for word in ("shadow", "npt0", "ept0", "5.10"))
)


@pytest.mark.corpus
@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_they_are_as_many_as_a_replay_counts(name: str) -> None:
    """Faults, re-faults and fixes of the recorded policy: the model counts them another way."""
    path = CORPUS / f"{name}.parquet"
    capabilities = Capabilities(Trace.open(path))
    outcomes = replay(plan.make(capabilities, [capabilities.own.name])).outcomes
    vcpus = [outcome.vcpus for outcome in outcomes if outcome.vcpus is not None]
    found = of(path)
    counted = (found["mapped"].sum(), found.filter(pl.col("cause") != "first")["mapped"].sum(), found["fixes"].sum())
    assert counted == tuple(
        sum(int(getattr(each, what).sum()) for each in vcpus) for what in ("faults", "refaults", "fixes")
    )
    assert not found.filter(pl.col("cause").is_in(["unseen", "other"]))["mapped"].sum()


@pytest.mark.parametrize(
    "name", thinned(3, ["smi-storm-6.1-async", "dirty-log-huge-6.1", "notifier-5.10", "mmio-7.x", "two-vms-6.1"])
)
def test_compiled_it_does_what_it_does_as_plain_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CORPUS / f"{name}.parquet"
    compiled = Recording.open(path).ask(question(path))[0]
    module = plain("analysis.passes.removals", *BENEATH)
    assert not module.COMPILED
    monkeypatch.setattr(removal_counts, "Removals", module.Removals)
    assert Recording.open(path).ask(question(path))[0].equals(compiled)


def question(path: Path) -> removal_counts.RemovalQuestion:
    capabilities = Capabilities(Trace.open(path))
    return removal_counts.RemovalQuestion(capabilities.trace, capabilities.kernel)


def test_it_is_the_same_wherever_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    path = CORPUS / "smi-storm-6.1-async.parquet"
    whole = Recording.open(path).ask(question(path))[0]
    monkeypatch.setattr(rows, "BATCH_ROWS", 97)
    assert Recording.open(path).ask(question(path))[0].equals(whole)


class Changing(TimedGuest):
    """A guest whose page 0x400 is mapped, taken and mapped again."""

    def changed(self, tid: int, old: int, new: int, root: int = 0, **more: Any) -> None:
        self.vm("kvm_tdp_mmu_spte_changed", w0=0x400, w1=old, w2=new, level=1, root=root, **more)
        self.rows[-1]["tid"] = tid

    def maps(self) -> None:
        self.of("kvm_exit", w0=0x400, w1=0x1004, w2=4, w3=0x400_000)
        self.of("kvm_page_fault", w0=0x400_000, w1=4, w2=0x1004, root=self.root, role=self.role)
        self.of("kvm_mmu_spte_requested", w0=0x400, level=1, root=self.root)
        self.of("kvm_tdp_mmu_spte_changed", w0=0x400, w2=LEAF, level=1, root=self.root)
        self.of("kvm_mmu_set_spte", w0=0x400, level=1, root=self.root, w1=LEAF)
        self.of("kvm_entry", root=self.root, w0=0x1004)

    def writes(self) -> None:
        self.of("kvm_exit", w0=0x400, w1=0x1004, w2=7, w3=0x400_000)
        self.of("kvm_page_fault", w0=0x400_000, w1=7, w2=0x1004, root=self.root, role=self.role)
        self.of("kvm_tdp_mmu_spte_changed", w0=0x400, w1=LEAF & ~2, w2=LEAF, level=1, root=self.root)
        self.of("kvm_entry", root=self.root, w0=0x1004)


LEAF = 0x2D5A6E67
TASK = TID + 40


def begins(guest: Changing, kind: str, **fields: Any) -> None:
    guest.vm(kind, **fields)
    guest.rows[-1]["tid"] = TASK


@pytest.mark.parametrize(
    ("cause", "kind", "fields"),
    [
        ("notifier", "kvm_unmap_hva_range", {"w0": 0x7F1000000000, "w1": 0x7F1000001000}),
        ("notifier_change", "kvm_set_spte_hva", {"w0": 0x7F1000000000}),
        ("aging", "kvm_age_hva", {"w0": 0x7F1000000000, "w1": 0x7F1000001000}),
        ("range", "zap_leafs", {"w0": 0x400, "w1": 0x401}),
        ("get_dirty_log", "ioctl", {"w0": 0x4010AE42}),
        ("clear_dirty_log", "ioctl", {"w0": 0xC018AEC0}),
        ("dirty_ring", "ioctl", {"w0": 0xAEC7}),
        ("ioctl", "ioctl", {"w0": 0x4020AED2}),
        ("memslot", "memslot", {"w0": 0x400, "w1": 0, "w2": 0, "n": 1}),
        ("dirty_log_begins", "memslot", {"w0": 0x400, "w1": 0x7F1000000000, "w2": 256, "w3": 1, "n": 1}),
        ("vm_end", "zap_all", {}),
        ("other", "", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_who_takes_a_page_is_at_something(
    tmp_path: Path, cause: str, kind: str, fields: dict[str, Any], known: bool
) -> None:
    """`known`: the row of the change names the root; not every kernel's and recorder's does."""
    guest = Changing()
    guest.slot(0, 512, 0x7F0000000000)
    guest.slot(0x400, 256, 0x7F1000000000, number=1)
    guest.load()
    guest.maps()
    if kind:
        begins(guest, kind, **fields)
    guest.changed(TASK, LEAF, 0, guest.root if known else 0)
    guest.maps()
    recording = Recording.open(guest.saved(tmp_path / "t.parquet"))
    again = refaults(recording).collect().filter(pl.col("cause") != "first")
    assert again.select("cause", "tid", "mapped", "fixes").rows() == [(cause, TASK, 1, 0)]
    (row,) = removals(recording).collect().filter(cause=cause, tid=TASK).to_dicts()
    assert (row["operations"], row["leaves"], row["low_gfn"], row["high_gfn"]) == (1, 1, 0x400, 0x400)
    assert row["ns"] == row["longest_ns"] == (guest.step if kind else 0)


def test_what_took_the_permission_is_told_from_what_took_the_page(tmp_path: Path) -> None:
    guest = Changing()
    guest.slot(0x400, 256, 0x7F1000000000, number=1)
    guest.load()
    guest.maps()
    begins(guest, "ioctl", w0=0x4010AE42)
    guest.changed(TASK, LEAF, LEAF & ~2, guest.root)
    guest.writes()
    guest.writes()  # nobody has taken it again
    found = refaults(Recording.open(guest.saved(tmp_path / "t.parquet"))).collect()
    fixes = found.filter(pl.col("fixes") > 0).select("cause", "tid", "mapped", "fixes").rows()
    assert sorted(fixes) == [("get_dirty_log", TASK, 0, 1), ("unwritable", -1, 0, 1)]


def test_recovery_of_huge_pages_is_known_by_its_thread(tmp_path: Path) -> None:
    guest = Changing()
    guest.load()
    guest.maps()
    guest.changed(NX_TID, LEAF, 0, guest.root)
    guest.maps()
    threads = {str(NX_TID): {"comm": "kvm-nx-lpage-re"}}
    found = refaults(Recording.open(guest.saved(tmp_path / "t.parquet", threads=threads))).collect()
    assert ("nx_recovery", NX_TID) in found.select("cause", "tid").rows()


def test_under_the_shadow_mmu_it_is_not_said() -> None:
    recording = Recording.open(CORPUS / "roots-6.1-shadow.parquet")
    with pytest.raises(Problem, match="under the shadow MMU"):
        refaults(recording)


def test_more_threads_than_are_told_apart_are_counted_together() -> None:
    path = CORPUS / "steady-6.1.parquet"
    capabilities = Capabilities(Trace.open(path))
    module = plain("analysis.passes.removals", *BENEATH)
    made = module.Removals(capabilities.kernel, causes_of(capabilities.kernel), roots_of(4, []), [], [], True)
    count = 1000
    columns = {name: np.zeros(count, dtype) for name, dtype in (
        ("time", np.int64), ("tid", np.int32), ("root", np.int32), ("role", np.uint32), ("level", np.int8),
        ("as_id", np.int8), ("gfn", np.int64), ("old", np.uint64), ("new", np.uint64), ("addr", np.uint64),
        ("code", np.uint64), ("ret", np.int32), ("refs", np.int32), ("slot", np.int32), ("flags", np.uint8),
    )}  # fmt: skip
    columns["tid"][:] = np.arange(count)
    kind = np.full(count, BY_NAME["kvm_unmap_hva_range"].code, np.uint8)
    made.feed(SimpleNamespace(kind=kind, vcpu=np.full(count, -1, np.int16), **columns))
    assert made.totals.table[:, FIELDS.index("operations")].sum() == count
    assert made.totals.table[3, FIELDS.index("operations")] == count - (253 - 3)


def test_a_vm_to_which_little_is_done_takes_little_memory() -> None:
    capabilities = Capabilities(Trace.open(CORPUS / "steady-6.1.parquet"))
    module = plain("analysis.passes.removals", *BENEATH)
    causes = causes_of(capabilities.kernel)
    made = module.Removals(capabilities.kernel, causes, roots_of(4, []), [], [], True)
    assert made.totals.count == 4
    assert made.totals.table.nbytes < 4096
