/* SPDX-License-Identifier: Apache-2.0 */
/* Passes: one thread per vCPU, led through the passes by the main thread. */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static _Noreturn void guest_failed(const struct vcpu *vcpu, const char *what, unsigned long long number)
{
	struct kvm_regs regs = {0};

	ioctl(vcpu->fd, KVM_GET_REGS, &regs);
	fail(EXIT_GUEST_FAILED, "guest failed: vCPU %u in pass %u at rip 0x%llx: %s (%llu)", vcpu->index, vcpu->pass + 1,
	     (unsigned long long)regs.rip, what, number);
}

static bool mmio_ends_pass(struct vcpu *vcpu)
{
	const struct kvm_run *run = vcpu->run;
	const struct guest_program *program = &vcpu->vm->program;
	bool reads = program->ends == END_BY_POLLING || program->access != STORES;

	if ((!run->mmio.is_write && !reads) || run->mmio.phys_addr < HOLE_GPA || run->mmio.phys_addr >= DATA_GPA)
		guest_failed(vcpu, "access to an address that has no memory", run->mmio.phys_addr);
	vcpu->mmio_exits++;
	return program->ends == END_BY_POLLING || run->mmio.phys_addr == DOORBELL_GPA;
}

/* True where the exit ends the pass. Anything that the guest program cannot have done is a failure. */
static bool exit_ends_pass(struct vcpu *vcpu)
{
	const struct kvm_run *run = vcpu->run;
	enum pass_end ends = vcpu->vm->program.ends;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		if (run->io.direction != KVM_EXIT_IO_OUT || run->io.port != PASS_PORT)
			guest_failed(vcpu, "I/O on a port it does not use", run->io.port);
		vcpu->io_exits++;
		return true;
	case KVM_EXIT_MMIO:
		return mmio_ends_pass(vcpu);
	case KVM_EXIT_HLT:
		if (ends != END_BY_HALT || vcpu->vm->irqchip)
			guest_failed(vcpu, "a halt, exit reason", run->exit_reason);
		vcpu->halts++;
		usleep(HALTED_US); /* where a VMM waits for something to happen */
		return false;
	case KVM_EXIT_SHUTDOWN:
		if (ends != END_BY_TRIPLE_FAULT)
			guest_failed(vcpu, "triple fault, exit reason", run->exit_reason);
		vcpu->shutdowns++;
		reset_vcpu(vcpu);
		return true;
	case KVM_EXIT_INTERNAL_ERROR:
		if (ends != END_BY_LOST_IDT && ends != END_BY_FNSAVE)
			guest_failed(vcpu, "KVM internal error, suberror", run->internal.suberror);
		vcpu->internal_errors++;
		forget_exception(vcpu); /* KVM also queues #UD: the next try shall be the same, not a triple fault */
		return true;
	case KVM_EXIT_DIRTY_RING_FULL:
		vcpu->ring_full++;
		empty_ring(vcpu);
		return false;
	case KVM_EXIT_FAIL_ENTRY:
		guest_failed(vcpu, "entry failed, hardware reason", run->fail_entry.hardware_entry_failure_reason);
	default:
		guest_failed(vcpu, "unexpected exit reason", run->exit_reason);
	}
}

static bool run_ends_pass(struct vcpu *vcpu)
{
	uint64_t start = now_ns();
	int result = ioctl(vcpu->fd, KVM_RUN, 0), error = errno;

	vcpu->guest_ns += now_ns() - start;
	if (result == 0)
		return exit_ends_pass(vcpu);
	if (error == EINTR || error == EAGAIN)
		return false;
	if (error != EFAULT || !vcpu->vm->run->scenario->loses_memory)
		guest_failed(vcpu, strerror(error), (unsigned long long)error);
	vcpu->failed_runs++;
	return true;
}

static void run_pass(struct vcpu *vcpu)
{
	if (vcpu->smi_due) {
		if (ioctl(vcpu->fd, KVM_SMI, 0) < 0)
			fail(EXIT_NO_ABILITY, "KVM_SMI: %s", strerror(errno));
		vcpu->smi_due = false;
		vcpu->smis++;
	}
	while (!run_ends_pass(vcpu))
		;
	vcpu->pass++;
}

static void wait_for(sem_t *semaphore)
{
	while (sem_wait(semaphore) < 0 && errno == EINTR)
		;
}

static void *vcpu_thread(void *argument)
{
	struct vcpu *vcpu = argument;

	for (;;) {
		wait_for(&vcpu->go);
		if (vcpu->quit)
			return NULL;
		if (vcpu->errand != NULL)
			vcpu->errand(vcpu->vm->run, vcpu);
		else
			run_pass(vcpu);
		sem_post(&vcpu->done);
	}
}

/* Have a vCPU's own thread, which must be idle, do something else than a pass. */
void on_thread_of(struct vcpu *vcpu, void (*errand)(struct run *run, struct vcpu *vcpu))
{
	vcpu->errand = errand;
	sem_post(&vcpu->go);
	wait_for(&vcpu->done);
	vcpu->errand = NULL;
}

void start_thread(struct vcpu *vcpu)
{
	sigset_t all, old;
	int error;

	/* The alarm must reach the main thread, which waits where a signal finds it; a vCPU thread may be deep in KVM. */
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	sem_init(&vcpu->go, 0, 0);
	sem_init(&vcpu->done, 0, 0);
	error = pthread_create(&vcpu->thread, NULL, vcpu_thread, vcpu);
	if (error != 0)
		fail(EXIT_NO_ABILITY, "no thread for vCPU %u: %s", vcpu->index, strerror(error));
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void stop_threads(struct vm *vm)
{
	for (unsigned i = 0; i < vm->n_vcpus; i++) {
		struct vcpu *vcpu = &vm->vcpus[i];

		vcpu->quit = true;
		sem_post(&vcpu->go);
		pthread_join(vcpu->thread, NULL);
		sem_destroy(&vcpu->go);
		sem_destroy(&vcpu->done);
	}
}

static unsigned total_vcpus(const struct run *run)
{
	unsigned total = 0;

	for (unsigned v = 0; v < run->n_vms; v++)
		total += run->vms[v].n_vcpus;
	return total;
}

static struct vcpu *nth_vcpu(struct run *run, unsigned n)
{
	return &run->vms[n / run->options->vcpus].vcpus[n % run->options->vcpus];
}

bool all_done(struct run *run)
{
	for (unsigned n = 0; n < total_vcpus(run); n++) {
		int done = 0;

		sem_getvalue(&nth_vcpu(run, n)->done, &done);
		if (done == 0)
			return false;
	}
	return true;
}

/* One pass of every vCPU. In turns, so that racing faults on shared page tables cannot change the counts; at the
 * same time only where the scenario says so, and then not in the first pass, which fills the shared tables. */
static void one_pass(struct run *run, bool together)
{
	for (unsigned n = 0; n < total_vcpus(run); n++) {
		sem_post(&nth_vcpu(run, n)->go);
		if (!together)
			wait_for(&nth_vcpu(run, n)->done);
	}
	if (run->scenario->during != NULL)
		run->scenario->during(run);
	for (unsigned n = 0; together && n < total_vcpus(run); n++)
		wait_for(&nth_vcpu(run, n)->done);
}

static void count(struct run *run)
{
	struct tally *tally = &run->tally;

	for (unsigned n = 0; n < total_vcpus(run); n++) {
		const struct vcpu *vcpu = nth_vcpu(run, n);

		tally->guest_ns[n] += vcpu->guest_ns;
		tally->passes += run->scenario->guest.passes_in_guest ? run->options->loops : vcpu->pass;
		tally->smis += vcpu->smis;
		tally->io_exits += vcpu->io_exits;
		tally->mmio_exits += vcpu->mmio_exits;
		tally->halts += vcpu->halts;
		tally->shutdowns += vcpu->shutdowns;
		tally->internal_errors += vcpu->internal_errors;
		tally->failed_runs += vcpu->failed_runs;
	}
	tally->n_guest_ns = total_vcpus(run);
}

static void end_own_vm(struct run *run, struct vcpu *vcpu)
{
	(void)run;
	unmap_ram(vcpu->vm);
	destroy_vm(vcpu->vm);
}

/* Create the VMs, run their passes, destroy them. */
static void run_vms(struct run *run, unsigned passes)
{
	const struct scenario *scenario = run->scenario;
	uint64_t start = now_ns();

	if (scenario->one_mapping)
		map_all(run, (scenario->same_pages ? 1 : run->options->vcpus) * working_set_bytes(run));
	for (unsigned v = 0; v < run->n_vms; v++) {
		create_vm(run, &run->vms[v]);
		for (unsigned i = 0; i < run->vms[v].n_vcpus; i++)
			start_thread(&run->vms[v].vcpus[i]);
	}
	run->tally.setup_ns += now_ns() - start;
	start = now_ns();
	for (unsigned pass = 0; pass < passes; pass++) {
		if (pass > 0 && scenario->between != NULL)
			scenario->between(run, pass);
		one_pass(run, scenario->during != NULL || (scenario->together && pass > 0));
	}
	run->tally.wall_ns += now_ns() - start;
	count(run);
	/* In this order, since a thread gives its stack back when it ends, which a live VM's MMU notifiers would see. */
	if (scenario->one_mapping)
		unmap_all(run);
	for (unsigned v = 0; v < run->n_vms; v++) {
		if (scenario->ended_by_vcpu)
			on_thread_of(&run->vms[v].vcpus[0], end_own_vm);
		else
			destroy_vm(&run->vms[v]);
	}
	for (unsigned v = 0; v < run->n_vms; v++)
		stop_threads(&run->vms[v]);
}

void run_scenario(struct run *run)
{
	const struct scenario *scenario = run->scenario;

	run->kvm = open_kvm();
	run->memory_file = -1;
	if (run->options->how != NULL && strcmp(run->options->how, "process") == 0)
		run->memory_file = memfd_create("guest", MFD_CLOEXEC);
	make_settings(scenario);
	run->n_vms = scenario->n_vms > 0 ? scenario->n_vms : 1;
	if (scenario->vm_per_loop)
		for (unsigned i = 0; i < run->options->loops; i++)
			run_vms(run, 1);
	else
		run_vms(run, scenario->guest.passes_in_guest ? 1 : run->options->loops);
	put_settings_back();
}
