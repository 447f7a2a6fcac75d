"""What was there before the recording began: VMs, vCPUs, memory slots and live roots, read by a BPF task/file iterator.

A host with a stalled VM has no ioctl left to watch: its slots were set at boot and its vCPU threads sit in KVM_RUN. The
iterator (bpf_iter, 5.8+) walks every open KVM file once, tells userspace what it found, and tells the probes' own thread
table which thread is which vCPU. It reads only.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import ENVIRONMENT, Problem

FUNCTION = "bpf_iter__task_file"
CHAIN = 8  # slots looked at per bucket of the id hash (128 buckets): sequential ids spread evenly
ROOT_STEPS = 16

_VM, _VCPU, _SLOT, _ROOT = 1, 2, 3, 4
_RECORD = np.dtype([("type", "u4"), ("tgid", "u4"), ("kvm", "u8"), ("a", "u8"), ("b", "u8"), ("c", "u8"), ("x", "u4"),
                    ("y", "u4")])  # fmt: skip

PROGRAM = r"""
struct iter_context {
    struct iter_meta { void *seq; u64 session; u64 number; } *meta;
    u64 task;
    u32 fd;
    u32 pad;
    u64 file;
};
struct found { u32 type, tgid; u64 kvm, a, b, c; u32 x, y; };

#define TELL(...) do { struct found f = {__VA_ARGS__}; bpf_seq_write(seq, &f, sizeof(f)); } while (0)
#define SLOT_AT(slot) TELL(3, tgid, kvm, read64((slot) + OFF_SLOT_GFN), read64((slot) + OFF_SLOT_PAGES), \
    read64((slot) + OFF_SLOT_HVA), read32((slot) + OFF_SLOT_FLAGS), (read32((slot) + OFF_SLOT_ID) & 0xffff) | (space << 16))

int bpf_iter__task_file(struct iter_context *ctx)
{
    void *seq = ctx->meta->seq;
    u64 task = ctx->task, file = ctx->file;
    struct config *c = config();
    if (c && !c->page_offset) {
#ifdef HAVE_PAGE_OFFSET_BASE
        c->page_offset = read64(PAGE_OFFSET_BASE);
#endif
#ifdef HAVE_VMEMMAP_BASE
        c->vmemmap = read64(VMEMMAP_BASE);
#endif
    }
    if (!task || !file)
        return 0;
    int what = file_kind(file);
    if (!what)
        return 0;
    u64 owner = read64(file + OFF_FILE_PRIVATE);
    u32 tgid = read32(task + OFF_TASK_TGID);
    if (!owner)
        return 0;
    if (what == FILE_VCPU) {
        u64 kvm = read64(owner + OFF_VCPU_KVM), pid = read64(owner + OFF_VCPU_PID);
        u32 id = read32(owner + OFF_VCPU_ID), tid = pid ? read32(pid + OFF_PID_NR) : 0;
        TELL(2, tgid, kvm, owner, vcpu_root(owner), vcpu_role(owner), id, tid);
        if (tid) {
            struct thread t = {};
            t.kvm = kvm;
            t.vcpu = owner;
            t.tgid = tgid;
            t.vcpu_id = id;
            threads.update(&tid, &t);
        }
        return 0;
    }
    u64 kvm = owner;
#ifdef FILTER_TGID
    if (tgid == FILTER_TGID) {
        u8 yes = 1;
        wanted.update(&kvm, &yes);
    }
#endif
    TELL(1, tgid, kvm, ctx->fd, 0, 0, 0, 0);
#ifdef HAVE_KVM_ROOTS
    u64 head = kvm + OFF_KVM_ROOTS, node = read64(head);
    for (int i = 0; i < %(root_steps)d && node && node != head; i++) {
        TELL(4, tgid, kvm, SP_TABLE(node), 0, 0, SP_ROLE_OF(node), SP_REFS_OF(node));
        node = read64(node);
    }
#endif
#ifdef HAVE_KVM_MEMSLOTS
    for (u64 space = 0; space < 2; space++) {
        u64 slots = read64(kvm + OFF_KVM_MEMSLOTS + 8 * space);
        if (!slots)
            break;
#ifdef HAVE_SLOTS_HASH
        u64 index = read32(slots + OFF_SLOTS_NODE) & 1;
        for (u64 bucket = 0; bucket < 128; bucket++) {
            u64 slot = read64(slots + OFF_SLOTS_HASH + 8 * bucket);
            for (int i = 0; i < %(chain)d && slot; i++) {
                SLOT_AT(slot - OFF_SLOT_NODE - 16 * index);
                slot = read64(slot);
            }
        }
#elif defined(HAVE_SLOTS_USED)
        u32 used = read32(slots + OFF_SLOTS_USED);
        for (u32 i = 0; i < 128 && i < used; i++)
            SLOT_AT(slots + OFF_SLOTS_ARRAY + i * OFF_SLOT_STRUCT_SIZE);
#endif
    }
#endif
    return 0;
}
""" % {
    "root_steps": ROOT_STEPS,
    "chain": CHAIN,
}


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
    """{"vms": [{kvm, tgid, comm, fd, vcpus, slots, roots}]}: each VM alive now. Frames as in the trace's `table` column."""
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
