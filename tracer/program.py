"""The BPF program, as C text for bcc: one small function per probe that fills one fixed-size record.

Counting comes before everything: a record is first counted as emitted, then reserved in the ring; if the ring refuses, it
is counted as lost, and the next record that fits on that CPU is preceded by a `gap` record. Counters are per CPU, and
added to atomically because a probe in an interrupt (RCU callbacks) may run between the two halves of an addition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from traces.schema import BY_NAME, RECORD_FIELDS, RECORD_SIZE
from tracer.layout import Layout
from tracer.probes import Point, Probe
from tracer.tracefs import Field

KIND_SLOTS = 64  # the gap mask is one bit a kind
MAX_THREADS = 65536
SNAPSHOT_SLOTS = 128  # memory slots reported per address space of a VM that was there before us

_CTYPES = {"u8": "u64", "u4": "u32", "i4": "s32", "u2": "u16", "i2": "s16", "u1": "u8"}

_TYPES = """
#define EMPTY_FRAME (~0ULL >> 12)
#define OWN_NAME_BYTES 8
struct event {
%(fields)s
};
struct thread {
    u64 kvm;       /* VM this thread works for: its vCPU's, or that of its last VM ioctl */
    u64 vcpu;      /* struct kvm_vcpu of a vCPU thread */
    u64 zap_root;  /* frame of the root that this thread is zapping */
    u64 zap_kvm;   /* VM of the zap: a worker thread has none of its own */
    u32 tgid;
    s32 vcpu_id;
    u32 ioctl;     /* KVM ioctl in progress, 0 none */
    u32 pad;
    char comm[16];
};
struct percpu {
    u64 emitted[64];
    u64 lost[64];
    u64 gap_count;
    u64 gap_kinds;
    u64 gap_since;
};
struct config {
    u64 page_offset;  /* start of the direct map: 0 where this kernel's symbols do not tell */
    u64 vmemmap;      /* start of the struct page array, the same */
};
BPF_RINGBUF_OUTPUT(events, %(ring_pages)d);
BPF_HASH(threads, u32, struct thread, %(max_threads)d);
BPF_PERCPU_ARRAY(counters, struct percpu, 1);
BPF_ARRAY(settings, struct config, 1);
BPF_HASH(wanted, u64, u8, 1024);
"""

_HELPERS = r"""
static __always_inline u64 read64(u64 at) { u64 v = 0; bpf_probe_read_kernel(&v, 8, (void *)at); return v; }
static __always_inline u32 read32(u64 at) { u32 v = 0; bpf_probe_read_kernel(&v, 4, (void *)at); return v; }
static __always_inline u8 read8(u64 at) { u8 v = 0; bpf_probe_read_kernel(&v, 1, (void *)at); return v; }
#define READ64(at) read64((u64)(at))

static __always_inline struct config *config(void) { int zero = 0; return settings.lookup(&zero); }

/* frame of a table from the kernel's address of it; the virtual frame where the direct map's base is unknown */
static __always_inline u64 frame_of(u64 address)
{
    struct config *c = config();
    if (!address || !c)
        return 0;
    return (c->page_offset ? address - c->page_offset : address) >> 12;
}

#ifdef HAVE_SP_ROLE
#define SP_ROLE_OF(sp) read32((u64)(sp) + OFF_SP_ROLE)
#define SP_GFN(sp) read64((u64)(sp) + OFF_SP_GFN)
#define SP_TABLE(sp) frame_of(read64((u64)(sp) + OFF_SP_SPT))
#define SP_REFS_OF(sp) ((s32)read32((u64)(sp) + OFF_SP_REFS))
#define SP_IS_TDP(sp) read8((u64)(sp) + OFF_SP_TDP)
#define SP_UNSYNC_OF(sp) (read8((u64)(sp) + OFF_SP_UNSYNC) & 1)
#else
#define SP_ROLE_OF(sp) 0
#define SP_GFN(sp) 0
#define SP_TABLE(sp) 0
#define SP_REFS_OF(sp) 0
#define SP_IS_TDP(sp) 0
#define SP_UNSYNC_OF(sp) 0
#endif

static __always_inline u64 vcpu_mmu(u64 vcpu) { return vcpu ? read64(vcpu + OFF_VCPU_MMU) : 0; }
static __always_inline u64 vcpu_root(u64 vcpu)
{
    u64 mmu = vcpu_mmu(vcpu);
    u64 frame = mmu ? read64(mmu + OFF_MMU_ROOT) >> 12 : 0;
    return frame == EMPTY_FRAME ? 0 : frame;
}
static __always_inline u32 vcpu_role(u64 vcpu) { u64 mmu = vcpu_mmu(vcpu); return mmu ? read32(mmu + OFF_MMU_ROLE) : 0; }
#define VCPU_ROOT(vcpu) vcpu_root((u64)(vcpu))
#define VCPU_ROLE(vcpu) vcpu_role((u64)(vcpu))
#define CURRENT_ROOT(self) vcpu_root((self)->vcpu)
#define CURRENT_ROLE(self) vcpu_role((self)->vcpu)
#define CHANGED_ROOT(self) ((self)->zap_root ? (self)->zap_root : (self)->zap_kvm ? 0 : vcpu_root((self)->vcpu))

/* A TDP root has no parent entry; a shadow page as high as its vCPU's root level is a root. */
static __always_inline u64 sp_root(u64 sp, struct thread *self)
{
#ifdef HAVE_SP_PTEP
    if (SP_IS_TDP(sp))
        return read64(sp + OFF_SP_PTEP) ? 0 : SP_TABLE(sp);
#endif
    u32 level = vcpu_role(self->vcpu) & 15;
    return level && (SP_ROLE_OF(sp) & 15) >= level ? SP_TABLE(sp) : 0;
}
#define SP_ROOT(sp, self) sp_root((u64)(sp), self)

/* struct kvm_mmu_page of a root given by its physical address: struct page keeps the pointer */
static __always_inline u64 hpa_sp(u64 hpa)
{
#if defined(HAVE_PAGE_PRIVATE) && defined(HAVE_SP_ROLE)
    struct config *c = config();
    u64 frame = hpa >> 12;
    if (c && c->vmemmap && frame && frame != EMPTY_FRAME)
        return read64(c->vmemmap + frame * OFF_PAGE_STRUCT_SIZE + OFF_PAGE_PRIVATE);
#endif
    return 0;
}
static __always_inline s32 hpa_refs(u64 hpa) { u64 sp = hpa_sp(hpa); return sp ? SP_REFS_OF(sp) : -1; }
static __always_inline u32 hpa_role(u64 hpa) { u64 sp = hpa_sp(hpa); return sp ? SP_ROLE_OF(sp) : 0; }
static __always_inline u8 hpa_tdp(u64 hpa) { u64 sp = hpa_sp(hpa); return sp ? SP_IS_TDP(sp) : 0; }
#define HPA_VALID(hpa) ((hpa) != ~0ULL && (hpa) != 0)
#define HPA_REFS(hpa) hpa_refs(hpa)
#define HPA_ROLE(hpa) hpa_role(hpa)
#define HPA_TDP(hpa) hpa_tdp(hpa)

/* What is known of the current thread; a thread met for the first time is remembered. Never fails: `local` stands in. */
static __always_inline struct thread *current_thread(struct thread *local)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tid = id, tgid = id >> 32;
    struct thread *self = threads.lookup(&tid);
    if (self && self->tgid == tgid)
        return self;
    local->tgid = tgid;
    local->vcpu_id = -1;
    bpf_get_current_comm(local->comm, sizeof(local->comm));
    threads.update(&tid, local);
    self = threads.lookup(&tid);
    return self ? self : local;
}

static __always_inline void remember_vcpu(struct thread *self, u64 vcpu)
{
    if (!vcpu || self->vcpu == vcpu)
        return;
    self->vcpu = vcpu;
    self->kvm = read64(vcpu + OFF_VCPU_KVM);
    self->vcpu_id = read32(vcpu + OFF_VCPU_ID);
}

static __always_inline struct event *reserve(struct thread *self, u8 kind, u64 kvm)
{
    int zero = 0;
    struct percpu *mine = counters.lookup(&zero);
    u64 now = bpf_ktime_get_boot_ns();
    struct event *e;
    if (!mine)
        return 0;
#ifdef FILTER_TGID
    u64 key = kvm;
    if (self->tgid == FILTER_TGID) {
        u8 yes = 1;
        if (kvm && !wanted.lookup(&key))
            wanted.update(&key, &yes);
    } else if (!kvm || !wanted.lookup(&key)) {
        return 0;
    }
#endif
    __sync_fetch_and_add(&mine->emitted[kind], 1);
    if (mine->gap_count) {
        e = events.ringbuf_reserve(sizeof(*e));
        if (e) {
            __builtin_memset(e, 0, sizeof(*e));
            e->time = now;
            e->w0 = mine->gap_count;
            e->w1 = mine->gap_kinds;
            e->w2 = mine->gap_since;
            e->cpu = bpf_get_smp_processor_id();
            e->vcpu = -1;
            mine->gap_count = 0;
            mine->gap_kinds = 0;
            events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
        }
    }
    e = events.ringbuf_reserve(sizeof(*e));
    if (!e) {
        if (!mine->gap_count)
            mine->gap_since = now;
        mine->gap_count++;
        mine->gap_kinds |= 1ULL << kind;
        __sync_fetch_and_add(&mine->lost[kind], 1);
        return 0;
    }
    e->time = now;
    e->kvm = kvm;
    e->kind = kind;
    u64 id = bpf_get_current_pid_tgid();
    e->tid = id;
    e->tgid = id >> 32;
    e->cpu = bpf_get_smp_processor_id();
    e->vcpu = self->vcpu_id;
    return e;
}
#define OWN_KVM(self) ((self)->zap_kvm ? (self)->zap_kvm : (self)->kvm)
"""

# ioctls: the syscall tracepoints, because they show the file descriptor's owner on every kernel without symbols of KVM's.
# KVM_RUN only tells which thread is which vCPU; its comings and goings are kvm_entry and kvm_exit.
_IOCTLS = r"""
#define KVMIO_TYPE 0xAE
#define NR_CREATE_VM 0x01
#define NR_SET_MEMORY 0x46
#define NR_SET_MEMORY2 0x49
#define NR_RUN 0x80
#define FILE_OTHER 0
#define FILE_VM 1
#define FILE_VCPU 2

static __always_inline u64 file_of(u32 fd)
{
    u64 task = (u64)bpf_get_current_task();
    u64 files = read64(task + OFF_TASK_FILES);
    u64 table = files ? read64(files + OFF_FILES_FDT) : 0;
    u64 array = table ? read64(table + OFF_FDT_FD) : 0;
    return array ? read64(array + 8ULL * fd) : 0;
}

/* anonymous inodes carry their kind as the name: "kvm-vm", "kvm-vcpu:0" */
static __always_inline int file_kind(u64 file)
{
    char name[OWN_NAME_BYTES] = {};
    u64 dentry = read64(file + OFF_FILE_DENTRY);
    u64 text = dentry ? read64(dentry + OFF_DENTRY_NAME) : 0;
    if (!text)
        return FILE_OTHER;
    bpf_probe_read_kernel(name, sizeof(name), (void *)text);
    if (name[0] != 'k' || name[1] != 'v' || name[2] != 'm' || name[3] != '-' || name[4] != 'v')
        return FILE_OTHER;
    return name[5] == 'm' && name[6] == 0 ? FILE_VM : name[5] == 'c' && name[6] == 'p' ? FILE_VCPU : FILE_OTHER;
}

int ioctl_enter(void *ctx)
{
    u32 fd = *(u64 *)((u8 *)ctx + 16), cmd = *(u64 *)((u8 *)ctx + 24);
    u64 arg = *(u64 *)((u8 *)ctx + 32);
    struct event *e;
    if (((cmd >> 8) & 0xff) != KVMIO_TYPE)
        return 0;
    struct thread local = {};
    struct thread *self = current_thread(&local);
    u64 file = file_of(fd);
    int what = file ? file_kind(file) : FILE_OTHER;
    u64 owner = what ? read64(file + OFF_FILE_PRIVATE) : 0;
    self->ioctl = 0;
    if (what == FILE_VCPU && (cmd & 0xff) == NR_RUN) {
        remember_vcpu(self, owner);
        return 0;
    }
    u64 kvm = what == FILE_VCPU ? read64(owner + OFF_VCPU_KVM) : what == FILE_VM ? owner : 0;
    if (kvm)
        self->kvm = kvm;
    self->ioctl = cmd;
#ifdef KIND_ioctl
    e = reserve(self, KIND_ioctl, kvm);
    if (e) {
        e->root = 0; e->w0 = cmd; e->w1 = arg; e->w2 = 0; e->w3 = 0; e->role = 0; e->n = 0;
        e->level = 0; e->flags = 0; e->as_id = 0;
        if (what == FILE_VCPU)
            e->vcpu = read32(owner + OFF_VCPU_ID);
        events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
    }
#endif
#ifdef KIND_memslot
    if (what == FILE_VM && ((cmd & 0xff) == NR_SET_MEMORY || (cmd & 0xff) == NR_SET_MEMORY2)) {
        struct { u32 slot, flags; u64 gpa, size, hva; } region = {};
        bpf_probe_read_user(&region, sizeof(region), (void *)arg);
        e = reserve(self, KIND_memslot, kvm);
        if (e) {
            e->root = 0; e->w0 = region.gpa >> 12; e->w1 = region.hva; e->w2 = region.size >> 12; e->w3 = region.flags;
            e->role = 0; e->n = region.slot & 0xffff; e->level = 0; e->flags = 0; e->as_id = region.slot >> 16;
            events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
        }
    }
#endif
    return 0;
}

int ioctl_leave(void *ctx)
{
    s64 ret = *(s64 *)((u8 *)ctx + 16);
    u32 tid = bpf_get_current_pid_tgid();
    struct thread *self = threads.lookup(&tid);
    struct event *e;
    if (!self || !self->ioctl)
        return 0;
    u32 cmd = self->ioctl;
    self->ioctl = 0;
    u64 kvm = self->kvm;
#ifdef KIND_vm_create
    if ((cmd & 0xff) == NR_CREATE_VM && ret >= 0) {
        u64 file = file_of(ret);
        kvm = file && file_kind(file) == FILE_VM ? read64(file + OFF_FILE_PRIVATE) : 0;
        self->kvm = kvm;
        self->vcpu = 0;
        self->vcpu_id = -1;
        e = reserve(self, KIND_vm_create, kvm);
        if (e) {
            e->root = 0; e->w0 = 0; e->w1 = 0; e->w2 = 0; e->w3 = 0; e->role = 0; e->n = 0;
            e->level = 0; e->flags = 0; e->as_id = 0;
            events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
        }
    }
#endif
#ifdef KIND_ioctl_end
    e = reserve(self, KIND_ioctl_end, kvm);
    if (e) {
        e->root = 0; e->w0 = cmd; e->w1 = 0; e->w2 = 0; e->w3 = 0; e->role = 0; e->n = ret;
        e->level = 0; e->flags = 0; e->as_id = 0;
        events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
    }
#endif
    return 0;
}
"""


@dataclass(frozen=True)
class Chosen:
    """A probe as it will be attached here: the point that holds on this kernel and, for a tracepoint, its fields."""

    probe: Probe
    point: Point
    how: str  # tp, raw, kprobe, kretprobe, fentry, fexit
    fields: Mapping[str, Field]

    @property
    def function(self) -> str:
        """Name of the C function; bcc wants its prefixes for fentry."""
        prefix = {"fentry": "kfunc__", "fexit": "kretfunc__"}.get(self.how)
        if prefix:
            return prefix + self.point.where
        return f"on_{self.probe.kind}_{self.how}_" + re.sub(r"\W", "_", self.point.where)


def _expand(expression: str, chosen: Chosen, arguments: int) -> str:
    """C text of a table expression: fields, arguments and return value in the way this attachment passes them."""

    def field(match: re.Match[str]) -> str:
        found = chosen.fields.get(match["name"])
        if found is None:
            return "0"
        return f"(*({found.ctype} *)((u8 *)ctx + {found.offset}))"

    def argument(match: re.Match[str]) -> str:
        index = match["index"]
        if chosen.how == "raw":
            return f"(((struct bpf_raw_tracepoint_args *)ctx)->args[{index}])"
        if chosen.how in ("fentry", "fexit"):
            return f"(((u64 *)ctx)[{arguments if index == 'ret' else index}])"
        if index == "ret":
            return "((u64)PT_REGS_RC((struct pt_regs *)ctx))"
        return f"((u64)PT_REGS_PARM{int(index) + 1}((struct pt_regs *)ctx))"

    expression = re.sub(r"\$(?P<optional>\??)(?P<name>\w+)", field, expression)
    return re.sub(r"@(?P<index>ret|\d)", argument, expression)


def _function(chosen: Chosen, arguments: int) -> str:
    kind = BY_NAME[chosen.probe.kind]
    point = chosen.point
    fill = {name: _expand(text, chosen, arguments) for name, text in point.fill.items()}
    slots = {f"w{i}": fill.get(column, "0") for i, column in enumerate(kind.words)}
    values = {
        "root": fill.get("root", "0"),
        **{f"w{i}": slots.get(f"w{i}", "0") for i in range(4)},
        "role": fill.get("role", "0"),
        "n": fill.get(kind.count, "0") if kind.count else "0",
        "level": fill.get("level", "0"),
        "flags": fill.get("flags", "0"),
        "as_id": fill.get("as_id", "0"),
    }
    vcpu = fill.get("vcpu")
    kvm = fill.get("kvm") or (f"read64((u64){vcpu} + OFF_VCPU_KVM)" if vcpu else "OWN_KVM(self)")
    lines = [
        f"int {chosen.function}(void *ctx)",
        "{",
        "    struct thread local = {};",
        "    struct thread *self = current_thread(&local);",
    ]
    if point.only_if:
        lines.append(f"    if (!({_expand(point.only_if, chosen, arguments)})) return 0;")
    if point.before:
        lines.append(f"    {_expand(point.before, chosen, arguments)}")
    lines += [f"    u64 kvm = {kvm};"]
    lines += [f"    u64 v_{name} = (u64)({text});" for name, text in values.items() if text != "0"]
    if vcpu:
        lines.append(f"    s16 id = (s16)read32((u64){vcpu} + OFF_VCPU_ID);")
    lines += [f"    struct event *e = reserve(self, {kind.code}, kvm);", "    if (e) {"]
    lines += [f"        e->{name} = {f'v_{name}' if text != '0' else '0'};" for name, text in values.items()]
    if vcpu:
        lines.append("        e->vcpu = id;")
    lines += ["        events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);", "    }"]
    if point.after:
        lines.append(f"    {_expand(point.after, chosen, arguments)}")
    return "\n".join([*lines, "    return 0;", "}", ""])


def program(
    chosen: list[Chosen],
    layout: Layout,
    kinds: frozenset[str],
    ring_bytes: int,
    snapshot: str,
    filter_tgid: int | None = None,
    arguments: Mapping[str, int] | None = None,
) -> str:
    """The whole C text. `arguments` gives the parameter count of each fexit function; `snapshot` is snapshot.py's part."""
    fields = "\n".join(f"    {_CTYPES[ctype]} {name};" for name, ctype in RECORD_FIELDS)
    parts = [
        "#include <uapi/linux/ptrace.h>",
        "#include <uapi/linux/bpf.h>",
        layout.defines(),
        f"#define FILTER_TGID {filter_tgid}" if filter_tgid is not None else "",
        *(f"#define KIND_{name} {BY_NAME[name].code}" for name in ("vm_create", "ioctl", "ioctl_end", "memslot")
          if name in kinds),
        _TYPES % {"fields": fields, "ring_pages": ring_bytes // 4096, "max_threads": MAX_THREADS},
        f"_Static_assert(sizeof(struct event) == {RECORD_SIZE}, \"record size\");",
        _HELPERS,
        _IOCTLS,
        snapshot,
        *(_function(c, (arguments or {}).get(c.point.where, 0)) for c in chosen),
    ]  # fmt: skip
    return "\n".join(parts)
