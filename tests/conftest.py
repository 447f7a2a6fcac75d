# SPDX-License-Identifier: Apache-2.0
"""What tests need of the machine, and the rule for skips: in CI nothing may be skipped that could have run.

Tests are marked by what they need (pyproject.toml has the markers); `make quick` runs those that need nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.main
import typer.testing

import tests.profiles  # noqa: F401 - how many examples Hypothesis tries, before any test module asks

if TYPE_CHECKING:
    from tests.analysis.browser import Browser
    from tests.verbs import Files, Verb

TRACING = Path("/sys/kernel/tracing")
ROOT = Path(__file__).parents[1]

# The only things a machine may honestly lack; anything else in a skip's reason is a failure in CI.
NOT_ROOT = "not root: recording live needs it"
NO_KVM = "this machine has no /dev/kvm"
NO_CHROMIUM = "chromium is not installed, and only root can install it"
NESTED_PAGING = "this machine's KVM has nested paging: it shows no shadow paging"
NO_SYSTEMD = "systemd-analyze is not installed"
NO_TMUX = "tmux is not installed"
NO_VARIANT = "kernel 6.1-async is in no package"


def _variant_missing() -> bool:
    from tracer.lab.fetch import present

    return present("6.1-async") is None


def nested_paging() -> bool:
    """Whether this machine's KVM runs guests on a second level of page tables."""
    switches = [Path("/sys/module/kvm_amd/parameters/npt"), Path("/sys/module/kvm_intel/parameters/ept")]
    return any(path.exists() and path.read_text().strip() in ("Y", "1") for path in switches)


_HONEST = {
    NESTED_PAGING: nested_paging,
    NOT_ROOT: lambda: os.geteuid() != 0,
    NO_KVM: lambda: not Path("/dev/kvm").exists(),
    NO_CHROMIUM: lambda: os.geteuid() != 0 and shutil.which("chromium") is None,
    NO_SYSTEMD: lambda: shutil.which("systemd-analyze") is None,
    NO_TMUX: lambda: shutil.which("tmux") is None,
    NO_VARIANT: _variant_missing,
}

# Typer makes the command of all verbs anew whenever it is called, and one process does that once, but for tests.
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)

os.environ["KVMTRACE_PROBES"] = str(Path(tempfile.gettempdir()) / "kvmtrace-test-probes")  # not in this system's cache

_CLONE_NEWNS = 0x20000
_LOCK = Path(tempfile.gettempdir()) / "kvmtrace-tests.lock"

_dishonest: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(text in reason and holds() for text, holds in _HONEST.items()):
            _dishonest.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _dishonest and os.environ.get("CI"):
        print("\nskipped in CI though this machine could run it:\n  " + "\n  ".join(_dishonest), file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups, and -m the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("live") or item.get_closest_marker("kvm"):
            # One after the other in one worker: what one records would slow the other, and lose its events.
            item.add_marker(pytest.mark.xdist_group("live"))
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """In a worker of xdist: groups are names at the end of node ids, and there must be no run without them."""
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
                raise pytest.UsageError("pytest-xdist takes no notice of groups: install what pyproject.toml asks for")


@pytest.fixture(scope="session")
def live() -> None:
    """A machine whose own KVM can be recorded, with tracefs where this process and its children look for it.

    What tests mount is in a namespace of their own, so that two runs at once do not take it away from each other.
    """
    if os.geteuid() != 0:
        pytest.skip(NOT_ROOT)
    if not Path("/dev/kvm").exists():
        pytest.skip(NO_KVM)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    if not any((path / "events").is_dir() for path in (TRACING, Path("/sys/kernel/debug/tracing"))):
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=True)


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """One test at a time on this machine, whoever runs it, where guests run: a storm fills everybody's rings."""
    if not {"live", "kvm"} & {mark.name for mark in request.node.iter_markers()}:
        yield
        return
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def vmm() -> str:
    """Path of the VMM, built where it is not."""
    from tracer.vmm import binary

    return str(binary())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from tests.analysis.browser import Browser, chromium

    if chromium() is None and os.geteuid() != 0:
        pytest.skip(NO_CHROMIUM)
    with Browser() as one:
        yield one


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The inputs of tests.verbs."""
    from tests.verbs import make_files

    return make_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Verb], Path]:
    """What a verb writes when nothing is in its way; made once."""
    from tests.verbs import invoke

    directory = tmp_path_factory.mktemp("whole")

    def made(verb: Verb) -> Path:
        path = directory / verb.name
        if not path.exists():
            invoke(verb.words(files, path))
        return path

    return made
