# SPDX-License-Identifier: Apache-2.0
"""A recording made inside a guest, combined with the host's: which VM it is of, and whether their times overlap."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from analysis.reading.sources import GuestOfVm, Recording
from traces.errors import Problem
from traces.text import printable

_OFFSET: Final = re.compile(r"([+-]?)(\d{1,12})(?:\.(\d{1,9}))?")


@dataclass(frozen=True)
class GuestFile:
    """A file recorded inside a guest.

    `vm` is None where nobody said which VM's guest that is; `offset` is in ns, None where it was not given.
    """

    path: Path
    vm: int | None
    offset: int | None


def offset_of(text: str) -> int | None:
    """Parse `--guest-offset`, in seconds, and return ns; None where it is empty. Raises Problem."""
    if not text:
        return None
    match = _OFFSET.fullmatch(text)
    if match is None:
        raise Problem(f"--guest-offset {printable(text)}: give seconds to be added to the guest's times, such as -12.5")
    ns = int(match[2]) * 10**9 + int((match[3] or "").ljust(9, "0"))
    return -ns if match[1] == "-" else ns


def guest_file(guest: str, guest_offset: str) -> GuestFile | None:
    """Parse `--guest [VM=]FILE` and `--guest-offset SECONDS`; None without a guest. Raises Problem."""
    offset = offset_of(guest_offset)
    if not guest:
        if offset is not None:
            raise Problem("--guest-offset: there is no guest: give --guest FILE as well")
        return None
    vm, equals, path = guest.partition("=")
    if equals and vm.isascii() and vm.isdigit() and path:
        return GuestFile(Path(path), int(vm), offset)
    return GuestFile(Path(guest), None, offset)


def use_guest(recording: Recording, given: GuestFile | None) -> list[str]:
    """Combine a guest's recording with the host's, and return notes on it. Raises Problem."""
    if given is None:
        return []
    ids = [int(vm["id"]) for vm in recording.metadata.vms]
    vm = given.vm if given.vm is not None else ids[0] if len(ids) == 1 else None
    if vm is None:
        raise Problem(
            f"--guest {given.path}: {recording.path} has {len(ids)} VMs: say whose guest it is, as 1={given.path}"
        )
    if vm not in ids:
        raise Problem(f"--guest {vm}={given.path}: no VM {vm} in {recording.path}")
    from traces.imports.guest_switches import read_guest

    tasks = read_guest(given.path, given.offset)
    first, last = recording.metadata.spans.get(vm, recording.span)
    if tasks.last < first or tasks.first > last:
        spans = " and ".join(
            f"from {a / 1e9:.6f} s to {b / 1e9:.6f} s" for a, b in ((tasks.first, tasks.last), (first, last))
        )
        raise Problem(
            f"--guest {given.path}: it and VM {vm} of {recording.path} have no time in common ({spans}): "
            "--guest-offset gives the seconds to be added to the guest's times"
        )
    recording.guest = GuestOfVm(vm, tasks)
    return [f"tasks of VM {vm}'s guest, from {given.path}: {tasks.how}"]
