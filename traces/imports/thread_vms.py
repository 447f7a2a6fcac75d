# SPDX-License-Identifier: Apache-2.0
"""Which VM and which vCPU each thread of a text is: by what the text names, else by what is likeliest, and said so.

A text names threads, seldom their process, and no VM. A thread that enters a guest is a vCPU's. Its number is in the
event's text from 5.x on, or in the thread's name. Its VM is its process, where that is given; else VMs are separated
by vCPU numbers that come twice, as a VMM makes its vCPUs' threads one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.text import count

_VCPU_NAMES: Final = re.compile(r"(?:CPU (\d{1,5})/KVM|fc_vcpu (\d{1,5})|.*vcpu[ :_-]?(\d{1,5}))")
_MOST_VCPUS: Final = 0x7FFF


@dataclass
class TextThread:
    """A thread of the text. `tgid` 0 and `vcpu` None: not known; `guest`: it ran one; `acted`: it has events of KVM."""

    tid: int
    comm: str
    tgid: int
    vcpu: int | None
    guest: bool
    acted: bool = True


@dataclass
class Machine:
    """A VM as far as it is known."""

    name: str = ""
    tgid: int = 0
    threads: list[TextThread] = field(default_factory=list)

    @property
    def comm(self) -> str:
        return self.threads[0].comm if self.threads else ""


@dataclass(frozen=True)
class Assigned:
    """By thread, sorted by `tids`: the number of its VM (from 1 on; 0: none), its vCPU (-1: none), its process."""

    machines: tuple[Machine, ...]
    tids: NDArray[np.int64]
    vm: NDArray[np.int64]
    vcpu: NDArray[np.int64]
    tgid: NDArray[np.int64]
    comms: Mapping[int, str]
    inferred: tuple[str, ...]

    def of(self, tid: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """VM, vCPU and process of each row's thread."""
        if not len(self.tids):
            none = np.zeros(len(tid), np.int64)
            return none, none - 1, none
        at = np.minimum(np.searchsorted(self.tids, tid), len(self.tids) - 1)
        known = self.tids[at] == tid
        return (
            np.where(known, self.vm[at], 0),
            np.where(known, self.vcpu[at], -1),
            np.where(known, self.tgid[at], 0),
        )


def threads_of(seen: Iterable[tuple[int, bytes, int, int, bool, bool]]) -> list[TextThread]:
    """The threads of a source: number, name, process (0: unknown), vCPU (-1: unknown), whether it runs a guest, whether
    it has an event of KVM.
    """
    found = []
    for tid, comm, tgid, vcpu, guest, acted in seen:
        text = comm.decode(errors="replace").strip()
        match = _VCPU_NAMES.fullmatch(text)
        number = vcpu if vcpu >= 0 else int(next(n for n in match.groups() if n)) if match else None
        if number is not None and number > _MOST_VCPUS:
            number = None
        runs = guest or (acted and bool(match))
        found.append(TextThread(tid, "" if text == "<...>" else text, max(tgid, 0), number, runs, acted))
    return sorted(found, key=lambda thread: thread.tid)


def _tell(thread: TextThread) -> str:
    return f" (--vm-of {thread.tid}=NAME says of a thread whose it is)"


def assign(threads: Sequence[TextThread], vm_of: Mapping[int, str]) -> Assigned:
    """Group the threads that run guests into VMs, and number their vCPUs; `vm_of` names VMs by a thread of theirs."""
    machines: list[Machine] = []
    by_key: dict[object, Machine] = {}
    inferred: list[str] = []
    guessed: Machine | None = None
    guests = [thread for thread in threads if thread.guest or thread.tid in vm_of]
    names = {thread.tgid: vm_of[thread.tid] for thread in guests if thread.tgid and thread.tid in vm_of}
    loose = 0
    again: dict[int, int] = {}  # by process: first vCPUs so far
    for thread in guests:
        name = vm_of.get(thread.tid) or names.get(thread.tgid, "")
        key: object = ("name", name) if name else thread.tgid
        if key and not name:  # vCPU 0 is never taken out of a VM: the next thread of that number is another VM's
            again[thread.tgid] = again.get(thread.tgid, 0) + (thread.vcpu == 0)
            key = (thread.tgid, max(again[thread.tgid], 1))
        if key:
            machine = by_key.get(key)
            if machine is None:
                machine = by_key[key] = Machine(name, thread.tgid)
                machines.append(machine)
        else:
            loose += 1
            taken = {other.vcpu for other in guessed.threads} if guessed is not None else set()
            if guessed is None or (thread.vcpu is not None and thread.vcpu in taken):
                guessed = Machine()
                machines.append(guessed)
            machine = guessed
        machine.threads.append(thread)
    unnumbered = 0
    for machine in machines:
        used = {thread.vcpu for thread in machine.threads}
        for thread in machine.threads:
            if thread.vcpu is None:
                unnumbered += 1
                thread.vcpu = next(number for number in range(_MOST_VCPUS) if number not in used)
                used.add(thread.vcpu)
    if loose:
        many, tell = (f"{len(machines)} VMs", _tell(guests[-1])) if len(machines) > 1 else ("one VM", "")
        unnamed = count(loose, "vCPU thread")
        inferred.append(f"VMs: no process is named for {unnamed}; taken for {many} by their vCPUs' numbers{tell}")
    if any(machine.tgid for machine in machines):
        inferred.append("VMs: each process that runs vCPUs is taken for one VM, as long as one thread is its vCPU 0")
    if unnumbered:
        inferred.append(
            f"vCPUs: {count(unnumbered, 'thread')} without a number in the text; numbered in the threads' order"
        )
    number_of = {id(thread): index + 1 for index, machine in enumerate(machines) for thread in machine.threads}
    several = {tgid: firsts for tgid, firsts in again.items() if firsts > 1}
    of_process = {machine.tgid: index + 1 for index, machine in enumerate(machines) if machine.tgid}
    of_process |= dict.fromkeys(several, 0)  # whose VM another thread of theirs works for is not shown
    for tgid, firsts in several.items():
        tell = _tell(next(thread for thread in guests if thread.tgid == tgid))
        inferred.append(f"VMs: {firsts:,} threads of process {tgid} are a vCPU 0: taken for as many VMs{tell}")
    alone = 1 if len(machines) == 1 else 0
    if alone and any(thread.acted and id(thread) not in number_of for thread in threads):
        inferred.append("VMs: what other threads did is taken for the only VM's")
    vm = [number_of.get(id(t)) or of_process.get(t.tgid, alone) for t in threads]
    return Assigned(
        tuple(machines),
        np.array([t.tid for t in threads], np.int64),
        np.array(vm, np.int64),
        np.array([t.vcpu if id(t) in number_of and t.vcpu is not None else -1 for t in threads], np.int64),
        np.array([t.tgid for t in threads], np.int64),
        {t.tid: t.comm for t in threads if t.comm},
        tuple(inferred),
    )
