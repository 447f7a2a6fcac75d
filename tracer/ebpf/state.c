/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the probes share: the rings, what is known of each thread, the counters, the settings. `struct event`, RINGS and
 * MAX_THREADS come from program.py, the OFF_* and HAVE_* macros from offsets.py.
 */
#define EMPTY_FRAME (~0ULL >> 12)
struct thread {
    u64 kvm;        /* VM of the ioctl in progress on a VM's or vCPU's descriptor, 0 outside of one */
    u64 vcpu;       /* struct kvm_vcpu of the vCPU ioctl in progress, KVM_RUN above all; 0 outside of one */
    u64 notified;   /* VM whose MMU notifier is running on this thread */
    u64 ended;      /* VM that this thread is emptying or destroying */
    u64 zap_kvm;    /* VM of the root that this thread is zapping: a worker thread is in no ioctl */
    u64 zap_root;   /* frame of that root */
    u64 walk_root;  /* frame of the root that a loop over the VM's roots has reached */
    u64 own_vcpu;   /* struct kvm_vcpu that this thread ran last: SPEC 4.4's vCPU of a thread */
    u64 own_kvm;    /* its VM */
    u64 own_since;  /* when the thread last entered KVM_RUN with it, boot ns */
    u64 off_since;  /* since when the thread has had no CPU, boot ns; 0 while it has one */
    u64 runnable_since; /* since when in that time it could use one; 0 while it sleeps */
    u32 off_state;  /* the task state that it left its CPU with */
    u32 pad2;
    u32 tid, tgid;  /* as the recorder's pid namespace numbers them, see number_here */
    u32 host_tgid;  /* as the kernel does */
    s32 own_id;
    s32 vcpu_id;    /* index of `vcpu` */
    u32 ioctl;      /* KVM ioctl in progress that is shown, 0 none */
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
/* Written by userspace, but for what the iterator learns; program.py has the same layout. */
struct config {
    u64 page_offset;  /* start of the direct map: 0 where this kernel's symbols do not tell */
    u64 vmemmap;      /* start of the struct page array, the same */
    u64 page_offset_at, vmemmap_at; /* the kernel's variables that hold them */
    u64 svm_vmcb;     /* where in a vCPU the pointer to its VMCB is; 0 without SVM */
    u64 kinds;        /* bit by kind: which rows are wanted */
    u64 pid_ns;       /* the recorder's pid namespace, and how far it is from the initial one */
    u32 pid_ns_level;
    u32 filter_tgid;  /* the only process whose VMs are wanted, 0 all */
    u64 look_at;      /* of the snapshot: this VM's slots and roots, or, where it is 0, */
    u32 first_fd;     /* descriptors from here on */
    u32 part;         /* as many of a VM's slots, or of the files found there, as one pass takes */
    u32 files, unused; /* found among the descriptors of the task that the iterator is at, and which they are */
    u32 file[16];
};
/*
 * One ring for each CPU (or few CPUs): one ring for all is one spinlock for all. Userspace makes them, like this template
 * but larger.
 */
BPF_RINGBUF_OUTPUT(ring, 1);
BPF_ARRAY_OF_MAPS(rings, "ring", RINGS);
BPF_HASH(threads, u32, struct thread, MAX_THREADS);
BPF_PERCPU_ARRAY(counters, struct percpu, 1);
BPF_ARRAY(settings, struct config, 1);
BPF_HASH(wanted, u64, u8, 1024);
/* when each VM was created that was seen to be: a struct kvm_vcpu or struct kvm may be another one by now */
BPF_TABLE("lru_hash", u64, u64, born, 4096);
