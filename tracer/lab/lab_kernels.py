# SPDX-License-Identifier: Apache-2.0
"""The kernels a lab boots: the one table of what each one's root policy is, and where their files are.

The table is dated: Debian's suites move on, and stable kernels get the policy changes backported.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem
from traces.kernels.fold import at

TABLE_DATE: Final = "2026-11-26"


@dataclass(frozen=True)
class LabKernel:
    """A kernel of the table. `suites` are (archive label, suite), where Debian has it as `linux-image-amd64`.

    `series` is how its version begins; `parameters` are the module parameters, as on a command line (kvm.tdp_mmu=1),
    that it needs for its TDP MMU; `variant` names the folder that replaces kvm.ko and kvm-amd.ko, for a kernel that no
    package has.
    """

    name: str
    series: str
    policy: str
    reason: str
    suites: tuple[tuple[str, str], ...] = ()
    parameters: tuple[str, ...] = ()
    variant: str = ""


KERNELS: Final = {
    kernel.name: kernel
    for kernel in (
        LabKernel(
            "5.10",
            "5.10",
            "sync",
            "the first TDP MMU (5.10): kvm_tdp_mmu_free_root() zaps without yielding under mmu_lock",
            suites=(("Debian-Security", "bullseye-security"), ("Debian", "bullseye")),
            parameters=("kvm.tdp_mmu=1",),  # off by default until 5.14
        ),
        LabKernel(
            "6.1",
            "6.1",
            "preserve",
            "6.1.192 has edbdb43fc96b (6.4) and 0df9dab891ff (6.6) backported",
            suites=(("Debian-Security", "bookworm-security"), ("Debian", "bookworm")),
        ),
        LabKernel(
            "6.1-async",
            "6.1",
            "async",
            "Debian's 6.1.192 with KVM modules that have edbdb43fc96b undone, as in 5.18 to 6.3",
            variant="async",
        ),
        LabKernel(
            "6.12",
            "6.12",
            "preserve",
            "edbdb43fc96b (6.4) and 0df9dab891ff (6.6); roots are made under mmu_lock for read (6.9)",
            suites=(("Debian-Security", "trixie-security"), ("Debian", "trixie")),
        ),
        LabKernel(
            "7.x",
            "7",
            "preserve",
            "the newest released one; as 6.12, invalidation split into a front and a back half (7.3)",
            suites=(("Debian", "trixie-backports"), ("Debian", "sid"), ("Debian", "experimental")),
        ),
    )
}

# Where a series is looked for that has no line in the table: backports keep each one for some months after the next.
_SUITES: Final = (
    ("Debian-Security", "trixie-security"),
    ("Debian", "trixie"),
    ("Debian", "trixie-backports"),
    ("Debian", "bookworm-backports"),
    ("Debian", "sid"),
    ("Debian", "experimental"),
)


@dataclass(frozen=True)
class Bootable:
    """A kernel whose files are here. Of a module that several of the directories `modules` have, the last one counts.

    `name` and `policy` are those of the table; for a user's own kernel, `name` is the image's release, `policy` empty.
    """

    name: str
    image: Path
    modules: tuple[Path, ...]
    policy: str = ""
    parameters: tuple[str, ...] = ()
    version: str = field(default="", compare=False)

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return self.version.split(" ", 1)[0]

    @property
    def package(self) -> str:
        """The Debian package and its version, empty for a kernel that Debian did not build."""
        built = re.search(r" Debian (\S+) \(", self.version)
        return f"linux-image-{self.release} {built[1]}" if built else ""


def cache() -> Path:
    """Return where fetched kernels are kept: $XDG_CACHE_HOME/kvmtrace/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvmtrace" / "kernels"


def known(name: str) -> LabKernel:
    """Return a kernel of the table, or one made for a series such as 6.18. Raises Problem for any other name."""
    if name in KERNELS:
        return KERNELS[name]
    if not re.fullmatch(r"\d{1,2}\.\d{1,3}", name):
        listed = ", ".join(KERNELS)
        raise Problem(f"{name}: no such kernel; there are {listed}, a series such as 6.18, or a kernel image's path")
    kernel = at(name)
    off = kernel.version < (5, 14)  # when kvm.tdp_mmu became the default
    return LabKernel(
        name,
        name,
        kernel.policy,
        "the policy that `kvmtrace kernels` describes for this version",
        _SUITES,
        ("kvm.tdp_mmu=1",) if off else (),
    )


def cached() -> list[str]:
    """Return the kernels that `known` knows: the table's, then those of a series that were fetched."""
    others = sorted(path.name for path in cache().glob("[0-9]*.[0-9]*") if path.name not in KERNELS)
    return [*KERNELS, *others]


def fetched(name: str) -> Bootable | None:
    """Return a kernel that is in the cache, or None."""
    kernel, home = known(name), cache() / name
    if not (home / "vmlinuz").is_file():
        return None
    return Bootable(
        name,
        home / "vmlinuz",
        (home / "modules",),
        kernel.policy,
        kernel.parameters,
        image_version(home / "vmlinuz"),
    )


def own(image: Path, modules: Path | None) -> Bootable:
    """Return a user's own kernel: a bzImage, and where its modules are unless KVM and 9p are built in."""
    version = image_version(image)
    return Bootable(version.split(" ", 1)[0], image, (modules,) if modules else (), version=version)


def image_version(image: Path) -> str:
    """Return the version line of a bzImage (boot protocol, `kernel_version` at 0x20e): release, builder, date.

    Raises Problem when the file cannot be read or is no bzImage.
    """
    try:
        with image.open("rb") as file:
            head = file.read(0x8200)  # the setup code is at most 64 sectors long
    except OSError as error:
        raise Problem(f"{image}: {error.strerror}") from None
    if head[0x202:0x206] != b"HdrS":
        raise Problem(f"{image}: not an x86 kernel image (bzImage)")
    (offset,) = struct.unpack_from("<H", head, 0x20E)
    version = head[0x200 + offset :].split(b"\0", 1)[0]
    return version.decode("ascii", "replace")


def missing(name: str) -> Problem:
    """Return the Problem of a kernel that is not here, with the command that gets it."""
    if known(name).variant:
        return Problem(f"kernel {name} is in no package: set KVMTRACE_KERNELS to a directory that has it", ENVIRONMENT)
    return Problem(f"kernel {name} is not here: kvmtrace lab fetch {name}", ENVIRONMENT)
