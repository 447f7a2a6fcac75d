# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace replay` as users meet it: numbers, intervals, the result file, and one line for what cannot be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from replay import bounds, plan
from replay.bounds import Count
from replay.result import SCHEMA, read_metadata
from tests.replay.recording import Guest
from tests.verbs import answered
from traces.errors import Problem

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "traces" / "corpus"
STORM, OLD_STORM = (str(CORPUS / f"smi-storm-{kernel}.parquet") for kernel in ("6.1", "6.1-async"))


def kvmtrace(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = answered("replay", *arguments)
    assert done.returncode == code, done.stderr
    return done


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kvmtrace(*arguments, "--json").stdout)
    assert found["schema"] == 1
    return found


def of(found: dict[str, Any], policy: str) -> dict[str, Any]:
    return next(one for one in found["vms"][0]["policies"] if one["policy"] == policy)


def test_an_old_recording_under_the_new_policy_is_one_number() -> None:
    found = document(OLD_STORM)
    assert [one["policy"] for one in found["vms"][0]["policies"]] == ["async", "preserve"]
    old, new = of(found, "async"), of(found, "preserve")
    assert (old["creations"], old["faults"], old["tables_built"]) == (9, 2569, 32)
    assert (new["creations"], new["faults"], new["tables_built"], new["hits"]) == (2, 514, 7, 2055)
    assert old["frees_by_cause"] == {"smi": 4, "rsm": 4, "vm_end": 1}
    assert new["roots_by_role"] == {"0x1003784": 1, "0x3784": 1}
    assert new["vcpus"][0]["reuses"] == 7
    assert found["complete"]
    assert not found["broken"]


@pytest.mark.slow
def test_a_new_recording_under_the_old_policy_is_an_interval() -> None:
    text = kvmtrace(STORM).stdout
    assert "514 .. 2,569" in text
    assert "is not recorded (least .. most)" in " ".join(text.split())
    assert "\x1b" not in text
    assert of(document(STORM), "async")["faults"] == [514, 2569]


@pytest.mark.slow
@pytest.mark.parametrize(("assumed", "faults"), [("none", 514), ("all", 2569), ("recent:100", 917), ("recent:0", 514)])
def test_an_assumption_makes_one_number_with_its_name(assumed: str, faults: int) -> None:
    found = document(STORM, "--policy", "async", "--refault", assumed)
    assert of(found, "async")["faults"] == faults
    assert found["refault"] == assumed
    assert f"assumed: --refault {assumed}" in kvmtrace(STORM, "--policy", "async", "--refault", assumed).stdout


def test_a_kernel_brings_its_policy_and_its_words() -> None:
    found = document(STORM, "--kernel", "5.10")
    assert [(one["name"], one["kernel"]) for one in found["policies"]] == [("sync", "5.10"), ("preserve", "5.10")]
    habits = [one["parameters"]["zap_tables"] for one in found["policies"]]
    assert habits == [True, True]
    assert [one["parameters"]["zap_tables"] for one in document(STORM, "--policy", "sync")["policies"]] == [False]
    assert set(of(found, "sync")["roots_by_role"]) == {"0x3794", "0x1003794"}


def test_the_result_file_holds_what_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "result.parquet"
    printed = document(STORM, "--policy", "async", "--policy", "preserve", "-o", str(path))
    assert pq.read_schema(path).remove_metadata().equals(SCHEMA)
    rows = pl.read_parquet(path)
    ends = rows.filter(pl.col("row") == "vm", pl.col("policy") == "async").sort("faults")
    assert ends["bound"].to_list() == ["low", "high"]
    assert ends["faults"].to_list() == of(printed, "async")["faults"]
    assert ends["zapped"].to_list() == of(printed, "async")["zapped"]
    for bound, policy, roots in (("high", "async", 9), ("exact", "preserve", 2)):
        log = rows.filter(pl.col("row") == "root", pl.col("policy") == policy, pl.col("bound") == bound)
        assert log.filter(pl.col("event") == "created").height == roots
        assert log.filter(pl.col("event") == "freed").height == roots
        assert log["seq"].is_sorted()
        assert log["time"].is_sorted()
        assert log["roots_alive"][-1] == 0
        vcpus = rows.filter(pl.col("row") == "vcpu", pl.col("policy") == policy, pl.col("bound") == bound)
        assert vcpus["creations"].sum() == roots
    said = read_metadata(path)
    assert said["format"] == {"major": 1, "minor": 4}
    assert [one["name"] for one in said["policies"]] == ["async", "preserve"]
    assert said["complete"]
    assert not list(tmp_path.glob("*.part"))


def test_every_column_of_the_result_is_documented() -> None:
    text = (ROOT / "replay" / "RESULT.md").read_text()
    assert [name for name in SCHEMA.names if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "lru"], "neither a policy"),
        (["--kernel", "5.4"], "no TDP MMU before 5.10"),
        (["--refault", "some"], "none, all, accessed or recent:PAGES"),
        (["--refault", "accessed"], "aged pages"),
        (["-o", "/nowhere/result.parquet"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], words: str) -> None:
    done = kvmtrace(STORM, *arguments, code=2)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.slow
def test_foreign_and_empty_files_are_one_line(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    guest = Guest()
    guest.rows.clear()
    guest.rows.append(Guest().rows[0][:0])
    for path in (foreign, tmp_path / "none.parquet"):
        assert kvmtrace(str(path), code=2).stderr.count("\n") == 1
    with pytest.raises(Problem):
        read_metadata(foreign)


@pytest.mark.slow
def test_an_incomplete_recording_says_so(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(3)
    guest.write(tmp_path / "t.parquet")
    done = kvmtrace(str(tmp_path / "t.parquet"))
    assert "incomplete: VM 1 was still running at the end" in done.stdout
    assert not document(str(tmp_path / "t.parquet"))["complete"]


def test_accessed_takes_the_share_that_the_trace_shows(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    for gfn in range(4):
        guest.fault(gfn)
    change = {"level": 1, "w2": 0x5A0}
    guest.vm("kvm_tdp_mmu_spte_changed", w0=9, w1=0xE67, **change)  # before: says nothing
    guest.vm("kvm_age_hva", w0=0, w1=0x4000)
    for gfn, old in enumerate((0xE67, 0xE47, 0xE47, 0xE47)):
        guest.vm("kvm_tdp_mmu_spte_changed", w0=gfn, w1=old, **change)
    evidence = guest.write(tmp_path / "t.parquet")
    assert bounds.accessed_share(evidence.trace, evidence.kernel) == 0.25


def test_counts_read_as_they_are() -> None:
    assert Count(514, 2569).text == "514 .. 2,569"
    assert Count(3, 3).text == "3"
    assert Count(1, 9, 4).value == 4
    assert Count(1, 9).value == [1, 9]
    assert 9 in Count(1, 9)
    assert 10 not in Count(1, 9)
    assert plan.refault("recent:5").text == "recent:5"
