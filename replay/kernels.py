"""Kernel versions: what each does with roots, when it unloads, and how it writes its role words. Dated 2026-11.

Source: the kernels read for the project's reference (kvm-mmu.md: 2.2 triggers, 1 words, 3 policies, 4.2 RET_PF codes).
A version without a patch level means the last of its stable series, which is what distributions have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from replay import roles
from replay.axes import ASYNC, NAMED, PRESERVE, PRESERVE_WORKER, SYNC, SYNC_RW, Axes, Designs
from replay.causes import ALWAYS, Trigger
from replay.roles import Layout
from traces.errors import Problem
from traces.metadata import Metadata

_LAST_PATCH: Final = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """What is fixed by a kernel's version; `axes` is its root policy where nested paging and the TDP MMU are on."""

    name: str
    since: tuple[int, int, int]
    axes: Axes
    unloads: frozenset[Trigger]
    layout: Layout
    eager_split: bool  # dirty logging splits huge leaves when it begins
    fixed: int  # RET_PF_FIXED
    prefetches_tail: bool  # the shadow MMU prefetches behind the fault, too, not only before it

    def policy(self, name: str) -> Axes:
        """A named policy as this kernel would have it: how it splits huge leaves and locks is not the policy's."""
        if name == self.axes.name:
            return self.axes
        if name not in NAMED:
            raise Problem(f"--policy {name}: neither a policy ({', '.join(NAMED)}), nor a file, nor an entry point")
        axes = NAMED[name]
        if axes.mmu == "shadow":
            return replace(axes, request=self.axes.request)
        own = self.axes
        return replace(
            axes, split_in_place=own.split_in_place, loads_share=own.loads_share, faults_share=own.faults_share
        )


_WITH_WP: Final = ALWAYS | {Trigger.CR0_WP}  # until 01b31714bd90
_OLDEST: Final = _WITH_WP | {Trigger.CR4_PGE, Trigger.CR4_PCIDE, Trigger.INVPCID}

_ASYNC_63: Final = replace(ASYNC, split_in_place=True)
_WORKER_62: Final = replace(PRESERVE_WORKER, split_in_place=False)
_PRESERVE_61: Final = replace(PRESERVE, split_in_place=False)


def _kernel(
    name: str,
    since: tuple[int, int, int],
    axes: Axes,
    unloads: frozenset[Trigger],
    layout: Layout,
    *,
    fixed: int = 4,
) -> Kernel:
    axes = replace(axes, loads_share=since >= (6, 9, 0), faults_share=since >= (5, 12, 0))
    return Kernel(name, since, axes, unloads, layout, since >= (5, 18, 0), fixed, since >= (5, 15, 0))


# The last whose `since` is not later than the version is the version's. The patch levels within 6.1 to 6.3 are of the
# stable series' back-ports of edbdb43fc96b; they brought 01b31714bd90 (no unload for CR0.WP) earlier the same year.
KERNELS: Final = (
    _kernel("5.10", (5, 10, 0), SYNC, _OLDEST, roles.OLD, fixed=3),
    _kernel("5.12", (5, 12, 0), SYNC_RW, _WITH_WP, roles.OLD, fixed=3),
    _kernel("5.15", (5, 15, 0), SYNC_RW, _WITH_WP, roles.OLD, fixed=3),
    _kernel("5.17", (5, 17, 0), SYNC_RW, _WITH_WP, roles.GUEST_BITS, fixed=3),
    _kernel("5.18", (5, 18, 0), ASYNC, _WITH_WP, roles.GUEST_BITS),
    _kernel("5.19", (5, 19, 0), ASYNC, _WITH_WP, roles.FIXED),
    _kernel("6.1", (6, 1, 50), _PRESERVE_61, ALWAYS, roles.FIXED),
    _kernel("6.2.0", (6, 2, 0), ASYNC, _WITH_WP, roles.FIXED),
    _kernel("6.2", (6, 2, 15), _WORKER_62, ALWAYS, roles.FIXED),
    _kernel("6.3.0", (6, 3, 0), _ASYNC_63, _WITH_WP, roles.FIXED),
    _kernel("6.3", (6, 3, 2), PRESERVE_WORKER, ALWAYS, roles.FIXED),
    _kernel("6.6", (6, 6, 0), PRESERVE, ALWAYS, roles.FIXED),
    _kernel("6.9", (6, 9, 0), PRESERVE, ALWAYS, roles.FIXED),
    _kernel("6.12", (6, 12, 0), PRESERVE, ALWAYS, roles.FIXED, fixed=5),
    _kernel("7.x", (7, 0, 0), PRESERVE, ALWAYS, roles.WIDE, fixed=5),
)
_DESIGNS_510: Final = Designs("locked", "write", False, "memslot", "list", 3)
_DESIGNS_513: Final = replace(_DESIGNS_510, pte_list_ext=0)  # 3 or 14: not read
_DESIGNS_515: Final = replace(_DESIGNS_513, counted=True, apicv="gfn")
_DESIGNS_61: Final = replace(_DESIGNS_515, pte_list_ext=14)
_DESIGNS_62: Final = replace(_DESIGNS_61, tdp_pages="counter")
# (since, where it stands, what changed). 5.10's mmu_lock is a spinlock: write. In later kernels than 6.2 the counter is
# there only with CONFIG_KVM_PROVE_MMU (no field of it in a live 6.18's BTF): then neither way costs anything.
DESIGNS: Final = (
    ((5, 10, 0), _DESIGNS_510, "5.10"),
    ((5, 13, 0), replace(_DESIGNS_513, zap_lock="read"), "6103bc074048: zaps under the read lock"),
    (
        (5, 15, 0),
        _DESIGNS_515,
        "5a324c24b638, edb298c663fc, 36222b117e36: write lock again, with count and sequence; the APIC memslot stays",
    ),
    ((6, 1, 0), _DESIGNS_61, "SPTEs of a page in chains of 14, not of 3"),
    ((6, 2, 0), _DESIGNS_62, "d25ceb926436: tables are counted, not listed"),
    ((6, 15, 0), replace(_DESIGNS_62, aging="lockless"), "b146a9b34aed, af3b6a9eba48: aging without mmu_lock"),
)  # fmt: skip
# What the recorder calls a policy -> what it is called here.
RECORDED: Final = {
    "sync": "sync",
    "async": "async",
    "preserve-worker": "preserve-worker",
    "preserve-inline": "preserve",
    "shadow": "shadow",
}


def at(version: str) -> Kernel:
    """The kernel of a version such as `5.15`, `6.1.20` or `7.x`."""
    wanted = _version(version)
    found = [kernel for kernel in KERNELS if kernel.since <= wanted]
    if not found:
        raise Problem(f"--kernel {version}: there is no TDP MMU before 5.10")
    return found[-1]


def designs(metadata: Metadata) -> Designs:
    """Where the recorded kernel stands on the questions beside the root policy."""
    wanted = _version(_release(metadata))
    return [design for since, design, _ in DESIGNS if since <= wanted][-1]


def since(axis: str, variant: str) -> str:
    """From which version on a variant of an axis (`Designs`) was the kernel's, and what made it so."""
    told = []
    before = None
    for version, design, why in DESIGNS:
        now = getattr(design, axis)
        if now == variant and before != variant:
            told.append(f"{version[0]}.{version[1]}" + ("" if version == (5, 10, 0) else f" ({why})"))
        before = now
    return " and from ".join(told)


def _version(version: str) -> tuple[int, int, int]:
    match = re.match(r"v?(\d+)\.(\d+|x)(?:\.(\d+))?", version)
    if match is None:
        raise Problem(f"--kernel {version}: not a version; write it like 5.15 or 6.1.20")
    major, minor, patch = match[1], match[2], match[3]
    return (
        int(major),
        _LAST_PATCH if minor == "x" else int(minor),
        _LAST_PATCH if patch is None else int(patch),
    )


def recorded(metadata: Metadata) -> tuple[Kernel, Axes]:
    """The recorded kernel with the layout of its own words, and the root policy that the recorder found in it."""
    kernel = at(_release(metadata))
    if metadata.policy not in RECORDED:
        raise Problem(f"the recorder could not tell this kernel's root policy ({metadata.policy or 'none given'})")
    layout = metadata.raw.get("layout")
    kernel = replace(kernel, layout=roles.recorded(layout if isinstance(layout, dict) else {}, kernel.layout))
    return kernel, kernel.policy(RECORDED[metadata.policy])


def _release(metadata: Metadata) -> str:
    host = metadata.raw.get("host")
    build = str(host.get("build", "")) if isinstance(host, dict) else ""
    release = metadata.kernel
    # Debian's release has the ABI where the patch level would be; its build string has the version.
    exact = re.search(r"Debian (\d+\.\d+\.\d+)", build)
    match = re.match(r"\d+\.\d+(\.\d+)?", release)
    if exact is None and match is None:
        raise Problem(
            f"the trace does not say which kernel it is of ({release or 'no release'}): it cannot be replayed"
        )
    return exact[1] if exact else release
