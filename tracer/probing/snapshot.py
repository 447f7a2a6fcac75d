# SPDX-License-Identifier: Apache-2.0
"""What existed before the recording began: VMs, vCPUs, memory slots and live roots, read by a BPF task iterator.

A host with a stalled VM makes no more ioctls that could be watched: its slots were set at boot and its vCPU threads sit
in KVM_RUN. The iterator (bpf_iter, 5.8+) walks every process's table of descriptors, tells userspace which are KVM's,
and tells the probes' own thread table which thread is which vCPU. It only reads, and holds nothing: a VM whose last
descriptor is closed meanwhile ends in its owner's context, as it would without us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tracer.probing import libbpf
from traces.errors import ENVIRONMENT, Problem

FUNCTION = "bpf_iter__task"
TARGET = "bpf_iter_task"  # the kernel function whose BTF id names the iterator

_VM, _VCPU, _SLOT, _ROOT, _MORE, _END, _MORE_HERE = 1, 2, 3, 4, 5, 6, 7
_RECORD = np.dtype([("type", "u4"), ("tgid", "u4"), ("kvm", "u8"), ("a", "u8"), ("b", "u8"), ("c", "u8"), ("x", "u4"),
                    ("y", "u4"), ("comm", "S16")])  # fmt: skip
_DESCRIPTORS = 128  # descriptors of each process that one pass looks at
_PARTS = 64  # of a VM's slots: 32 for each address space
_CHUNK = 1 << 16

Records = np.ndarray[Any, Any]
# Tells the iterator what to look for: a part of the files among the descriptors from `first_fd` on, or, if `vm` is not
# 0, a part of that VM's slots.
Ask = Callable[[int, int, int], None]  # first_fd, vm, part


@contextmanager
def _link(program_fd: int) -> Iterator[int]:
    try:
        link = libbpf.attach_iterator(program_fd)
    except OSError:
        raise Problem("cannot attach the snapshot iterator: this kernel has no bpf_iter (5.8+)", ENVIRONMENT) from None
    try:
        yield link
    finally:
        os.close(link)


def _pass(link: int, *, first_only: bool) -> Records:
    """Return what one pass of the iterator writes: over all tasks, or only at the first task."""
    try:
        stream = libbpf.iterate(link)
    except OSError as error:
        raise Problem(f"cannot read the snapshot iterator: bpf_iter refused ({error.strerror})", ENVIRONMENT) from None
    try:
        # A read continues over tasks until it has as many bytes as asked for; the next read begins with the rest.
        chunks = [os.read(stream, 1)] if first_only else []
        while chunk := os.read(stream, _CHUNK):
            chunks.append(chunk)
            if first_only:
                break
    finally:
        os.close(stream)
    return np.frombuffer(b"".join(chunks), dtype=_RECORD)


def take(program_fd: int, ask: Ask) -> dict[str, Any]:
    """Return the VMs alive now: {"vms": [{kvm, tgid, comm, fd, vcpus, slots, roots}]}.

    Frames are as in the `table` column.
    """
    with _link(program_fd) as link:
        vms = _descriptors(link, ask)
        for vm in vms.values():
            _contents(link, ask, vm)
        # What was read of a VM that ended meanwhile may be from memory that was reused.
        still = _descriptors(link, ask) if vms else {}
    return {"vms": [vm for kvm, vm in vms.items() if kvm in still]}


def _descriptors(link: int, ask: Ask) -> dict[int, dict[str, Any]]:
    """Return the VMs that some process has open, by address of their struct kvm, each with its vCPUs."""
    vms: dict[int, dict[str, Any]] = {}
    vcpus: dict[int, dict[tuple[int, int], dict[str, int]]] = {}
    first, part, more = 0, 0, True
    while more:
        ask(first, 0, part)
        records = _pass(link, first_only=False)
        for record in records:
            kvm, tgid = int(record["kvm"]), int(record["tgid"])
            a, b, c, x, y = (int(record[name]) for name in ("a", "b", "c", "x", "y"))
            # A descriptor shared by fork or passed on shows the same VM twice.
            if record["type"] == _VM and kvm not in vms:
                comm = bytes(record["comm"]).decode(errors="replace")
                vms[kvm] = {"kvm": kvm, "tgid": tgid, "comm": comm, "fd": a, "vcpus": [], "slots": [], "roots": []}
            elif record["type"] == _VCPU:
                vcpus.setdefault(kvm, {})[a, x] = {"id": x, "tid": y, "root": b, "role": c}
        more_here = bool((records["type"] == _MORE_HERE).any())
        more = more_here or bool((records["type"] == _MORE).any())
        first, part = (first, part + 1) if more_here else (first + _DESCRIPTORS, 0)
    for kvm, found in vcpus.items():
        if kvm in vms:
            vms[kvm]["vcpus"] = list(found.values())
    return vms


def _contents(link: int, ask: Ask, vm: dict[str, Any]) -> None:
    """Fill in a VM's memory slots and roots."""
    seen: set[tuple[int, ...]] = set()
    for part in range(_PARTS):
        ask(0, vm["kvm"], part)
        for record in _pass(link, first_only=True):
            a, b, c, x, y = (int(record[name]) for name in ("a", "b", "c", "x", "y"))
            key = (int(record["type"]), a, x, y)
            if key in seen:
                continue
            seen.add(key)
            if record["type"] == _SLOT:
                vm["slots"].append({"as_id": y >> 16, "slot": y & 0xFFFF, "gfn": a, "pages": b, "hva": c, "flags": x})
            elif record["type"] == _ROOT:
                vm["roots"].append({"table": a, "role": x, "refs": y})
