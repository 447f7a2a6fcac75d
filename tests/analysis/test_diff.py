# SPDX-License-Identifier: Apache-2.0
"""`diff`: what is compared with what, in which order, and which machines are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest

from analysis import diff, machines
from analysis.queries import replayed
from analysis.reading.matched import MatchedVms, VmsOfSide
from analysis.reading.sources import Recording
from analysis.report_model.trust import trust
from replay.result import SPENT
from tests.analysis.sources import CORPUS, OLD_STORM, STORM, TIMING, result_of
from tests.replay.recording import Guest, manifest
from tests.traces.making import stream, trace
from traces.errors import Problem

LOOPS = TIMING / "smi-storm-loops-20-6.1.parquet"


def asked(frame: pl.LazyFrame) -> pl.DataFrame:
    return frame.collect(engine="streaming")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[diff.Side, diff.Side]:
    scratch = tmp_path_factory.mktemp("sides")
    result = result_of(CORPUS / "two-vms-6.1.parquet", scratch).path
    remarks: list[str] = []
    made = (diff.opened(result, "preserve", scratch, remarks), diff.opened(result, "async", scratch, remarks))
    assert not remarks
    return made


def test_times_sum_up_and_the_largest_difference_is_first(sides: tuple[diff.Side, diff.Side]) -> None:
    base, new = sides
    found = asked(diff.times(base, new))
    assert found["vm"].unique().sort().to_list() == [1, 2]
    size = [max(abs(row["change_low"]), abs(row["change_high"])) for row in found.iter_rows(named=True)]
    assert size == sorted(size, reverse=True)
    rows = asked(replayed.vcpus(base.result))
    for row in found.iter_rows(named=True):
        mine = rows.filter(policy=base.policy, vm=row["vm"], vcpu=row["vcpu"])
        assert (row["base_low"], row["base_high"]) == (mine[f"{row['what']}_ns"].min(), mine[f"{row['what']}_ns"].max())
        assert row["change_low"] == row["new_low"] - row["base_high"]
    assert set(found["what"]) <= {"wall", *(name.removesuffix("_ns") for name in SPENT)}


def test_phases_sum_up_to_the_clock_and_to_all_guest_work(tmp_path: Path) -> None:
    side = diff.opened(LOOPS, "", tmp_path / "r.parquet", [])
    tenths = asked(diff._tenths(side, MatchedVms.of(side.vms, side.vms)))
    assert tenths["phase"].sort().to_list() == list(range(1, diff.PHASES + 1))
    clock = asked(replayed.progress(side.result))["clock"].max()
    assert tenths["low"].sum() == tenths["high"].sum() == clock


@pytest.mark.slow
def test_a_file_against_itself_has_no_difference(sides: tuple[diff.Side, diff.Side]) -> None:
    base, _ = sides
    for query in (diff.times, diff.phases, diff.counts, diff.causes, diff.events):
        assert asked(query(base, base)).is_empty(), query.__name__
    report = diff.compare(base, base, mark=False)
    assert report.verdict == ("no difference in roots, faults and re-faults",)


def test_two_kernels_as_recorded(tmp_path: Path) -> None:
    paths = (LOOPS, TIMING / "smi-storm-loops-20-6.1-async.parquet")
    base, new = (diff.opened(path, "", tmp_path / path.name, []) for path in paths)
    assert (base.policy, new.policy) == ("preserve", "async")
    counts = {row["what"]: row for row in asked(diff.counts(base, new)).iter_rows(named=True)}
    assert (counts["roots_created"]["base_low"], counts["roots_created"]["new_high"]) == (2, 39)
    assert "hits" not in counts or counts["hits"]["change_low"]
    causes = {row["cause"]: row["change_low"] for row in asked(diff.causes(base, new)).iter_rows(named=True)}
    assert causes == {"smi": 19, "rsm": 19, "vm_end": -1}
    events = {row["kind"]: row["change_low"] for row in asked(diff.events(base, new)).iter_rows(named=True)}
    theirs, mine = new.recording, base.recording
    assert theirs is not None
    assert mine is not None
    assert events["kvm_page_fault"] == theirs.metadata.kinds["kvm_page_fault"] - mine.metadata.kinds["kvm_page_fault"]
    report = diff.compare(base, new, mark=False)
    assert report.verdict[0].startswith("vCPU 0 of VM 1 (kvmtrace-vmm 95) takes 16")
    assert "error of the two" not in report.verdict[0]
    assert ("policy", "preserve against async") in report.trust


def named(path: Path, names: list[str]) -> VmsOfSide:
    """VMs 1, 2, ... of a recording, by these names of their owners'."""
    recording = written(path)
    vms = tuple({"id": at, "pid": 40 + at, "comm": "qemu", "name": name} for at, name in enumerate(names, 1))
    recording.trace.metadata = dataclasses.replace(recording.metadata, vms=vms)
    return VmsOfSide(range(1, len(names) + 1), (), recording)


def test_vms_are_matched_by_name_and_else_in_order(tmp_path: Path) -> None:
    base = named(tmp_path / "base.parquet", ["web", "db", "", "twin", "twin"])
    new = named(tmp_path / "new.parquet", ["new", "twin", "db", "web"])
    matched = MatchedVms.of(base, new)
    assert matched.pairs == [(1, 4), (2, 3), (3, 1), (4, 2)]
    assert matched.numbers(base) == {1: 1, 2: 2, 3: 3, 4: 4}
    assert matched.numbers(new) == {4: 1, 3: 2, 1: 3, 2: 4}
    assert matched.vcpu(1, 0) == "vCPU 0 of VM 1 (web, qemu 41)"
    lines = list(matched.lines())
    assert lines[0] == "VM 1 (web, qemu 41) with VM 4 (web, qemu 44)"
    assert lines[-1] == "only in the first, so in the counts alone: VM 5 (twin, qemu 45)"
    assert MatchedVms.of(dataclasses.replace(base, chosen=(2, 1)), dataclasses.replace(new, chosen=(1, 3))).pairs == [
        (2, 1), (1, 3),
    ]  # fmt: skip


def test_a_small_difference_is_called_within_the_error(tmp_path: Path) -> None:
    base, new = (
        diff.opened(CORPUS / f"steady-{kernel}.parquet", "", tmp_path / f"{kernel}.parquet", [])
        for kernel in ("6.1", "6.1-async")
    )
    assert "within the error of the two" in diff.compare(base, new, mark=False).verdict[0]


def written(path: Path, **more: object) -> Recording:
    guest = Guest()
    guest.load()
    guest.fault(1)
    trace(path, stream(guest.rows), manifest(**more))
    return Recording.open(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"host": {"kernel": "6.1.55", "vendor": "GenuineIntel"}}, "other CPUs: AuthenticAMD against GenuineIntel"),
        pytest.param(
            {"host": {"kernel": "6.1.55", "vendor": "AuthenticAMD", "model": "EPYC 9"}},
            "unknown against EPYC 9",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"host": {"kernel": "6.1.55", "vendor": "AuthenticAMD", "cpus": 8}},
            "other number of CPUs: unknown against 8",
            marks=pytest.mark.slow,
        ),
        ({"lab": {"kernel": "6.1"}}, "a host against the lab's emulation"),
        pytest.param({"origin": "synthetic"}, "a host against a synthetic trace", marks=pytest.mark.slow),
    ],
)
def test_unlike_machines_are_refused_or_marked(more: dict[str, object], said: str, tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.parquet"), written(tmp_path / "two.parquet", **more)
    (line,) = machines.unlike(one, two)
    assert said in line
    base, new = (diff.opened(each.path, "", tmp_path / f"{each.path.stem}-r.parquet", []) for each in (one, two))
    with pytest.raises(Problem, match="--unlike compares them all the same") as refused:
        diff.compare(base, new, mark=False)
    assert refused.value.code == 2
    assert any(name == "unlike" and "not comparable" in text for name, text in diff.compare(base, new, mark=True).trust)


def test_another_kernel_or_parameter_is_the_thing_compared(tmp_path: Path) -> None:
    one = written(tmp_path / "one.parquet", modules={"kvm": {"tdp_mmu": "Y", "mmio_caching": "Y"}})
    two = written(
        tmp_path / "two.parquet", kernel="6.1.99", policy="preserve", modules={"kvm": {"tdp_mmu": "Y", "x": "1"}}
    )
    assert not list(machines.unlike(one, two))
    told = dict(machines.changed(one, two))
    assert "6.1.55" in told["kernel"]
    assert told["policy"] == "async against preserve"
    assert told["modules"] == "kvm.mmio_caching Y against not there, kvm.x not there against 1"
    assert not list(machines.changed(one, one))


def test_a_result_without_its_recording_is_of_an_unknown_machine(tmp_path: Path) -> None:
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(OLD_STORM.read_bytes())
    result = result_of(copy, tmp_path).path
    copy.unlink()
    remarks: list[str] = []
    base = diff.opened(result, "", tmp_path, remarks)
    assert "without the recording's rows" in remarks[0]
    new = diff.opened(STORM, "", tmp_path / "new.parquet", remarks)
    with pytest.raises(Problem, match="machine of the base is not known"):
        diff.compare(base, new, mark=False)
    report = diff.compare(base, new, mark=True)
    assert "kinds" not in [table.query for table in report.tables]


def test_which_policy_is_compared_must_be_clear(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path, "async", "sync").path
    with pytest.raises(Problem, match="no recorded policy: say which with --policy; there are async, sync"):
        diff.opened(result, "", tmp_path, [])
    with pytest.raises(Problem, match="no policy shadow; there are"):
        diff.opened(result, "shadow", tmp_path, [])


def test_a_host_is_no_lab(tmp_path: Path) -> None:
    """The recorder writes an empty `lab` on hosts."""
    host, lab = written(tmp_path / "host.parquet", lab={}), written(tmp_path / "lab.parquet", lab={"kernel": "6.1"})
    assert not list(machines.unlike(host, written(tmp_path / "bare.parquet")))
    told = [dict(trust(each, None, "not done", ()))["host"] for each in (host, lab)]
    assert ["emulation" in text for text in told] == [False, True]
