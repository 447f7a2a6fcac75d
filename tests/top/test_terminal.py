# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace top` in a real terminal, which tmux is: it is drawn, resized, and ended with a key."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NO_TMUX
from tests.corpus import CORPUS
from tests.flight.rows import KVM, Rows
from tests.waiting import PATIENCE, until
from traces.record import RECORD
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.schema import BY_NAME

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason=NO_TMUX)]
pytest.importorskip("textual")
MS = 10**6


class Terminal:
    """One tmux session of a size."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.name, *words], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        return done.stdout

    @property
    def text(self) -> str:
        return self.tmux("capture-pane", "-p", "-t", self.name)

    def shows(self, *texts: str) -> bool:
        """Whether all of these are visible at the same time; a traceback is none of them."""
        return bool(until(lambda: "Traceback" in self.text or all(text in self.text for text in texts))) and (
            "Traceback" not in self.text
        )

    def resize(self, columns: int, lines: int) -> None:
        self.tmux("resize-window", "-t", self.name, "-x", str(columns), "-y", str(lines))

    def press(self, key: str) -> None:
        self.tmux("send-keys", "-t", self.name, key)


@contextlib.contextmanager
def top(tmp_path: Path, *words: str | Path, columns: int = 100, lines: int = 30) -> Iterator[Terminal]:
    """`kvmtrace top` there; its exit code is in `tmp_path / "code"` when it has ended."""
    name = f"kvmtrace-{secrets.token_hex(4)}"
    command = shlex.join([sys.executable, "-m", "kvmtrace", "top", *map(str, words)])
    line = f"{command}; echo $? > {shlex.quote(str(tmp_path / 'code'))}; sleep 60"
    terminal = Terminal(name)
    try:
        terminal.tmux("-f", "/dev/null", "new-session", "-d", "-s", name, "-x", str(columns), "-y", str(lines), line)
        yield terminal
    finally:
        terminal.tmux("kill-server")


def many_vcpus(path: Path, vcpus: int, seconds: int) -> Path:
    """A recording of a VM all of whose vCPUs are in the guest for 9 ms of 10."""
    at = np.arange(seconds * 100, dtype=np.uint64) * np.uint64(10 * MS) + np.uint64(10**9)
    made: list[Rows] = []
    for vcpu in range(vcpus):
        for kind, shift in (("kvm_entry", 0), ("kvm_exit", 9 * MS)):
            rows = np.zeros(len(at), RECORD)
            rows["time"], rows["kind"] = at + np.uint64(shift + vcpu), BY_NAME[kind].code
            rows["kvm"], rows["vcpu"], rows["tid"], rows["tgid"] = KVM, vcpu, 1000 + vcpu, 1000
            made.append(rows)
    rows = np.concatenate(made)
    writer = SegmentWriter(path.with_suffix(".kvmt"), {"host": {"kernel": "6.1.0", "vendor": "AuthenticAMD"}})
    writer.write(rows[np.argsort(rows["time"], kind="stable")])
    writer.close({})
    compact(path.with_suffix(".kvmt"), path)
    return path


@pytest.mark.parametrize("exported", [{}, {"COLUMNS": "80", "LINES": "24"}], ids=["plain", "exported"])
def test_it_is_drawn_anew_at_any_size_and_ends_with_q(
    exported: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    with top(tmp_path, CORPUS / "steady-6.1.parquet") as terminal:
        assert terminal.shows("vCPU", "verdict"), terminal.text
        for columns, lines in ((40, 10), (200, 50), (20, 5), (80, 24)):
            terminal.resize(columns, lines)
            assert terminal.shows("VM"), terminal.text
            assert all(len(line) <= columns for line in terminal.text.splitlines())
        assert terminal.shows("vCPU", "verdict"), "what one looks at first is there at 80 columns"
        terminal.press("q")
        assert until((tmp_path / "code").exists)
        assert until(lambda: (tmp_path / "code").read_text().strip()) == "0"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(tmp_path: Path, ending: signal.Signals) -> None:
    with top(tmp_path, CORPUS / "steady-6.1.parquet") as terminal:
        assert terminal.shows("vCPU", "verdict"), terminal.text
        shell = int(terminal.tmux("display-message", "-p", "-t", terminal.name, "#{pane_pid}"))
        os.kill(int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0]), ending)
        assert until(lambda: (tmp_path / "code").exists() and (tmp_path / "code").read_text().strip()) == "0"
        assert until(
            lambda: terminal.tmux("display-message", "-p", "-t", terminal.name, "#{alternate_on}").strip() == "0"
        )


def test_two_hundred_vcpus_are_scrolled_and_filtered(tmp_path: Path) -> None:
    with top(tmp_path, many_vcpus(tmp_path / "many.parquet", 200, 20)) as terminal:
        assert terminal.shows("90%", "runs"), terminal.text
        for _ in range(12):
            terminal.press("NPage")
        assert terminal.shows(" 199 "), terminal.text
        terminal.press("q")
        assert until(lambda: (tmp_path / "code").exists() and (tmp_path / "code").read_text().strip()) == "0"


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_a_vm_that_ends_goes_and_the_screen_goes_on(tmp_path: Path, vmm: str) -> None:
    with top(tmp_path) as terminal:
        guest = subprocess.Popen([vmm, "storm", "--loops", "1000000"], stdout=subprocess.DEVNULL)
        try:
            assert until(lambda: f"process {guest.pid}" in terminal.text), terminal.text
        finally:
            guest.kill()
            guest.wait()
        assert until(lambda: f"process {guest.pid}" not in terminal.text), terminal.text
        assert "Traceback" not in terminal.text
        terminal.press("q")
        assert until(lambda: (tmp_path / "code").exists() and (tmp_path / "code").read_text().strip()) == "0"
