# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import streams
from tests.golden.make import HERE
from tests.traces.making import event, stream, trace
from traces.command_line.screen import WIDTH
from traces.errors import Problem
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.summary import info, render

GOLDEN = HERE / "trace-1.0.parquet"


def test_info_says_what_programs_need() -> None:
    facts = info(GOLDEN)
    expected = json.loads((HERE / "trace-1.0.json").read_text())
    assert facts["schema"] == 1
    assert facts["events"] == facts["emitted"] == len(expected["rows"])
    assert facts["lost"] == 0
    assert facts["kinds"] == expected["metadata"]["kinds"]
    assert (facts["kernel"], facts["policy"]) == ("6.1.0", "async")
    assert [(vm["id"], vm["pid"], vm["vcpus"]) for vm in facts["vms"]] == [(1, 100, 1), (2, 0, 0), (3, 200, 0)]
    assert facts["size"] == GOLDEN.stat().st_size
    assert facts["duration"] == 1_000 * (facts["events"] - 1)
    assert facts["began"] == "2023-11-14T22:13:20Z"
    assert json.dumps(facts)


def test_the_text_is_one_plain_screen() -> None:
    text = render(GOLDEN)
    assert len(text.splitlines()) < 50
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert all(line.isprintable() for line in text.splitlines())
    stored = f"{info(GOLDEN)['events']} stored, 0 lost"
    for word in ("6.1.0", "async", stored, "kvm_tdp_mmu_spte_changed", "vmm (100)"):
        assert word in text


def test_loss_and_its_reasons_are_on_the_screen(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(stream([event("kvm_entry")] * 3))
    writer.close({"loss": {"kvm_entry": {"emitted": {"0": 7}, "lost": {"0": 3}}, "kvm_pio": {"lost": {"1": 2}}}})
    compact(writer.directory, tmp_path / "a.parquet")
    facts = info(tmp_path / "a.parquet")
    assert (facts["lost"], facts["lost_kinds"], facts["complete"]) == (5, {"kvm_entry": 3, "kvm_pio": 2}, False)
    text = render(tmp_path / "a.parquet")
    assert "3 stored, 5 lost" in text
    assert "kvm_entry: 7 emitted, but 3 stored and 3 lost" in text


def test_a_file_from_elsewhere_cannot_steer_the_terminal(tmp_path: Path) -> None:
    vms = [{"kvm": 5, "tgid": 6, "comm": "\x1b[2Jqemu\n[red]"}]
    manifest = {
        "snapshot": {"vms": vms},
        "host": {"kernel": "\x1b]0;x\x07"},
        "preset": "[bold]",
        "probes": [{"kind": "\r"}],
    }
    trace(tmp_path / "a.parquet", stream([event("kvm_entry", kvm=5)]), manifest)
    text = render(tmp_path / "a.parquet")
    assert all(line.isprintable() for line in text.splitlines())
    assert "?[2Jqemu?[red] (6)" in text
    assert "preset [bold]" in text


def test_kvms_own_counters_are_shown_beside_the_traces(tmp_path: Path) -> None:
    """Over all VMs, less what was there before."""
    end = {"7-9": {"pf_taken": 520, "exits": 9, "vcpu0/pf_x": 1}, "8-1": {"pf_taken": 6, "pf_odd": "x"}}
    manifest = {"stats": {"start": {"7-9": {"pf_taken": 20}}, "end": end}}
    trace(tmp_path / "a.parquet", stream([event("kvm_page_fault", kvm=5)]), manifest)
    assert info(tmp_path / "a.parquet")["kvm_counted"] == {"pf_taken": 506}
    assert "pf_taken 506 (the trace has 1 kvm_page_fault)" in render(tmp_path / "a.parquet")


def test_skipped_probes_are_shown(tmp_path: Path) -> None:
    manifest = {"missed": {"on_table_free": 3, "odd": "x"}}
    trace(tmp_path / "a.parquet", stream([event("kvm_entry", kvm=5)]), manifest)
    assert info(tmp_path / "a.parquet")["missed"] == {"on_table_free": 3}
    assert "skipped on_table_free 3 times" in render(tmp_path / "a.parquet")


def test_many_vms_do_not_fill_the_screen(tmp_path: Path) -> None:
    parts = [event("vm_create", kvm=16 * number, tgid=number) for number in range(1, 40)]
    trace(tmp_path / "a.parquet", stream(parts))
    assert len(info(tmp_path / "a.parquet")["vms"]) == 39
    assert "31 more" in render(tmp_path / "a.parquet")
    assert len(render(tmp_path / "a.parquet").splitlines()) < 40


def test_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no")
    with pytest.raises(Problem, match="not a kvmtrace trace"):
        info(tmp_path / "a")


@pytest.mark.slow
def test_storms_keep_below_six_bytes_an_event(tmp_path: Path) -> None:
    for name, records in (
        ("smi", streams.smi_storm(12_000)),
        ("vms", streams.interleave([streams.smi_storm(6_000, vm=vm) for vm in (1, 2, 3)])),
        ("mmio", streams.emulator_storm(12_000)),
    ):
        trace(tmp_path / f"{name}.parquet", records)
        assert info(tmp_path / f"{name}.parquet")["bytes_per_event"] <= 6.0
