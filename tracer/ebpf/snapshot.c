/* The task/file iterator: every open KVM file once, told to userspace as records of snapshot.py's layout. */
#define ROOT_STEPS 16
/* slots looked at per bucket of the id hash (128 buckets): sequential ids spread evenly */
#define CHAIN 8
struct iter_context {
    struct iter_meta { void *seq; u64 session; u64 number; } *meta;
    u64 task;
    u32 fd;
    u32 pad;
    u64 file;
};
struct found { u32 type, tgid; u64 kvm, a, b, c; u32 x, y; };

#define TELL(...) do { struct found f = {__VA_ARGS__}; bpf_seq_write(seq, &f, sizeof(f)); } while (0)
#define SLOT_AT(slot) \
    TELL(3, tgid, kvm, read64((slot) + OFF_SLOT_GFN), read64((slot) + OFF_SLOT_PAGES), read64((slot) + OFF_SLOT_HVA), \
         read32((slot) + OFF_SLOT_FLAGS), (read32((slot) + OFF_SLOT_ID) & 0xffff) | (space << 16))

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
    for (int i = 0; i < ROOT_STEPS && node && node != head; i++) {
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
            for (int i = 0; i < CHAIN && slot; i++) {
                SLOT_AT(slot - OFF_SLOT_NODE - 16 * index);
                slot = read64(slot);
            }
        }
#elif defined(HAVE_SLOTS_USED)
        for (u32 i = 0; i < 128; i++) {
            /* read anew each time: a bound in a register becomes one that 5.10's verifier cannot follow */
            if (i >= read32(slots + OFF_SLOTS_USED))
                break;
            SLOT_AT(slots + OFF_SLOTS_ARRAY + i * OFF_SLOT_STRUCT_SIZE);
        }
#endif
    }
#endif
    return 0;
}
