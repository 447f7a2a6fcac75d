# SPDX-License-Identifier: Apache-2.0
"""Flights over this machine's own KVM: what a dump holds is what an independent program counted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.own_vm import noted
from tests.tracer.test_record_live import command, counted, independent_counter, loaded_programs, own_programs, run
from tests.waiting import until
from traces.reader import Trace

INTERNAL_ERROR = 17  # KVM_EXIT_INTERNAL_ERROR

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("live")]


@contextlib.contextmanager
def flying(directory: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A flight that records when the `with` begins; it is killed at the end if it is still there."""
    words = command("record", "--flight", "10m", "--after", "100ms", *more, "-o", directory)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert until(lambda: process.poll() is not None or len(own_programs(process.pid)) > 10), "it must attach"
        assert process.poll() is None, process.communicate()[1]
        assert run("dump", directory).returncode == 0, "it records as soon as it answers"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("scenario", [("storm", "--loops", "300"), ("churn",)])
def test_a_dump_has_what_an_independent_program_counted(tmp_path: Path, vmm: str, scenario: tuple[str, ...]) -> None:
    with independent_counter() as counter, flying(tmp_path / "d", "--events", "all") as flight:
        subprocess.run(noted(tmp_path / "pid", vmm, *scenario), check=True, stdout=subprocess.DEVNULL)
        pid = int((tmp_path / "pid").read_text())
        done = run("dump", tmp_path / "d", "--reason", "a test", "--json")
        assert done.returncode == 0, done.stderr
        expected = counted(counter, pid)
        flight.send_signal(signal.SIGINT)
        said = flight.communicate(timeout=600)[1]
    assert flight.returncode == 0, said
    assert ": 2 dumps; " in said
    path = Path(json.loads(done.stdout)["path"])
    meta = Trace.open(path).metadata
    assert meta.complete, meta.discrepancies
    assert (meta.raw["flight"]["trigger"], meta.raw["flight"]["text"]) == ("manual", "a test")
    owner = [thread["tid"] for thread in meta.raw["threads"] if thread["tgid"] == pid]
    rows = pl.scan_parquet(path).filter(pl.col("tid").is_in(owner)).group_by("kind").len().collect()
    stored = {str(kind): n for kind, n in rows.iter_rows()}
    assert sum(expected.values()) > 100, "the counter saw too little: the test would prove nothing"
    assert {kind: stored.get(kind, 0) for kind in expected} == expected
    checked = run("validate", path)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("100 %")


def test_sigusr2_dumps_and_a_killed_flight_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    with flying(directory) as flight:
        second = run("record", "--flight", "1s", "-o", directory)
        assert (second.returncode, len(second.stderr.splitlines())) == (2, 1)
        assert "another flight recorder keeps its dumps there" in second.stderr
        os.kill(flight.pid, signal.SIGUSR2)
        assert until(lambda: list(directory.glob("*-signal.parquet")))
        programs = own_programs(flight.pid)
        flight.kill()
        flight.wait()
    assert programs
    assert until(lambda: not programs & loaded_programs()), "the kernel takes a dead process's probes away"
    asked = run("dump", directory)
    assert (asked.returncode, len(asked.stderr.splitlines())) == (2, 1)
    assert "no flight recorder runs here" in asked.stderr
    with flying(directory):
        assert len(list(directory.glob("*-manual.parquet"))) == 2


@contextlib.contextmanager
def watching(directory: Path, *triggers: str) -> Iterator[subprocess.Popen[str]]:
    """A flight with triggers; what it says on standard error is there when it is over."""
    with flying(directory, *(word for each in triggers for word in ("--trigger", each))) as flight:
        yield flight
        flight.send_signal(signal.SIGINT)
        flight.wait(timeout=600)


def test_a_vcpu_that_polls_mmio_triggers_while_it_goes_on_and_its_beginning_is_there(tmp_path: Path, vmm: str) -> None:
    """Here a software KVM shows no entries: that a VM does nothing but come back to its VMM is what can be seen."""
    directory = tmp_path / "d"
    with watching(directory, "user-exits > 20/s for 500ms"):
        guest = subprocess.Popen([vmm, "storm", "--loops", "1000000"], stdout=subprocess.DEVNULL)
        try:
            assert until(lambda: list(directory.glob("*-user-exits.parquet"))), "it must trigger"
        finally:
            guest.kill()
            guest.wait()
    dump = min(directory.glob("*-user-exits.parquet"))
    trace = Trace.open(dump)
    facts = trace.metadata.raw["flight"]
    exits = pl.scan_parquet(dump).filter(pl.col("kind") == "kvm_userspace_exit", pl.col("tid") > 0).collect()
    began = exits["time"].min()
    assert facts["text"].startswith(f"process {guest.pid}: ")
    assert isinstance(began, int)
    assert facts["begins"] < began < facts["time"]
    rate = exits.filter(pl.col("time") <= facts["time"], pl.col("time") > facts["time"] - 500_000_000)
    assert len(rate) > 10, "it is so, by the rows themselves"
    late = exits.sort("time")["time"][11] + 500_000_000
    assert facts["time"] <= late + 500_000_000, "within twice its time after enough of it was there"
    (vm,) = [vm for vm in trace.metadata.vms if vm["pid"] == guest.pid]
    assert vm["origin"] == "created"
    assert "KVM_EXIT_MMIO" in run("report", dump).stdout, "that is what it does all the time"


def test_a_vm_that_kvm_run_gives_up_on_triggers_and_the_report_names_the_error(tmp_path: Path, vmm: str) -> None:
    """Here a software KVM answers the access to a lost page itself, so that the error is an instruction's."""
    directory, second = tmp_path / "d", 1_000_000_000
    with watching(directory, "errors > 0 for 1s"):
        subprocess.run(noted(tmp_path / "pid", vmm, "not-emulated"), check=True, stdout=subprocess.DEVNULL)
        assert until(lambda: list(directory.glob("*-errors.parquet"))), "it must trigger"
    dump = min(directory.glob("*-errors.parquet"))
    facts = Trace.open(dump).metadata.raw["flight"]
    assert facts["text"].startswith(f"process {(tmp_path / 'pid').read_text().strip()}: ")
    exits = pl.scan_parquet(dump).filter(pl.col("kind") == "kvm_userspace_exit", pl.col("code") == INTERNAL_ERROR)
    failed = exits.sort("time").collect()["time"].to_list()
    assert len(failed) > 100, "it fails on and on"
    assert facts["begins"] < failed[0] <= facts["time"] <= failed[0] + 2 * second, "within twice its time"
    assert "KVM_EXIT_INTERNAL_ERROR" in run("report", dump).stdout


def test_healthy_vms_trigger_nothing(tmp_path: Path, vmm: str) -> None:
    directory = tmp_path / "d"
    triggers = ("guest-share < 10% for 200ms", "roots > 100000/s for 1s", "errors > 0 for 1s", "same-gfn > 1000",
                "zap > 5s", "user-exits > 1000000/s for 1s")  # fmt: skip
    with watching(directory, *triggers):
        for scenario in ("steady", "churn", "slot-delete", "mmio", "notifier", "dirty-log") * 3:
            subprocess.run([vmm, scenario], check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in directory.glob("*.parquet") if not path.name.endswith("manual.parquet")] == []
