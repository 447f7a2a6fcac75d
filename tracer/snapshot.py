"""What was there before the recording began: VMs, vCPUs, memory slots and live roots, read by a BPF task/file iterator.

A host with a stalled VM has no ioctl left to watch: its slots were set at boot and its vCPU threads sit in KVM_RUN. The
iterator (bpf_iter, 5.8+) walks every open KVM file once, tells userspace what it found, and tells the probes' own
thread table which thread is which vCPU. It reads only.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import ENVIRONMENT, Problem

FUNCTION = "bpf_iter__task_file"

_VM, _VCPU, _SLOT, _ROOT = 1, 2, 3, 4
_RECORD = np.dtype([("type", "u4"), ("tgid", "u4"), ("kvm", "u8"), ("a", "u8"), ("b", "u8"), ("c", "u8"), ("x", "u4"),
                    ("y", "u4")])  # fmt: skip


def _comm(tgid: int) -> str:
    try:
        return Path(f"/proc/{tgid}/comm").read_text().strip()
    except OSError:
        return ""


def _run(library: Any, program_fd: int) -> bytes:
    """Everything one pass of the iterator writes."""
    library.bcc_iter_attach.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
    link = library.bcc_iter_attach(program_fd, None, 0)
    if link < 0:
        raise Problem("cannot attach the snapshot iterator: this kernel has no bpf_iter (5.8+)", ENVIRONMENT)
    try:
        stream = library.bcc_iter_create(link)
        if stream < 0:
            raise Problem("cannot read the snapshot iterator: bpf_iter refused", ENVIRONMENT)
        chunks = []
        try:
            while chunk := os.read(stream, 1 << 16):
                chunks.append(chunk)
        finally:
            os.close(stream)
    finally:
        os.close(link)
    return b"".join(chunks)


def take(library: Any, program_fd: int) -> dict[str, Any]:
    """{"vms": [{kvm, tgid, comm, fd, vcpus, slots, roots}]}: each VM alive now, frames as in the `table` column."""
    records = np.frombuffer(_run(library, program_fd), dtype=_RECORD)
    vms: dict[int, dict[str, Any]] = {}
    for record in records[records["type"] == _VM]:
        tgid = int(record["tgid"])
        vms.setdefault(int(record["kvm"]), {
            "kvm": int(record["kvm"]), "tgid": tgid, "comm": _comm(tgid), "fd": int(record["a"]),
            "vcpus": [], "slots": [], "roots": [],
        })  # fmt: skip
    seen: set[tuple[int, ...]] = set()
    for record in records[records["type"] != _VM]:
        # A descriptor shared by fork or passed on shows the same VM twice.
        key = tuple(int(record[name]) for name in ("type", "kvm", "a", "x", "y"))
        vm = vms.get(int(record["kvm"]))
        if vm is None or key in seen:
            continue
        seen.add(key)
        a, b, c, x, y = (int(record[name]) for name in ("a", "b", "c", "x", "y"))
        if record["type"] == _VCPU:
            vm["vcpus"].append({"id": x, "tid": y, "root": b, "role": c})
        elif record["type"] == _SLOT:
            vm["slots"].append({"as_id": y >> 16, "slot": y & 0xFFFF, "gfn": a, "pages": b, "hva": c, "flags": x})
        else:
            vm["roots"].append({"table": a, "role": x, "refs": y})
    return {"vms": list(vms.values())}
