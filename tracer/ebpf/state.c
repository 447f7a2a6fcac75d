/*
 * What the probes share: the rings, what is known of each thread, the counters, the settings. `struct event`, DECLARE_RINGS,
 * RINGS and MAX_THREADS come from program.py, the OFF_* and HAVE_* macros from layout.py.
 */
#define EMPTY_FRAME (~0ULL >> 12)
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
/* One ring for each CPU (or few CPUs): one ring for all is one spinlock for all. */
DECLARE_RINGS
BPF_ARRAY_OF_MAPS(rings, "ring0", RINGS);
BPF_HASH(threads, u32, struct thread, MAX_THREADS);
BPF_PERCPU_ARRAY(counters, struct percpu, 1);
BPF_ARRAY(settings, struct config, 1);
BPF_HASH(wanted, u64, u8, 1024);
