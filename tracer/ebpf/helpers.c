/* SPDX-License-Identifier: Apache-2.0 */
/* Reading the kernel's structs, knowing the current thread, and reserving a record that is counted first. */
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

#ifdef HAVE_KVM_USED_PAGES
#define KVM_USED(kvm) read64((u64)(kvm) + OFF_KVM_USED_PAGES)
#define KVM_GEN(kvm) read8((u64)(kvm) + OFF_KVM_GENERATION)
#else
#define KVM_USED(kvm) 0
#define KVM_GEN(kvm) 0
#endif

static __always_inline u64 vcpu_mmu(u64 vcpu) { return vcpu ? read64(vcpu + OFF_VCPU_MMU) : 0; }
static __always_inline u64 mmu_root(u64 mmu)
{
    u64 frame = mmu ? read64(mmu + OFF_MMU_ROOT) >> 12 : 0;
    return frame == EMPTY_FRAME ? 0 : frame;
}
static __always_inline u32 mmu_role(u64 mmu) { return mmu ? read32(mmu + OFF_MMU_ROLE) : 0; }
#define MMU_ROOT(mmu) mmu_root((u64)(mmu))
#define MMU_ROLE(mmu) mmu_role((u64)(mmu))
static __always_inline u64 vcpu_root(u64 vcpu) { return mmu_root(vcpu_mmu(vcpu)); }
static __always_inline u32 vcpu_role(u64 vcpu) { return mmu_role(vcpu_mmu(vcpu)); }
/*
 * Both at once, as whatever several expressions read of a struct: a call of bpf_probe_read_kernel() is 76 instructions,
 * however little it reads. Zeros where it cannot be read.
 */
struct mmu { u8 bytes[MMU_SPAN] __attribute__((aligned(8))); };
static __always_inline struct mmu vcpu_mmu_now(u64 vcpu)
{
    struct mmu now;
    u64 mmu = vcpu_mmu(vcpu);
    bpf_probe_read_kernel(&now, sizeof(now), (void *)(mmu ? mmu + MMU_FIRST : 0));
    return now;
}
static __always_inline u64 frame_in(struct mmu *now)
{
    u64 frame = *(u64 *)(now->bytes + OFF_MMU_ROOT - MMU_FIRST) >> 12;
    return frame == EMPTY_FRAME ? 0 : frame;
}
#define ROLE_IN(now) (*(u32 *)((now)->bytes + OFF_MMU_ROLE - MMU_FIRST))
#define VCPU_ROOT(vcpu) vcpu_root((u64)(vcpu))
#define VCPU_ROLE(vcpu) vcpu_role((u64)(vcpu))
/* The vCPU of the ioctl in progress is the one whose fault, load or exit an event inside of it is. */
#define CURRENT_ROOT(self) vcpu_root((self)->vcpu)
#define CURRENT_ROLE(self) vcpu_role((self)->vcpu)

/* Of the fault that the MMU handles (struct kvm_page_fault, 5.16+), all that tracepoints show of it. */
#ifdef HAVE_FAULT_CODE
struct fault { u8 bytes[FAULT_SPAN] __attribute__((aligned(8))); };
static __always_inline struct fault fault_at(u64 at)
{
    struct fault fault;
    bpf_probe_read_kernel(&fault, sizeof(fault), (void *)(at + FAULT_FIRST));
    return fault;
}
#define FAULT_MEMBER(type, name) (*(type *)(fault.bytes + OFF_FAULT_##name - FAULT_FIRST))
#define FAULT_ADDR FAULT_MEMBER(u64, ADDR)
#define FAULT_CODE (OFF_FAULT_CODE_SIZE == 8 ? FAULT_MEMBER(u64, CODE) : FAULT_MEMBER(u32, CODE))
#define FAULT_GFN FAULT_MEMBER(u64, GFN)
#define FAULT_LEVEL FAULT_MEMBER(u8, LEVEL)
#define FAULT_PFN FAULT_MEMBER(u64, PFN)
#endif
/* The page frame asked for, as kvm_mmu_spte_requested shows it. */
static __always_inline u64 asked_pfn(u64 pfn, u64 gfn, u32 level) { return pfn | (gfn & ((1ULL << (level - 1) * 9) - 1)); }

/* What SVM keeps in memory of a vCPU: its RIP, and in the VMCB, whose layout is the CPU's, why it left its guest. */
#ifdef HAVE_VCPU_RIP
#define VCPU_RIP(vcpu) read64((u64)(vcpu) + OFF_VCPU_RIP)
#ifdef HAVE_VCPU_PROTECTED
#define SHOWN_RIP(vcpu) (read8((u64)(vcpu) + OFF_VCPU_PROTECTED) ? 0 : VCPU_RIP(vcpu))
#endif
#endif
#define VMCB_EXIT 0x70
struct vmcb_exit { u64 code, info_1, info_2; };
static __always_inline struct vmcb_exit vmcb_exit(u64 vcpu)
{
    struct vmcb_exit exit;
    struct config *c = config();
    u64 vmcb = c ? read64(vcpu + c->svm_vmcb) : 0;
    bpf_probe_read_kernel(&exit, sizeof(exit), (void *)(vmcb + VMCB_EXIT));
    return exit;
}
/* What this thread is at work on decides the VM of an event that names none; 0 where it is at work on none. */
#define CONTEXT_KVM(self) \
    ((self)->notified ? (self)->notified : (self)->zap_kvm ? (self)->zap_kvm : (self)->ended ? (self)->ended : (self)->kvm)

static __always_inline s16 vcpu_id(u64 vcpu) { return vcpu ? (s16)read32(vcpu + OFF_VCPU_ID) : -1; }
static __always_inline u64 vcpu_kvm(u64 vcpu) { return vcpu ? read64(vcpu + OFF_VCPU_KVM) : 0; }

/* A struct kvm_mmu is one of two members of its vCPU. */
static __always_inline u64 mmu_vcpu(u64 mmu, u64 kvm)
{
#ifdef HAVE_VCPU_ROOT_MMU
    u64 vcpu = mmu - OFF_VCPU_ROOT_MMU;
    if (read64(vcpu + OFF_VCPU_KVM) == kvm)
        return vcpu;
    vcpu = mmu - OFF_VCPU_GUEST_MMU;
    if (read64(vcpu + OFF_VCPU_KVM) == kvm)
        return vcpu;
#endif
    return 0;
}
#define MMU_VCPU(mmu, kvm) mmu_vcpu((u64)(mmu), (u64)(kvm))

#ifdef HAVE_KVM_NOTIFIER
#define NOTIFIED(notifier) ((u64)(notifier) - OFF_KVM_NOTIFIER)
#endif

/*
 * The index of the thread's vCPU in the VM that an event is about; -1 where the thread is none of that VM's. A VM born
 * after the thread last ran its vCPU is not that vCPU's, even where it lies at the same address.
 */
static __always_inline s16 thread_vcpu(struct thread *self, u64 kvm)
{
    if (self->vcpu && (!kvm || self->kvm == kvm)) /* in an ioctl on a vCPU `kvm` is that vCPU's */
        return self->vcpu_id;
    if (!self->own_vcpu || (kvm && self->own_kvm != kvm))
        return -1;
    u64 key = self->own_kvm, *since = born.lookup(&key);
    return since && *since > self->own_since ? -1 : self->own_id;
}

/*
 * A TDP root has no parent entry; a shadow page as high as its vCPU's root level is a root. Before 5.12 the tracepoints
 * show no TDP root, and a child's level is one too high.
 */
static __always_inline u64 sp_root(u64 sp, struct thread *self)
{
    if (SP_IS_TDP(sp)) {
#ifdef HAVE_SP_PTEP
        if (!read64(sp + OFF_SP_PTEP))
            return SP_TABLE(sp);
#endif
        return 0;
    }
    u64 vcpu = self->vcpu ? self->vcpu : self->own_kvm == CONTEXT_KVM(self) ? self->own_vcpu : 0;
    u32 level = vcpu_role(vcpu) & 15;
    return level && (SP_ROLE_OF(sp) & 15) >= level ? SP_TABLE(sp) : 0;
}
#define SP_ROOT(sp, self) sp_root((u64)(sp), self)

/* The VM's only valid root of an address space; 0 where there are several, or none. */
#define ROOT_STEPS 16
static __always_inline u64 only_root(u64 kvm, u32 as_id)
{
    u64 found = 0;
#if defined(HAVE_KVM_ROOTS) && defined(HAVE_SP_ROLE)
    u64 head = kvm + OFF_KVM_ROOTS, sp = kvm ? read64(head) : 0;
    for (int i = 0; i < ROOT_STEPS && sp && sp != head; i++) {
        u32 role = SP_ROLE_OF(sp);
        if (!(role & ROLE_INVALID) && ROLE_SMM(role) == as_id) {
            if (found)
                return 0;
            found = SP_TABLE(sp);
        }
        sp = read64(sp);
    }
#endif
    return found;
}

/*
 * Whose tree a changed SPTE belongs to: that of the root being zapped, or reached in a loop over the roots; in a vCPU's
 * own ioctl the loaded root, if it is of that address space; else the only one that the VM has for it.
 */
static __always_inline u64 changed_root(struct thread *self, u32 as_id)
{
    if (self->zap_root)
        return self->zap_root;
    if (self->walk_root)
        return self->walk_root;
    if (self->vcpu && !self->notified) {
        struct mmu now = vcpu_mmu_now(self->vcpu);
        if (ROLE_SMM(ROLE_IN(&now)) == as_id)
            return frame_in(&now);
    }
    return only_root(CONTEXT_KVM(self), as_id);
}
#define CHANGED_ROOT(self, as_id) changed_root(self, as_id)

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
/* Frame of the root above a TDP page: each page's entry lies in its parent, down from a root's, which has none. */
#define MOST_LEVELS 5
static __always_inline u64 top_table(u64 sp)
{
#ifdef HAVE_SP_PTEP
    struct config *c = config();
    for (int i = 0; i < MOST_LEVELS && c && c->page_offset && sp && SP_IS_TDP(sp); i++) {
        u64 entry = read64(sp + OFF_SP_PTEP);
        if (!entry)
            return SP_TABLE(sp);
        sp = hpa_sp(entry - c->page_offset);
    }
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

/*
 * A thread's number in the recorder's pid namespace, which is what the user and /proc call it. One that is not visible
 * from there keeps the kernel's own number with a bit set that no number has.
 */
#define PID_OUTSIDE (1u << 30)
#define PID_NUMBER_SIZE 16
static __always_inline u32 number_here(u64 pid, u32 number)
{
    struct config *c = config();
    if (!c || !c->pid_ns_level)
        return number;
    u64 mine = pid + OFF_PID_NR + (u64)c->pid_ns_level * PID_NUMBER_SIZE;
    if (pid && read32(pid + OFF_PID_LEVEL) >= c->pid_ns_level && read64(mine + 8) == c->pid_ns)
        return read32(mine);
    return number | PID_OUTSIDE;
}

/* What is known of the current thread; a thread met for the first time is remembered. Never fails: `local` stands in. */
static __always_inline struct thread *current_thread(struct thread *local)
{
    u64 id = bpf_get_current_pid_tgid();
    u32 tid = id, tgid = id >> 32;
    struct thread *self = threads.lookup(&tid);
    if (self && self->host_tgid == tgid)
        return self;
    __builtin_memset(local, 0, sizeof(*local)); /* only now: it is 19 stores, and nearly every thread is known */
    u64 task = (u64)bpf_get_current_task();
    local->tid = number_here(read64(task + OFF_TASK_PID), tid);
    local->tgid = number_here(read64(read64(task + OFF_TASK_LEADER) + OFF_TASK_PID), tgid);
    local->host_tgid = tgid;
    bpf_get_current_comm(local->comm, sizeof(local->comm));
    threads.update(&tid, local);
    self = threads.lookup(&tid);
    return self ? self : local;
}

/* In an interrupt no thread is to blame; what cannot be attributed passes the filter. */
static __always_inline struct thread *nobody(struct thread *local)
{
    struct config *c = config();
    __builtin_memset(local, 0, sizeof(*local));
    if (c)
        local->tgid = c->filter_tgid;
    return local;
}

/* A KVM ioctl begins: whatever was in progress on this thread is over, also where its end was not seen. */
static __always_inline void begin_ioctl(struct thread *self, u64 kvm, u64 vcpu)
{
    self->kvm = kvm;
    self->vcpu = vcpu;
    self->vcpu_id = vcpu_id(vcpu);
    self->ioctl = 0;
    self->notified = self->ended = self->zap_kvm = self->zap_root = self->walk_root = 0;
}

/* The VM's creation is what makes its address a new VM's; see thread_vcpu. */
static __always_inline void vm_begins(struct thread *self, u64 kvm)
{
    u64 now = bpf_ktime_get_boot_ns();
    self->kvm = kvm;
    if (kvm)
        born.update(&kvm, &now);
}

static __always_inline void run_vcpu(struct thread *self)
{
    self->own_vcpu = self->vcpu;
    self->own_kvm = self->kvm;
    self->own_id = self->vcpu_id;
    self->own_since = bpf_ktime_get_boot_ns();
}

static __always_inline void submit(struct event *e) { bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP); }

static __always_inline struct event *reserve(struct thread *self, u8 kind, u64 kvm)
{
    int zero = 0;
    struct config *c = config();
    if (!c || !(c->kinds >> kind & 1))
        return 0;
    struct percpu *mine = counters.lookup(&zero);
    u64 now = bpf_ktime_get_boot_ns();
    u32 cpu = bpf_get_smp_processor_id();
    int index = cpu % RINGS;
    void *ring = rings.lookup(&index);
    struct event *e;
    if (!mine || !ring)
        return 0;
    if (c->filter_tgid) {
        u64 key = kvm;
        if (self->tgid == c->filter_tgid) {
            u8 yes = 1;
            if (kvm && !wanted.lookup(&key))
                wanted.update(&key, &yes);
        } else if (!kvm || !wanted.lookup(&key)) {
            return 0;
        }
    }
    __sync_fetch_and_add(&mine->emitted[kind], 1);
    if (mine->gap_count) {
        e = bpf_ringbuf_reserve(ring, sizeof(*e), 0);
        if (e) {
            __builtin_memset(e, 0, sizeof(*e));
            e->time = now;
            e->w0 = mine->gap_count;
            e->w1 = mine->gap_kinds;
            e->w2 = mine->gap_since;
            e->cpu = cpu;
            e->vcpu = -1;
            mine->gap_count = 0;
            mine->gap_kinds = 0;
            submit(e);
        }
    }
    e = bpf_ringbuf_reserve(ring, sizeof(*e), 0);
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
    e->tid = self->tid;
    e->tgid = self->tgid;
    e->cpu = cpu;
    e->vcpu = thread_vcpu(self, kvm);
    return e;
}
