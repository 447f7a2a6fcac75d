# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a recorder: it is killed, the disk is full, thousands ask at once, the clock is set.

The short forms run always; the long ones are `make nightly`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import NOT_ROOT
from tests.flight.rows import Flight, entries, row
from tests.flight.test_flight_live import flying
from tests.flight.test_keeper import MS, ask, times
from tests.tracer.test_record_live import run
from tracer.flight.flight import _remember
from tracer.flight.keeper import SECOND, Request
from tracer.flight.quotas import AUTOMATIC, MANUAL
from traces.errors import Problem
from traces.reader import Trace
from traces.recording.segments import SegmentReader

pytestmark = pytest.mark.slow

often = pytest.mark.parametrize("often", [3, pytest.param(50, marks=pytest.mark.nightly)])


def _killed_while_it_dumps(directory: Path, moment: random.Random) -> dict[str, int]:
    """What it had answered by then."""
    words = [sys.executable, "-m", "tests.flight.dumping", str(directory)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(moment.uniform(0, 3))
        process.kill()
        lines = [first, *process.stdout]
    return {name: int(rows) for name, rows in (line.split() for line in lines if line.count(" ") == 1)}


@often
@pytest.mark.usefixtures("own_process")
def test_killed_at_random_moments_nothing_is_lost_that_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], often: int
) -> None:
    moment = random.Random(often)
    for number in range(often):
        directory = tmp_path / str(number)
        directory.mkdir()
        answered = _killed_while_it_dumps(directory, moment)
        for name, rows in answered.items():
            trace = Trace.open(directory / name)
            assert trace.metadata.complete, trace.metadata.discrepancies
            assert len(times(directory / name)) == trace.metadata.events == rows
        left = {path: SegmentReader(path) for path in directory.glob("*.kvmt") if (path / "manifest.json").exists()}
        readable = {path: sum(len(columns["time"]) for _, columns in each.batches()) for path, each in left.items()}
        Flight(directory).close()  # the next start
        said = capsys.readouterr().err.splitlines()
        for path, rows in readable.items():
            assert len([line for line in said if line.startswith(f"kvmtrace: {path.name}: left by a recorder")]) == 1
            if rows:
                assert len(times(path.with_suffix(".parquet"))) == rows
                assert not path.exists()
        for path in directory.glob("*.parquet"):
            Trace.open(path)
        assert not [path for path in directory.iterdir() if path.suffix not in (".parquet", ".kvmt", ".tmp")]


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of this many bytes."""
    if os.geteuid():
        pytest.skip(NOT_ROOT)
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)  # a trace is still mapped


@pytest.mark.parametrize("megabytes", [1, 2, 3])
@pytest.mark.usefixtures("own_process")
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], megabytes: int
) -> None:
    """Full as segments are written, or as a trace is made of them; with room again the next one is whole."""
    with small_disk(tmp_path / "disk", f"{megabytes}M") as directory:
        flight = Flight(directory)
        flight.give(entries(SECOND, 1000, MS), 2 * SECOND)
        first = ask(flight, 2 * SECOND).answer.result(60)
        flight.give(entries(3 * SECOND, 400_000, 1000), 4 * SECOND)
        second = ask(flight, 4 * SECOND, "other")
        with pytest.raises(Problem, match=r"No space left on device"):
            second.answer.result(120)
        assert len(times(first)) == 1000
        made, failed = capsys.readouterr().err.splitlines()
        assert made == f"kvmtrace: {first}: dumped: manual"
        assert "No space left on device" in failed
        subprocess.run(["mount", "-o", "remount,size=64M", directory], check=True)
        third = ask(flight, 4 * SECOND, "signal").answer.result(120)
        assert len(times(third)) == 401_000
        flight.close()
        assert capsys.readouterr().err == f"kvmtrace: {third}: dumped: signal\n"


def test_ten_thousand_triggers_in_a_second_make_as_many_dumps_as_they_may(tmp_path: Path) -> None:
    """How many of them share a dump is a matter of how often the thread runs; the quota and the sum are not."""
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 1000, MS), 2 * SECOND)
    kinds = [("manual", True), ("signal", True), ("guest-share", False), ("zap", False)]
    requests = []
    for number in range(10_000):
        trigger, manual = kinds[number % len(kinds)]
        request = Request(trigger, str(number), manual, number, at=2 * SECOND + number * 100_000)
        flight.thread.ask(request)
        requests.append(request)
        if not number % 10:
            flight.give(entries(2 * SECOND + number * 100_000 + 1, 1), 2 * SECOND + number * 100_000 + 2)
    for number in range(2 * (AUTOMATIC.hour + 1)):  # one after the other, none shares
        at = 4 * SECOND + number * MS
        requests.append(Request(("guest-share", "zap")[number % 2], "late", False, 10_000, at))
        flight.thread.ask(requests[-1])
        flight.give(entries(at, 1), at + MS)
        requests[-1].answer.exception(60)
    dumps = flight.close()
    made = {trigger: len([path for path in dumps if f"-{trigger}" in path.name]) for trigger, _ in kinds}
    assert (made["guest-share"], made["zap"]) == (AUTOMATIC.hour, AUTOMATIC.hour)
    assert 0 < made["manual"] <= MANUAL.hour, "those who ask while one is being made share it"
    assert 0 < made["signal"] <= MANUAL.hour
    answered = [request for request in requests if request.answer.exception(60) is None]
    refused = sum(account.refused.count for account in flight.thread.accounts.values())
    told = sum(
        facts["count"] for path in dumps for facts in Trace.open(path).metadata.raw["flight"]["refused"].values()
    )
    assert len(answered) + refused + told == len(requests), "each is answered, or counted as refused"


def test_a_clock_that_is_set_back_and_forth_harms_no_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and quotas go by the time since boot; names and what earlier runs made, by the wall clock."""
    flight = Flight(tmp_path)
    wall = [1_700_000_000.0]
    monkeypatch.setattr("tracer.flight.keeper.time.gmtime", lambda: time.localtime(wall[0]))
    at, answers = SECOND, []
    for change in (0, -3600, 3600, -10 * 86400, 10 * 86400, 0):
        wall[0] += change
        flight.give(entries(at, 10), at + 1000_000)
        answers.append(ask(flight, at + 1000_000).answer.result(60))
        at += SECOND
    assert len(set(answers)) == len(answers), "no name twice"
    for path in answers:
        assert Trace.open(path).metadata.complete
    flight.close()
    for shift in (-7 * 86400, 0, 7 * 86400):  # since they were made, the clock was set
        for path in answers:
            os.utime(path, (time.time() + shift, time.time() + shift))
        again = Flight(tmp_path / "none") if (tmp_path / "none").mkdir(exist_ok=True) is None else None
        assert again is not None
        _remember(again.thread, tmp_path)
        made = again.thread.accounts["manual"].made
        assert len(made) == len(answers)
        granted, _ = again.thread.accounts["manual"].ask(time.clock_gettime(time.CLOCK_BOOTTIME), 0)
        assert granted is not None, "a clock that was set uses up no quota of another day"
        again.close()


@pytest.mark.live
@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_vms_that_come_and_go_during_the_snapshot_are_one_each(tmp_path: Path, vmm: str, seconds: int) -> None:
    """A window of a moment, so that each dump begins with a state taken while VMs came and went."""
    directory = tmp_path / "d"
    loop = (
        f"end=$(($(date +%s) + {seconds})); while [ $(date +%s) -lt $end ]; do {vmm} steady >/dev/null || exit 1; done"
    )
    with flying(directory) as flight:
        churn = [subprocess.Popen(["sh", "-c", loop]) for _ in range(2)]
        dumped = []
        while any(each.poll() is None for each in churn):
            done = run("dump", directory, "--json")
            if done.returncode:
                assert "has made all that it may" in done.stderr
                time.sleep(1)
            else:
                dumped.append(Path(json.loads(done.stdout)["path"]))
        assert [each.wait() for each in churn] == [0, 0]
        assert flight.poll() is None
    assert dumped
    for path in dumped:
        meta = Trace.open(path).metadata
        assert meta.complete, meta.discrepancies
        alive = [vm for vm in meta.vms if vm["origin"] == "snapshot"]
        assert len({vm["pid"] for vm in alive}) == len(alive)
        checked = run("validate", path)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_vm_that_ends_while_it_is_looked_at_is_no_vm_of_the_dump(tmp_path: Path) -> None:
    flight = Flight(tmp_path, seconds=1e-9)
    flight.give(entries(SECOND, 10), SECOND + MS)
    flight.thread._wanted = True
    flight.give(row("vm_destroy", 2 * SECOND, kvm=0xFFFF888100000000), 2 * SECOND + MS)
    flight.thread._tries = 99
    flight.checkpoint(SECOND + MS, 3 * SECOND)
    flight.give(entries(4 * SECOND, 10), 5 * SECOND)
    ask(flight, 5 * SECOND)
    (dump,) = flight.close()
    meta = Trace.open(dump).metadata
    assert meta.complete, meta.discrepancies
    assert not [vm for vm in meta.vms if vm["origin"] == "snapshot"]
    assert meta.raw["flight"]["state_settled"] is False
