# SPDX-License-Identifier: Apache-2.0
"""What a flight recorder that runs for long keeps to: its bounds, its counts, and silence while nothing is wrong.

The short forms run with the live tests; the long ones are `make nightly`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from tests.flight.test_flight_live import flying, watching
from tests.own_vm import noted
from tests.tracer.test_record_live import counted, independent_counter, run
from tests.waiting import PATIENCE, until
from traces.reader import Trace

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.usefixtures("live")]
MIB = 1 << 20
MANY = 10  # dumps of one run


def metrics(address: str) -> dict[str, float]:
    """The sum of each metric over its labels."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as page:
        text = page.read().decode()
    for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", text, re.M):
        found[name] = found.get(name, 0) + float(value)
    return found


def anonymous_memory(pid: int) -> int:
    """Bytes of a process's own memory: without the rings, and files that it has mapped."""
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(kilobytes) << 10


def dump(directory: Path) -> Path | None:
    """One dump by hand; None where the quota is used up."""
    done = run("dump", directory, "--json")
    if done.returncode:
        assert "has made all that it may" in done.stderr, done.stderr
        return None
    return Path(json.loads(done.stdout)["path"])


@contextmanager
def guests(vmm: str, *words: str) -> Iterator[None]:
    """A guest that is begun again whenever it ends."""
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            with subprocess.Popen([vmm, *words], stdout=subprocess.DEVNULL) as guest:
                while guest.poll() is None and not over.wait(0.1):
                    pass
                guest.kill()

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("wraps", [20, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_window_that_wraps_keeps_its_bounds_in_memory_and_on_disk(tmp_path: Path, vmm: str, wraps: int) -> None:
    """At the storm's full rate. A wrap is the time that the window then goes back for."""
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        directory, exported = tmp_path / "d", f"127.0.0.1:{free.getsockname()[1]}"
    memory, disk = 32 * MIB, 24 * MIB
    options = ("--flight", "100ms", "--memory", f"{memory // MIB}M", "--disk", f"{disk // MIB}M", "--metrics", exported)
    trigger = ("--events", "all", "--trigger", "user-exits > 20/s for 500ms")
    dumps, held, sizes = list[Path](), list[int](), list[int]()
    turned, looked = 0.0, time.monotonic()
    with flying(directory, *options, *trigger) as flight, guests(vmm, "storm", "--loops", "100000"):
        while turned < wraps or len(dumps) < MANY:
            path = dump(directory) if len(dumps) < MANY * turned / wraps else None
            if path is not None:
                dumps.append(path)
            time.sleep(0.2)
            assert flight.poll() is None
            facts, now = metrics(exported), time.monotonic()
            turned += (now - looked) / max(facts["kvmtrace_window_seconds"], 0.1)
            looked = now
            assert facts["kvmtrace_window_bytes"] <= memory
            held.append(anonymous_memory(flight.pid))
            automatic = [each for each in directory.glob("*.parquet") if "user-exits" in each.name]
            sizes.append(sum(each.stat().st_size for each in automatic if each.exists()))
        flight.send_signal(signal.SIGINT)
        said = flight.communicate(timeout=600)[1]
    assert flight.returncode == 0, said
    for path in dumps:
        meta = Trace.open(path).metadata
        assert meta.complete, meta.discrepancies
        checked = run("validate", path)
        before = checked.returncode == 2 and "it was running before the recording began" in checked.stderr
        assert before or (checked.returncode, checked.stdout[:5]) == (0, "100 %"), checked.stdout + checked.stderr
    early, late = held[len(held) // 4 : len(held) // 2], held[len(held) // 2 :]
    assert max(late) <= max(early) + memory, "it does not grow"
    assert max(sizes) <= disk + max(path.stat().st_size for path in dumps), "but for one that is just made"
    print(f"{turned:,.0f} wraps, {len(dumps)} dumps, at most {max(held) / MIB:,.0f} MiB of its own memory; {said}")


@dataclass
class Guest:
    """A guest that has come and gone, in boot ns."""

    pid: int
    begins: int
    ends: int


@pytest.mark.parametrize("often", [3, pytest.param(50, marks=pytest.mark.nightly)])
def test_dumps_at_random_moments_have_what_an_independent_program_counted(tmp_path: Path, vmm: str, often: int) -> None:
    """Of every guest that came and went within a dump's window. By hand and by signal, which have a quota each."""
    directory, moment, known, over = tmp_path / "d", random.Random(often), list[Guest](), threading.Event()

    def keep() -> None:
        while not over.is_set():
            begins = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            words = noted(tmp_path / "pid", vmm, moment.choice(("storm", "churn", "slot-delete")), "--loops", "40")
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            ends = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            known.append(Guest(int((tmp_path / "pid").read_text()), begins, ends))
            time.sleep(moment.uniform(0.2, 1))  # RCU's callbacks, and so that the counter's table lasts

    options = ("--events", "all", "--flight", "20s")
    with independent_counter() as counter, flying(directory, *options) as flight:
        thread = threading.Thread(target=keep)
        thread.start()
        try:
            made = 1
            while made < often + 1:
                time.sleep(moment.uniform(0, 3))
                if made % 2:
                    assert dump(directory) is not None
                else:
                    os.kill(flight.pid, signal.SIGUSR2)
                made += 1
                assert until(lambda: len(list(directory.glob("*.parquet"))) >= made)  # noqa: B023 - used in the round
        finally:
            over.set()
            thread.join()
        expected = {guest.pid: counted(counter, guest.pid) for guest in known}
        flight.send_signal(signal.SIGINT)
        said = flight.communicate(timeout=600)[1]
    assert flight.returncode == 0, said
    compared = 0
    dumps = sorted(directory.glob("*.parquet"))
    assert len(dumps) == often + 1
    for path in dumps:
        meta = Trace.open(path).metadata
        assert meta.complete, meta.discrepancies
        facts = meta.raw["flight"]
        whole = [guest for guest in known if facts["begins"] <= guest.begins and guest.ends <= facts["ends"]]
        rows = pl.scan_parquet(path).select("tid", "kind").collect()
        for guest in whole:
            owner = [thread["tid"] for thread in meta.raw["threads"] if thread["tgid"] == guest.pid]
            kinds = rows.filter(pl.col("tid").is_in(owner)).group_by("kind").len()
            stored = {str(kind): n for kind, n in kinds.iter_rows()}
            mine = expected[guest.pid]
            assert sum(mine.values()) > 100, "the counter saw too little: the test would prove nothing"
            assert {kind: stored.get(kind, 0) for kind in mine} == mine, (path.name, guest)
        compared += len(whole)
        if whole:
            checked = run("validate", path)
            assert (checked.returncode, checked.stdout[:5]) == (0, "100 %"), checked.stdout + checked.stderr
    assert compared >= often
    print(f"{len(dumps)} dumps, {compared} guests compared, {sum(map(len, expected.values()))} counts")


HEALTHY = ("steady", "churn", "slot-delete", "mmio", "notifier", "dirty-log", "idle", "cow")
TRIGGERS = (
    "guest-share < 10% for 200ms", "roots > 100000/s for 1s", "errors > 0 for 1s", "same-gfn > 1000", "zap > 5s",
    "user-exits > 1000000/s for 1s", "faults > 1000000/s for 1s",
)  # fmt: skip


@pytest.mark.parametrize("runs", [8, pytest.param(200, marks=pytest.mark.nightly)])
def test_healthy_guests_that_pause_on_a_busy_host_trigger_nothing(tmp_path: Path, vmm: str, runs: int) -> None:
    """Each third one is stopped for a while and continued; two threads keep the host's CPUs busy all the time."""
    directory, moment, pids = tmp_path / "d", random.Random(runs), list[int]()
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2)]
    try:
        with watching(directory, *TRIGGERS):
            for number in range(runs):
                with subprocess.Popen([vmm, HEALTHY[number % len(HEALTHY)]], stdout=subprocess.DEVNULL) as guest:
                    pids.append(guest.pid)
                    if not number % 3:
                        time.sleep(moment.uniform(0, 0.05))
                        guest.send_signal(signal.SIGSTOP)
                        time.sleep(moment.uniform(0.1, 0.6))
                        guest.send_signal(signal.SIGCONT)
                    assert guest.wait(timeout=300) == 0
    finally:
        for each in busy:
            each.kill()
            each.wait()
    told = [Trace.open(path).metadata.raw["flight"]["text"] for path in directory.glob("*.parquet")]
    mine = [text for text in told if any(f"process {pid}:" in text for pid in pids)]
    assert mine == [], "of these guests; others may run on this host as well"
