# SPDX-License-Identifier: Apache-2.0
"""How VMs and vCPUs are called: the id in the recording, the process, and the name that its owner gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from traces.metadata import Metadata
from traces.text import printable, some
from traces.untrusted import text_at


class VmNames:
    """The names of one recording's VMs and threads. They come from other programs and are made printable here."""

    def __init__(self, meta: Metadata) -> None:
        self._vms: dict[int, Mapping[str, Any]] = {int(vm["id"]): vm for vm in meta.vms}
        self._threads = {thread["tid"]: thread for thread in meta.threads if isinstance(thread.get("tid"), int)}

    def process(self, vm: int | None) -> str:
        """Return the process that owns a VM, as `guest1, qemu-system-x86 4242`, or as much as is known of that."""
        found = self._vms.get(vm) if vm is not None else None
        if found is None:
            return ""
        process = " ".join(filter(None, (text_at(found, "comm"), str(found["pid"]) if found["pid"] else "")))
        return printable(", ".join(filter(None, (text_at(found, "name"), process))))

    def vm(self, vm: int) -> str:
        """Return a text such as `VM 5 (qemu-system-x86 4242)`."""
        process = self.process(vm)
        return f"VM {vm} ({process})" if process else f"VM {vm}"

    def vms(self, ids: Sequence[int]) -> str:
        """Return a text such as `VM 5 (qemu-system-x86 4242), VM 6 (...), VM 7 (...), and 8 more`."""
        return some([self.vm(vm) for vm in ids])

    def thread(self, vm: int | None, vcpu: int | None) -> str:
        """Return the name of a vCPU's thread, such as `CPU 0/KVM`; empty if it is that of the process.

        Of several threads that acted for a vCPU it is the last one: the first is often the one that created it.
        """
        found = self._vms.get(vm) if vm is not None else None
        tids = [each["tid"] for each in found["vcpus"] if each["id"] == vcpu] if found is not None else []
        if found is None or not tids:
            return ""
        comm = text_at(self._threads.get(tids[-1], {}), "comm")
        return "" if comm == text_at(found, "comm") else printable(comm)

    def vcpu(self, vm: int, vcpu: int) -> str:
        """Return a text such as `vCPU 0 (CPU 0/KVM) of VM 5 (qemu-system-x86 4242)`."""
        thread = self.thread(vm, vcpu)
        return f"vCPU {vcpu}{f' ({thread})' if thread else ''} of {self.vm(vm)}"

    def task(self, tid: int | None) -> str:
        """Return a thread's name and number, as `kworker/0:1 23`; the number alone where its name is not known."""
        if tid is None:
            return ""
        comm = text_at(self._threads.get(tid, {}), "comm")
        return printable(f"{comm} {tid}" if comm else str(tid))
