# SPDX-License-Identifier: Apache-2.0
"""What the lab's guests are built from: KVM's selftests, a firmware, a Linux. Kept in the cache next to the kernels.

Sources come as Debian's packages through the private apt: nothing is installed, nothing needs root.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tracer.lab.apt import Apt
from tracer.lab.fetch import Say, alone, fetch
from tracer.lab.initramfs import Archive, build, compiled
from tracer.lab.lab_kernels import cache
from tracer.lab.modules import Directory
from traces.errors import ENVIRONMENT, Problem

# One kernel's tests, and one kernel within all guests: what differs between two tables is the host's kernel only.
SERIES: Final = "6.1"
_SUITES: Final = (("Debian-Security", "bookworm-security"), ("Debian", "bookworm"))
_TESTS: Final = "tools/testing/selftests/kvm"
# 6.1.y has a test that uses a name which came later.
_RENAMED: Final = "CPPFLAGS=-DTEST_ASSERT_EQ=ASSERT_EQ"


def built(what: str, say: Say = lambda line: None) -> Path:
    """Return the directory of a build, by its name in `_BUILDS`; it is made now if it is not there."""
    home = cache().parent / "guests" / what
    if home.is_dir():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with alone(home.parent), tempfile.TemporaryDirectory(prefix=f".{what}-", dir=home.parent) as directory:
        if home.is_dir():
            return home  # built by another process, while this one waited
        say(f"building {what}")
        made = Path(directory) / "made"
        made.mkdir()
        _BUILDS[what](Path(directory), made)
        made.rename(home)
    return home


def _package(work: Path, name: str) -> tarfile.TarFile:
    apt = Apt(work / "apt", _SUITES)
    apt.update()
    return tarfile.open(apt.download(name, apt.newest(name)))


def _selftests(work: Path, made: Path) -> None:
    with _package(work, f"linux-source-{SERIES}") as package:
        source = package.extractfile(f"./usr/src/linux-source-{SERIES}.tar.xz")
        with tarfile.open(fileobj=source, mode="r|xz") as tar:
            tar.extractall(work, filter="data")
    tree = work / f"linux-source-{SERIES}"
    # It ends early where there is no rsync, and has then made all that the tests need.
    _make(tree, "headers_install", "ARCH=x86_64")
    said = _make(tree / _TESTS, "-k", "ARCH=x86_64", "LDFLAGS=-pthread -no-pie -static", _RENAMED)
    for path in (*(tree / _TESTS).glob("*"), *(tree / _TESTS / "x86_64").glob("*")):
        if path.is_file() and not path.suffix and os.access(path, os.X_OK):
            shutil.copy(path, made)
    if not any(made.iterdir()):
        last = (said.strip().splitlines() or ["make said nothing"])[-1]
        raise Problem(f"KVM's selftests do not build: apt-get install gcc make libc6-dev ({last})", ENVIRONMENT)


def _make(tree: Path, *words: str) -> str:
    """Run make and return its standard error. What does not build is missing in the end, as a table of results shows.

    It is a make of its own, even inside another's recipe: below one (MAKELEVEL), the selftests take the place to build
    in from the make above, and with none they build into the root directory.
    """
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-C", str(tree), f"-j{os.cpu_count()}", *words]
    try:
        return subprocess.run(command, capture_output=True, check=False, env=alone, text=True, errors="replace").stderr
    except FileNotFoundError:
        raise Problem("no make: apt-get install make", ENVIRONMENT) from None


def _firmware(work: Path, made: Path) -> None:
    with _package(work, "ovmf") as package:
        for name, kept in (("OVMF_CODE_4M.secboot.fd", "code.fd"), ("OVMF_VARS_4M.fd", "vars.fd")):
            file = package.extractfile(f"./usr/share/OVMF/{name}")
            (made / kept).write_bytes(file.read() if file else b"")


def _linux(work: Path, made: Path) -> None:
    kernel = fetch(SERIES)
    shutil.copy(kernel.image, made / "vmlinuz")
    (made / "initrd").write_bytes(build(Directory(*kernel.modules), {}, compiled("init", work)))


def _busy(work: Path, made: Path) -> None:
    shutil.copy(fetch(SERIES).image, made / "vmlinuz")
    alone = Archive()
    for name in ("dev", "sys"):
        alone.add(name, stat.S_IFDIR | 0o755)
    alone.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    alone.add("init", stat.S_IFREG | 0o755, compiled("busy", work))
    (made / "initrd").write_bytes(alone.contents())


_BUILDS: Final[dict[str, Callable[[Path, Path], None]]] = {
    "selftests": _selftests,
    "firmware": _firmware,
    "linux": _linux,
    "busy": _busy,
}
