# SPDX-License-Identifier: Apache-2.0
"""What the owners of VMs call them: QEMU's `-name` (libvirt gives it the domain's), Firecracker's `--id`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

_PROC = Path("/proc")
_MOST_BYTES = 1 << 17  # of a command line
_LONGEST = 200  # of a name


def name_in(arguments: Sequence[str]) -> str:
    """The name that a VMM's command line gives its VM; empty where it gives none.

    >>> name_in(["qemu", "-name", "guest=web1,debug-threads=on"]), name_in(["firecracker", "--id", "a-7"])
    ('web1', 'a-7')
    """
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        given, equals, same = option.partition("=")
        if given not in ("-name", "--name", "--id"):
            continue
        parts = (same if equals else value).split(",")
        named = [part.removeprefix("guest=") for part in parts if part.startswith("guest=")]
        return (named or parts)[0][:_LONGEST]
    return ""


class OwnerNames:
    """The names of VMs, by the process that owns them; each process is read once, while it exists."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def of(self, tgids: Iterable[int]) -> dict[str, str]:
        """Return the metadata's `vm_names`: names of VMs of these and earlier processes, where they have one."""
        for tgid in tgids:
            if tgid and tgid not in self._names:
                try:
                    with (_PROC / str(tgid) / "cmdline").open("rb") as file:
                        words = file.read(_MOST_BYTES).split(b"\0")
                except OSError:
                    continue  # gone, or not of this pid namespace
                if words == [b""]:
                    continue  # it is about to become another program
                self._names[tgid] = name_in([word.decode(errors="replace") for word in words])
        return {str(tgid): name for tgid, name in self._names.items() if name}
