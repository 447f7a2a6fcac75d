/* SPDX-License-Identifier: Apache-2.0 */
/* Host time that a vCPU did not get: when its thread has no CPU, and since when it could have used one. */
#ifdef PREV_STATE
/* The vCPU thread that a task is, if it is one: what everybody else's switches cost is this. */
static __always_inline struct thread *vcpu_thread(u64 task)
{
    u32 tid = read32(task + OFF_TASK_TID);
    struct thread *t = tid ? threads.lookup(&tid) : 0;
    return t && t->own_vcpu && t->host_tgid == read32(task + OFF_TASK_TGID) ? t : 0;
}

int sched_switched(struct bpf_raw_tracepoint_args *ctx)
{
    u64 prev = ctx->args[1], next = ctx->args[2];
    struct thread *t = vcpu_thread(prev);
    if (t) {
        t->off_since = bpf_ktime_get_boot_ns();
        t->off_state = ctx->args[0] ? 0 : (u32)PREV_STATE(ctx, prev);
        t->runnable_since = t->off_state ? 0 : t->off_since;
    }
    t = vcpu_thread(next);
    if (!t || !t->off_since)
        return 1;
    struct event *e = reserve(t, KIND_sched_in, t->own_kvm);
    if (e) {
        fill(e, t->off_since, t->runnable_since ? e->time - t->runnable_since : 0, t->off_state, 0, 0, 0);
        e->flags = t->off_state == 0;
        submit(e);
    }
    t->off_since = 0;
    return 1;
}

int sched_woken(struct bpf_raw_tracepoint_args *ctx)
{
    struct thread *t = vcpu_thread(ctx->args[0]);
    if (t && t->off_since && !t->runnable_since)
        t->runnable_since = bpf_ktime_get_boot_ns();
    return 1;
}
#endif
