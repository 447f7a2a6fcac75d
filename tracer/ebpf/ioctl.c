/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ioctls, from the syscall tracepoints: they show the descriptor's owner on every kernel, without symbols of KVM's.
 * KVM_RUN only tells which thread is which vCPU; its comings and goings are kvm_entry and kvm_exit.
 */
#define NAME_VM 0x006d762d6d766bULL   /* "kvm-vm" and its end, as a little-endian word */
#define NAME_VCPU 0x757063762d6d766bULL /* "kvm-vcpu" */
#define KVMIO_TYPE 0xAE
#define NR_CREATE_VM 0x01
#define NR_SET_MEMORY 0x46
#define NR_SET_MEMORY2 0x49
#define NR_RUN 0x80
#define FILE_OTHER 0
#define FILE_VM 1
#define FILE_VCPU 2

static __always_inline void fill(struct event *e, u64 w0, u64 w1, u64 w2, u64 w3, s32 n, u8 as_id)
{
    e->root = 0;
    e->w0 = w0;
    e->w1 = w1;
    e->w2 = w2;
    e->w3 = w3;
    e->role = 0;
    e->n = n;
    e->level = 0;
    e->flags = 0;
    e->as_id = as_id;
}

static __always_inline u64 file_of(u32 fd)
{
    u64 task = (u64)bpf_get_current_task();
    u64 files = read64(task + OFF_TASK_FILES);
    u64 table = files ? read64(files + OFF_FILES_FDT) : 0;
    u64 array = table ? read64(table + OFF_FDT_FD) : 0;
    return array ? read64(array + 8ULL * fd) : 0;
}

/* anonymous inodes carry their kind as the name: "kvm-vm", "kvm-vcpu:0"; others begin like them: "kvm-vm-stats" */
static __always_inline int file_kind(u64 file)
{
    u64 name = 0;
    u64 dentry = read64(file + OFF_FILE_DENTRY);
    u64 text = dentry ? read64(dentry + OFF_DENTRY_NAME) : 0;
    if (!text)
        return FILE_OTHER;
    bpf_probe_read_kernel(&name, sizeof(name), (void *)text);
    if ((name & 0x00ffffffffffffffULL) == NAME_VM)
        return FILE_VM;
    return name == NAME_VCPU ? FILE_VCPU : FILE_OTHER;
}

int ioctl_enter(void *ctx)
{
    u32 fd = *(u64 *)((u8 *)ctx + 16), cmd = *(u64 *)((u8 *)ctx + 24);
    u64 arg = *(u64 *)((u8 *)ctx + 32);
    struct event *e;
    if (((cmd >> 8) & 0xff) != KVMIO_TYPE)
        return 1;
    struct thread local;
    struct thread *self = current_thread(&local);
    u64 file = file_of(fd);
    int what = file ? file_kind(file) : FILE_OTHER;
    u64 owner = what ? read64(file + OFF_FILE_PRIVATE) : 0;
    u64 kvm = what == FILE_VCPU ? vcpu_kvm(owner) : what == FILE_VM ? owner : 0;
    begin_ioctl(self, kvm, what == FILE_VCPU ? owner : 0);
    if (what == FILE_VCPU && (cmd & 0xff) == NR_RUN) {
        run_vcpu(self);
        return 1;
    }
    self->ioctl = cmd;
    e = reserve(self, KIND_ioctl, kvm);
    if (e) {
        fill(e, cmd, arg, 0, 0, 0, 0);
        submit(e);
    }
    if (what == FILE_VM && ((cmd & 0xff) == NR_SET_MEMORY || (cmd & 0xff) == NR_SET_MEMORY2)) {
        struct { u32 slot, flags; u64 gpa, size, hva; } region = {};
        bpf_probe_read_user(&region, sizeof(region), (void *)arg);
        e = reserve(self, KIND_memslot, kvm);
        if (e) {
            fill(e, region.gpa >> 12, region.hva, region.size >> 12, region.flags, region.slot & 0xffff, region.slot >> 16);
            submit(e);
        }
    }
    return 1;
}

int ioctl_leave(void *ctx)
{
    s64 ret = *(s64 *)((u8 *)ctx + 16);
    u32 tid = bpf_get_current_pid_tgid();
    struct thread *self = threads.lookup(&tid);
    struct event *e;
    if (!self)
        return 1;
    u32 cmd = self->ioctl;
    int creation = cmd && (cmd & 0xff) == NR_CREATE_VM;
    if (creation && !self->kvm && ret >= 0) {
        u64 file = file_of(ret);
        vm_begins(self, file && file_kind(file) == FILE_VM ? read64(file + OFF_FILE_PRIVATE) : 0);
        e = reserve(self, KIND_vm_create, self->kvm);
        if (e) {
            fill(e, 0, 0, 0, 0, 0, 0);
            submit(e);
        }
    }
    u64 kvm = self->kvm;
    e = cmd ? reserve(self, KIND_ioctl_end, kvm) : 0;
    if (e) {
        fill(e, cmd, 0, 0, 0, ret, 0);
        submit(e);
    }
    e = creation && kvm && ret < 0 ? reserve(self, KIND_vm_destroy, kvm) : 0; /* begun and given up */
    if (e) {
        fill(e, 0, 0, 0, 0, 0, 0);
        submit(e);
    }
    begin_ioctl(self, 0, 0);
    return 1;
}
