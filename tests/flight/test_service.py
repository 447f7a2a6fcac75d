# SPDX-License-Identifier: Apache-2.0
"""The systemd unit: its command line is understood, and its capabilities are enough."""

from __future__ import annotations

import configparser
import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import NO_SYSTEMD
from tests.test_help import ROOT
from tests.tracer.test_record_live import command, run
from tests.waiting import until
from tracer.flight.control import NAME
from tracer.flight.notify import Watchdog, notify
from traces.reader import Trace

UNIT = Path(__file__).parents[2] / "scripts" / "kvmtrace-flight.service"


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text().replace("\\\n", " "))
    return parser["Service"]


def test_its_command_line_is_understood() -> None:
    words = shlex.split(service()["ExecStart"].replace("%%", "%"))
    assert words[:3] == ["/usr/bin/env", "kvmtrace", "record"]
    context = ROOT.commands["record"].make_context("it", words[3:])
    assert Path(context.params["out"]) == Path("/var/lib") / service()["StateDirectory"]
    from tracer.flight.trigger_texts import FlightTriggers
    from tracer.probing.probes import preset_kinds

    FlightTriggers(context.params["trigger"], preset_kinds(context.params["events"]))


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_its_capabilities_are_enough(tmp_path: Path, vmm: str) -> None:
    """Root with these alone records what root with all of them does."""
    capabilities = ",".join(
        f"+{name.removeprefix('CAP_').lower()}" for name in service()["CapabilityBoundingSet"].split()
    )
    limited = ["setpriv", "--no-new-privs", "--bounding-set", f"-all,{capabilities}"]
    layouts, names = [], []
    guest = subprocess.Popen([vmm, "storm", "--loops", "10000000"], stdout=subprocess.DEVNULL)
    try:
        for place, before in (("all", []), ("few", limited)):
            words = [*before, *command("record", "--flight", "10s", "--after", "100ms", "-o", tmp_path / place)]
            flight = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            assert until(
                lambda flight=flight, place=place: flight.poll() is not None or (tmp_path / place / NAME).exists()
            )
            done = run("dump", tmp_path / place, "--json")
            assert done.returncode == 0, done.stderr
            flight.send_signal(signal.SIGTERM)
            assert flight.wait(timeout=600) == 0
            meta = Trace.open(json.loads(done.stdout)["path"]).metadata
            (mine,) = [vm for vm in meta.vms if vm["pid"] == guest.pid]
            assert {slot["gfn"] for slot in mine["slots"]} == {0, 0x400}
            layouts.append(meta.raw["layout"])
            names.append([probe["kind"] for probe in meta.probes if probe.get("how")])
    finally:
        guest.kill()
        guest.wait()
    assert layouts[0] == layouts[1]
    assert names[0] == names[1]


@contextlib.contextmanager
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """systemd's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield end


def heard(end: socket.socket) -> list[str]:
    """What came since the last time."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(end.recv(4096).decode())
    return found


def test_the_watchdog_beats_three_times_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("tracer.flight.notify.time.monotonic", lambda: now[0])
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    with told(tmp_path, monkeypatch) as end:
        watchdog = Watchdog()
        for _ in range(3000):
            watchdog.beat()
            now[0] += 0.01
        assert heard(end) == ["WATCHDOG=1"] * 3
        monkeypatch.setenv("WATCHDOG_PID", "1")
        another = Watchdog()
        now[0] += 60
        another.beat()
        assert heard(end) == [], "it is another process that is watched"
    watchdog.beat()  # nobody listens any more


def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    notify("READY=1")
    Watchdog().beat()
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    notify("READY=1")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason=NO_SYSTEMD)
def test_systemd_understands_it() -> None:
    done = subprocess.run(["systemd-analyze", "--man=no", "verify", UNIT], capture_output=True, text=True, check=False)
    assert UNIT.name not in done.stderr, done.stderr
    assert service()["Type"] == "notify"
    assert int(service()["WatchdogSec"]) >= 30


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_it_tells_when_it_records_that_it_goes_on_and_that_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with told(tmp_path, monkeypatch) as end:
        words = command("record", "--flight", "10s", "-o", tmp_path / "d")
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as flight:
            lines: list[str] = []
            assert until(lambda: bool(lines.extend(heard(end)) or any(line.startswith("READY=1") for line in lines)))
            beats = 0
            for _ in range(3):
                assert until(lambda: "WATCHDOG=1" in heard(end))
                beats += 1
            flight.send_signal(signal.SIGSTOP)  # it hangs
            assert until(lambda: psutil.Process(flight.pid).status() == psutil.STATUS_STOPPED)
            heard(end)
            time.sleep(1)
            assert heard(end) == []
            flight.send_signal(signal.SIGCONT)
            flight.send_signal(signal.SIGTERM)
            assert flight.wait(timeout=300) == 0
        assert beats == 3
        assert "STOPPING=1" in heard(end)
