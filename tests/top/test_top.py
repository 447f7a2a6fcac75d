# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace top`: its screen by its keys, its documents, this host's own VMs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import CORPUS
from tests.tracer.test_record_live import run, running
from tracer.top import cli
from tracer.top.meter import VcpuSecond
from tracer.top.playback import seconds
from tracer.top.top_table import NAMES
from traces.errors import ENVIRONMENT, Problem

TRACE = CORPUS / "two-vms-6.1.parquet"


def screen_of(lines: list[VcpuSecond], dump: Callable[[], str] | None, keys: list[str], size: tuple[int, int]) -> Any:
    """(status line, rows shown) after these keys."""
    textual = pytest.importorskip("textual", reason="textual is not installed")
    assert textual
    from textual.widgets import Static

    from tracer.top.top_screen import TopScreen, VcpuTable

    async def walk() -> tuple[str, list[list[str]]]:
        app = TopScreen("a test", dump, lambda _: None)
        async with app.run_test(size=size) as pilot:
            app._take(lines)
            for key in keys:
                await pilot.press(key)
                await pilot.pause()
            if "d" in keys:
                await app.workers.wait_for_complete()
                await pilot.pause()
            shown = [re.split(r"  +", row.strip()) for row in app.query_one(VcpuTable).rows]
            return str(app.query_one("#status", Static).render()), shown

    return asyncio.run(walk())


def test_a_signal_wakes_the_screen_at_any_moment() -> None:
    pytest.importorskip("textual", reason="textual is not installed")
    from tracer.top.top_screen import TopScreen

    async def woken() -> bool:
        async with TopScreen("a test", None, lambda _: None).run_test():
            descriptor = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(descriptor)
            return descriptor >= 0

    assert asyncio.run(woken()), "a new size that comes as the loop falls asleep would wait for the next key"


def lines_of(count: int) -> list[VcpuSecond]:
    _, found = next(iter(seconds(TRACE)))
    return [replace(found[0], vm=f"VM {at // 10}", vcpu=at % 10, faults=at) for at in range(count)]


@pytest.mark.slow
def test_keys_sort_filter_freeze_and_dump() -> None:
    lines = lines_of(30)
    status, shown = screen_of(lines, None, [], (120, 40))
    assert status.startswith("a test: 30 vCPUs by VM")
    assert len(shown) == 30
    status, shown = screen_of(lines, None, ["s"] * NAMES.index("faults"), (120, 40))
    assert "by faults" in status
    assert shown[0][NAMES.index("faults")] == "29"
    status, shown = screen_of(lines, None, ["slash", *"VM", "space", "2", "enter"], (120, 40))
    assert "10 vCPUs" in status
    assert {row[0] for row in shown} == {"VM 2"}
    assert "frozen" in screen_of(lines, None, ["f"], (120, 40))[0]
    assert "give --dumps DIR" in screen_of(lines, None, ["d"], (120, 40))[0]
    assert "(dumped x.parquet)" in screen_of(lines, lambda: "dumped x.parquet", ["d"], (120, 40))[0]

    def refuse() -> str:
        raise Problem("no dump: its quota")

    assert "(no dump: its quota)" in screen_of(lines, refuse, ["d"], (120, 40))[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 10), (300, 80)])
@pytest.mark.parametrize("count", [0, 200])
def test_no_vm_and_200_vcpus_on_any_terminal(count: int, size: tuple[int, int]) -> None:
    status, shown = screen_of(lines_of(count) if count else [], None, ["down", "down", "s"], size)
    assert len(shown) == count
    assert ("no vCPU shows anything" in status) == (count == 0)


@pytest.mark.slow
def test_pages_leave_out_no_row_and_keys_that_come_at_once_all_count() -> None:
    pytest.importorskip("textual", reason="textual is not installed")
    from tracer.top.top_screen import TopScreen, VcpuTable

    async def walk() -> tuple[list[float], list[float]]:
        app = TopScreen("a test", None, lambda _: None)
        async with app.run_test(size=(120, 20)) as pilot:
            app._take(lines_of(100))
            await pilot.pause()
            table = app.query_one(VcpuTable)
            rows = table.size.height - 1  # the head's line is none
            at = [table.scroll_y / rows]
            for key in ("pagedown", "pagedown", "pageup"):
                await pilot.press(key)
                await pilot.pause()
                at.append(table.scroll_y / rows)
            before = table.scroll_y
            await pilot.press(*["down"] * 5, *["pagedown"] * 2, *["up"] * 3, "pageup")
            await pilot.pause()
            return at, [table.scroll_y - before - rows, table.max_scroll_y + rows]

    pages, (lines, shown) = asyncio.run(walk())
    assert pages == [0, 1, 2, 1]
    assert lines == 2
    assert shown == 100, "the last row can be seen"


@pytest.mark.slow
def test_a_recording_as_text_and_as_json() -> None:
    done = run("top", TRACE, "--once")
    assert done.stdout.startswith("after 0 s\nVM ")
    assert "VM 2 (kvmtrace-vmm" in done.stdout
    document = json.loads(run("top", TRACE, "--once", "--json").stdout)
    assert document["schema"] == 1
    ((vcpus,),) = [[second["vcpus"]] for second in document["seconds"]]
    assert {line["vcpu"] for line in vcpus} >= {0}
    assert run("top", TRACE, "--json").returncode == 2


def test_without_textual_it_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['textual'] = None; sys.argv = ['kvmtrace', 'top']\nimport kvmtrace; kvmtrace.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == ENVIRONMENT
    assert "pip install 'kvmtrace[top]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_flight_no_key() -> None:
    assert cli._dump_of(None) is None
    dump = cli._dump_of(Path("/nowhere"))
    assert dump is not None
    with pytest.raises(Problem, match="no flight recorder runs here"):
        dump()


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_this_hosts_vms(vmm: str) -> None:
    with running(vmm, "storm", "--loops", "10000000") as guest:
        done = run("top", "--once", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (second,) = document["seconds"]
    assert document["lost"] == 0
    (mine,) = [line for line in second["vcpus"] if line["pid"] == guest.pid and line["vcpu"] == 0]
    assert mine["exits"] > 5
    assert mine["roots"] > 5
    assert mine["guest"] is None or 0 <= mine["guest"] <= 1
