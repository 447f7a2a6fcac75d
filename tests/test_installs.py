# SPDX-License-Identifier: Apache-2.0
"""Distributions installed in clean environments, and used there: the source distribution, wheels, Debian's packages.

`DIST=dist` takes what `make dist` (and scripts/deb) has made there, else they are made anew. Sizes are printed: -rP.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.documents import REPOSITORY
from tests.test_packaging import PROJECT

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("installs")]

STORM: Final = "share/kvmtrace/recordings/smi-storm-6.1-async.parquet"
MOST_TO_RECORD: Final = 120_000_000  # bytes on the disk, as `du` counts
LINTIAN: Final = ("lintian", "--fail-on", "error,warning", "--allow-root")


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    given: dict[str, object] = {"cwd": "/", "env": environment, **options}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **given)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="session")
def dist() -> Path:
    if given := os.environ.get("DIST"):
        return Path(given).absolute()
    done = run(REPOSITORY / "scripts/dist", Path(sys.base_prefix) / "bin" / Path(sys.executable).resolve().name)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return REPOSITORY / "dist"


def the_one(paths: list[Path]) -> Path:
    (path,) = paths
    return path


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    return the_one([*dist.glob(f"kvmtrace-*-cp{sys.version_info[0]}{sys.version_info[1]}-*manylinux*.whl")])


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    return the_one([*dist.glob("kvmtrace-*.tar.gz")])


def compiled() -> set[str]:
    return {
        name.removesuffix(".py") for name in re.findall(r'"([a-z_/]+\.py)",', (REPOSITORY / "setup.py").read_text())
    }


def check_contents(names: set[str], prefix: str) -> None:
    """What users need is there, and what only developers need is not."""
    pages = {name.rpartition("/")[2] for name in names if "/man/man1/" in name}
    assert {"kvmtrace.1", "kvmtrace-report.1", "kvmtrace-lab-list.1", "kvmtrace-fleet-index.1"} <= pages
    for end in (
        "share/bash-completion/completions/kvmtrace", "share/zsh/site-functions/_kvmtrace",
        "share/fish/vendor_completions.d/kvmtrace.fish", STORM,
    ):  # fmt: skip
        assert any(name.endswith(end.removeprefix("share/kvmtrace/recordings/")) for name in names), end
    for name in (
        "analysis/formats/page.html", "analysis/formats/page.css", "analysis/formats/page.js",
        "analysis/formats/page_list.js", "tracer/ebpf/state.c", "tracer/vmm/vmm.h", "tracer/lab/init.c",
        "traces/SPEC.md", "analysis/REPORT.md", "replay/RESULT.md", "traces/py.typed",
    ):  # fmt: skip
        assert prefix + name in names, name
    assert {"kvmtrace-flight.service", "kvmtrace-grafana.json"} <= {name.rpartition("/")[2] for name in names}
    unwanted = [
        name
        for name in names
        if re.match(rf"{re.escape(prefix)}(tests|benchmarks|docs/|build|traces/corpus/[^s])", name)
    ]
    assert unwanted == []
    assert not [name for name in names if re.match(rf"{re.escape(prefix)}(replay|traces)/.*\.c$", name)]


def test_a_wheel_holds_what_users_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    check_contents(names, "")
    assert {name.partition(".cpython")[0] for name in names if name.endswith(".so")} == compiled()


def test_a_source_distribution_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        names = set(file.getnames())
    prefix = f"kvmtrace-{PROJECT['version']}/"
    check_contents(names, prefix)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "scripts/kvmtrace", *(f"{each}.py" for each in compiled())):
        assert prefix + name in names
    assert not [name for name in names if name.endswith(".so")]


def environment(place: Path, what: Path, extra: str) -> Path:
    """A virtual environment with nothing but that; also without pip, so that its size is ours."""
    done = run(sys.executable, "-m", "venv", "--without-pip", place)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "pip", "--python", place / "bin/python", "install", "-q", f"{what}[{extra}]")
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def size(place: Path) -> int:
    """Bytes on the disk, as du has them."""
    return int(run("du", "-s", "--block-size=1", place).stdout.split()[0])


def check_use(command: str | Path, share: Path, *, reports: bool) -> None:
    """What a user does first."""
    assert run(command, "--version").stdout == f"kvmtrace {PROJECT['version']}\n"
    assert run(command, "--help").returncode == 0
    doctor = run(command, "doctor")
    assert doctor.returncode in (0, 3), doctor.stderr
    assert "kernel" in doctor.stdout
    listed = run(command, "lab", "list")
    assert listed.returncode == 0, listed.stderr
    assert "smi-storm" in listed.stdout
    report = run(command, "report", share / STORM.removeprefix("share/"))
    if reports:
        assert report.returncode == 0, report.stderr
        assert report.stdout.startswith("vCPU 0 of VM 1 (kvmtrace-vmm 172) spent ")
    else:
        assert report.returncode == 3
        assert report.stderr.count("\n") == 1
        assert "which is not installed: " in report.stderr


def check_share(command: str | Path, share: Path) -> None:
    """Man pages, which `man` finds, and completion, which completes."""
    for page in ("kvmtrace", "kvmtrace-report"):
        found = run("man", "-M", share / "man", "-w", page)
        assert found.returncode == 0, found.stderr
    script = share / "bash-completion/completions/kvmtrace"
    words = 'source "$1"; COMP_WORDS=(kvmtrace rep); COMP_CWORD=1; _kvmtrace_completion "$2"; echo "${COMPREPLY[@]}"'
    assert run("bash", "-c", words, "-", script, command).stdout.split() == ["replay", "report"]


@pytest.mark.parametrize("extra", ["record", "flight", "report", "top", "fleet", "all"])
def test_a_wheel_is_installed_and_used(wheel: Path, extra: str, tmp_path: Path) -> None:
    place = environment(tmp_path / "env", wheel, extra)
    print(f"kvmtrace[{extra}]: {size(place) / 1e6:.0f} MB, {size(place) >> 20} by du -m")
    check_use(place / "bin/kvmtrace", place / "share", reports=extra in ("report", "fleet", "all"))
    check_share(place / "bin/kvmtrace", place / "share")
    if extra == "record":
        assert size(place) <= MOST_TO_RECORD
        lacking = run(place / "bin/kvmtrace", "record", "--flight", "5s", "-o", tmp_path)
        assert lacking.returncode == 3
        assert lacking.stderr.endswith("bin/python3 -m pip install 'kvmtrace[flight]'\n")


def test_a_source_distribution_is_installed_and_used(sdist: Path, tmp_path: Path) -> None:
    """It compiles: some minutes."""
    place = environment(tmp_path / "env", sdist, "report")
    check_use(place / "bin/kvmtrace", place / "share", reports=True)
    check_share(place / "bin/kvmtrace", place / "share")
    so = {str(path.relative_to(place)).partition(".cpython")[0] for path in place.rglob("*.cpython*.so")}
    ours = {each.partition("site-packages/")[2] for each in so}
    assert {each for each in ours if each.startswith(("analysis/", "replay/", "traces/", "tracer/"))} == compiled()


@pytest.fixture(scope="session")
def packages(dist: Path) -> list[Path]:
    """The two Debian packages."""
    if shutil.which("dpkg-buildpackage") is None or shutil.which("lintian") is None:
        pytest.fail("Debian packages need their tools: apt-get install debhelper dpkg-dev lintian")
    if not [*dist.glob("*.deb")]:
        done = run(REPOSITORY / "scripts/deb")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [the_one([*dist.glob(f"{name}_*.deb")]) for name in ("kvmtrace", "kvmtrace-report")]


@pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="not a Debian")
def test_debian_packages_are_clean_by_lintian(packages: list[Path]) -> None:
    assert len(packages) == 2
    done = run(*LINTIAN, *packages)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="not a Debian")
def test_debian_packages_work_in_a_fresh_debian(packages: list[Path]) -> None:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.fail("a fresh Debian needs root and debootstrap: sudo, apt-get install debootstrap")
    done = run(REPOSITORY / "scripts/deb-check", *packages)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
