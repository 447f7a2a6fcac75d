"""The systemd unit: its command line is understood, and its capabilities are enough."""

from __future__ import annotations

import configparser
import json
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.test_help import ROOT
from tests.tracer.test_record_live import command, run
from tests.waiting import until
from tracer.flight.control import NAME
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
    assert context.params["out"] == Path("/var/lib") / service()["StateDirectory"]
    from tracer.flight.trigger_texts import FlightTriggers
    from tracer.probes import preset_kinds

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
