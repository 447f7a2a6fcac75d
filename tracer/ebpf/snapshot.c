/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The task iterator: every open KVM file once, sent to userspace as records of snapshot.py's layout. It takes no
 * reference to a file, as the iterator over files does: the last one would end the VM in the recorder's context. What is
 * read may therefore be freed meanwhile; snapshot.py looks twice.
 */
#define FDS 128
/* files reported at a time: the verifier goes through all that is done with each, at every start, a millisecond each */
#define FILES 16
/* slots looked at per bucket of the id hash (128 buckets): sequential ids spread evenly */
#define CHAIN 64
#define PART_BUCKETS 4
#define PART_SLOTS 64
struct iter_context {
    struct iter_meta { void *seq; u64 session; u64 number; } *meta;
    u64 task;
};
struct found { u32 type, tgid; u64 kvm, a, b, c; u32 x, y; char comm[16]; };

#define TELL(...) do { struct found f = {__VA_ARGS__}; bpf_seq_write(seq, &f, sizeof(f)); } while (0)
#define SLOT_AT(slot) \
    TELL(3, 0, kvm, read64((slot) + OFF_SLOT_GFN), read64((slot) + OFF_SLOT_PAGES), read64((slot) + OFF_SLOT_HVA), \
         read32((slot) + OFF_SLOT_FLAGS), (read32((slot) + OFF_SLOT_ID) & 0xffff) | (space << 16))

static __always_inline void learn(struct config *c)
{
    u64 pid = read64((u64)bpf_get_current_task() + OFF_TASK_PID); /* the recorder's own */
    if (!c->page_offset && c->page_offset_at)
        c->page_offset = read64(c->page_offset_at);
    if (!c->vmemmap && c->vmemmap_at)
        c->vmemmap = read64(c->vmemmap_at);
    c->pid_ns_level = read32(pid + OFF_PID_LEVEL);
    c->pid_ns = read64(pid + OFF_PID_NR + (u64)c->pid_ns_level * PID_NUMBER_SIZE + 8);
}

/* A vCPU's thread may sit in KVM_RUN since before the probes: what it does is its vCPU's. */
static __always_inline void prime(u64 vcpu, u64 kvm, u32 tid, u32 host_tid, u32 tgid, u32 host_tgid)
{
    struct thread fresh = {}, *t = threads.lookup(&host_tid);
    if (t && t->host_tgid == host_tgid && (t->own_vcpu || t->ioctl || t->kvm))
        return;
    fresh.kvm = fresh.own_kvm = kvm;
    fresh.vcpu = fresh.own_vcpu = vcpu;
    fresh.vcpu_id = fresh.own_id = vcpu_id(vcpu);
    fresh.own_since = bpf_ktime_get_boot_ns();
    fresh.tid = tid;
    fresh.tgid = tgid;
    fresh.host_tgid = host_tgid;
    threads.update(&host_tid, &fresh);
}

static __always_inline void tell_vcpu(void *seq, u64 vcpu, u32 tgid, u32 host_tgid)
{
    u64 kvm = vcpu_kvm(vcpu), pid = read64(vcpu + OFF_VCPU_PID);
    u32 host_tid = pid ? read32(pid + OFF_PID_NR) : 0, tid = host_tid ? number_here(pid, host_tid) : 0;
    TELL(2, tgid, kvm, vcpu, vcpu_root(vcpu), vcpu_role(vcpu), vcpu_id(vcpu), tid);
    if (tid)
        prime(vcpu, kvm, tid, host_tid, tgid, host_tgid);
}

static __always_inline void tell_vm(void *seq, u64 kvm, u32 tgid, u32 fd, u64 leader)
{
    struct found f = {.type = 1, .tgid = tgid, .kvm = kvm, .a = fd};
    bpf_probe_read_kernel(f.comm, sizeof(f.comm), (void *)(leader + OFF_TASK_COMM));
    bpf_seq_write(seq, &f, sizeof(f));
    struct config *c = config();
    if (c && c->filter_tgid && tgid == c->filter_tgid) {
        u8 yes = 1;
        wanted.update(&kvm, &yes);
    }
}

/* One VM's roots, and a part of its memory slots. */
static __always_inline void tell_contents(void *seq, u64 kvm, u32 part)
{
#ifdef HAVE_KVM_ROOTS
    u64 head = kvm + OFF_KVM_ROOTS, node = part ? 0 : read64(head);
    for (int i = 0; i < ROOT_STEPS && node && node != head; i++) {
        TELL(4, 0, kvm, SP_TABLE(node), 0, 0, SP_ROLE_OF(node), SP_REFS_OF(node));
        node = read64(node);
    }
#endif
#ifdef HAVE_KVM_MEMSLOTS
    u64 space = part >> 5, slots = read64(kvm + OFF_KVM_MEMSLOTS + 8 * space);
#ifdef HAVE_SLOTS_HASH
    u64 index = slots ? read32(slots + OFF_SLOTS_NODE) & 1 : 0;
    for (u32 i = 0; i < PART_BUCKETS && slots; i++) {
        u64 bucket = (part & 31) * PART_BUCKETS + i;
        u64 slot = read64(slots + OFF_SLOTS_HASH + 8 * bucket);
        for (int step = 0; step < CHAIN && slot; step++) {
            SLOT_AT(slot - OFF_SLOT_NODE - 16 * index);
            slot = read64(slot);
        }
    }
#elif defined(HAVE_SLOTS_USED)
    for (u32 i = 0; i < PART_SLOTS && slots; i++) {
        /* read anew each time: a bound in a register becomes one that 5.10's verifier cannot follow */
        u64 at = (u64)(part & 31) * PART_SLOTS + i;
        if (at >= read32(slots + OFF_SLOTS_USED))
            break;
        SLOT_AT(slots + OFF_SLOTS_ARRAY + at * OFF_SLOT_STRUCT_SIZE);
    }
#endif
#endif
}

int bpf_iter__task(struct iter_context *ctx)
{
    void *seq = ctx->meta->seq;
    u64 task = ctx->task;
    struct config *c = config();
    if (!task || !c)
        return 0;
    if (ctx->meta->number == 0)
        learn(c);
    if (c->look_at) {
        u64 kvm = c->look_at;
        if (ctx->meta->number == 0) {
            tell_contents(seq, kvm, c->part & 63);
            TELL(6); /* so that the reader need not wait for all tasks */
        }
        return 0;
    }
    u64 files = read64(task + OFF_TASK_FILES), leader = read64(task + OFF_TASK_LEADER);
    if (!files || (leader != task && read64(leader + OFF_TASK_FILES) == files))
        return 0;
    u64 table = read64(files + OFF_FILES_FDT);
    u32 host_tgid = read32(task + OFF_TASK_TGID), most = read32(table + OFF_FDT_MAX);
    u32 tgid = number_here(read64(leader + OFF_TASK_PID), host_tgid);
    u64 array = read64(table + OFF_FDT_FD);
    /* In the map, for the verifier would tell each value on the stack from every other. */
    c->files = 0;
    for (u32 i = 0; i < FDS; i++) {
        u32 fd = c->first_fd + i;
        if (fd >= most)
            break;
        u64 file = read64(array + 8ULL * fd);
        if (!file || !file_kind(file))
            continue;
        u32 place = c->files - c->part * FILES;
        if (place < FILES)
            c->file[place] = fd;
        c->files++;
    }
    for (u32 i = 0; i < FILES && c->part * FILES + i < c->files; i++) {
        u32 fd = c->file[i];
        u64 file = read64(array + 8ULL * fd), owner = file ? read64(file + OFF_FILE_PRIVATE) : 0;
        int what = owner ? file_kind(file) : FILE_OTHER;
        if (what == FILE_VCPU)
            tell_vcpu(seq, owner, tgid, host_tgid);
        else if (what)
            tell_vm(seq, owner, tgid, fd, leader);
    }
    if (c->files > (c->part + 1) * FILES)
        TELL(7); /* there are more among these descriptors */
    if (c->first_fd + FDS < most)
        TELL(5); /* there are more */
    return 0;
}
