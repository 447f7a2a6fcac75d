# SPDX-License-Identifier: Apache-2.0
"""The recorder's probes for a lab kernel, compiled in the first guest that records and then given to every other.

A guest would otherwise run clang under emulation each time, most of what a round costs. Compiling needs the kernel that
the probes are for (its layout, its tracefs) and root, both of which a lab guest has; and a guest under Bochs has no
clang.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tracer.lab.lab_kernels import Bootable, cache
from tracer.lab.modules import Directory
from tracer.probing.kept import SUFFIX

GUEST: Final = "/var/cache/kvmtrace/lab-probes"  # where init.c puts them, and KVMTRACE_PROBES of a guest
ROOT: Final = Path(__file__).resolve().parents[2]
_SOURCES: Final = ("tracer/*.py", "tracer/probing/*.py", "tracer/ebpf/*.c", "traces/schema.py", "traces/kernels/*.py")
_MOST: Final = 32  # kernels whose probes are kept, a quarter of a megabyte each; the oldest are removed


def directory() -> Path:
    """Return the directory of the lab's compiled probes, next to the kernels."""
    return cache().parent / "lab-probes"


def have(kernel: Bootable) -> Path | None:
    """Return the file of a kernel's probes, or None where no guest of it has recorded yet."""
    return next(iter(sorted((directory() / _made_from(kernel)).glob(f"*{SUFFIX}"))), None)


def keep(kernel: Bootable, files: Iterable[Path]) -> None:
    """Keep what a guest of the kernel has compiled."""
    home = directory() / _made_from(kernel)
    for file in files:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home, prefix=".", delete=False) as made:
            made.write(file.read_bytes())
        Path(made.name).replace(home / file.name)
    for old in sorted(directory().glob("*"), key=lambda path: path.stat().st_mtime)[:-_MOST]:
        shutil.rmtree(old, ignore_errors=True)


def _made_from(kernel: Bootable) -> str:
    """Return a name for all that a kernel's probes depend on: its image and KVM, our own source, and bcc."""
    from tracer.probing.compiled import bcc_version

    digest = hashlib.sha256(bcc_version().encode())
    for path in (kernel.image, *sorted(path for part in _SOURCES for path in ROOT.glob(part))):
        digest.update(path.read_bytes())
    digest.update(Directory(*kernel.modules).get("kvm", b""))
    return digest.hexdigest()[:32]
