/* SPDX-License-Identifier: Apache-2.0 */
/* What the scenarios do while the vCPUs run. */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAUSE_US 1000u     /* between changes: enough for the guest to fault in what was taken from it */
#define MSI_ADDRESS 0xfee00000u

static void give_away(struct run *run)
{
	struct vm *vm = &run->vms[0];

	if (madvise(host_address(vm, DATA_GPA), vm->data_size, MADV_DONTNEED) < 0)
		fail(EXIT_GUEST_FAILED, "madvise: %s", strerror(errno));
	run->tally.host_calls++;
}

/* Another process, which has the guest's memory as a file and takes the data slot's pages out of it again and again. */
void start_other(struct run *run, struct vm *vm)
{
	off_t data = host_address(vm, DATA_GPA) - vm->mapping;

	if (run->memory_file < 0)
		return;
	run->other = fork();
	if (run->other < 0)
		fail(EXIT_NO_ABILITY, "no other process: %s", strerror(errno));
	if (run->other == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (run->other == 0) {
		if (fallocate(run->memory_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, data, (off_t)vm->data_size) < 0)
			_exit(EXIT_GUEST_FAILED);
		usleep(PAUSE_US);
	}
}

void notify_often(struct run *run)
{
	while (!all_done(run)) {
		if (run->other == 0)
			give_away(run);
		usleep(PAUSE_US);
	}
	if (run->other > 0) {
		kill(run->other, SIGKILL);
		waitpid(run->other, NULL, 0);
	}
}

/* At least once, however fast the pass: a deletion may have to wait until the guest has left, which ends each pass. */
void change_slots_often(struct run *run)
{
	struct vm *vm = &run->vms[0];

	do {
		set_slot(run, vm, SLOT_EXTRA, EXTRA_GPA, vm->data_size, host_address(vm, DATA_GPA), 0);
		usleep(PAUSE_US);
		set_slot(run, vm, SLOT_EXTRA, EXTRA_GPA, 0, host_address(vm, DATA_GPA), 0);
		usleep(PAUSE_US);
	} while (!all_done(run));
}

/* vCPUs that come late, as by hotplug, and join the pass that is under way: the first page has been written. */
void add_vcpus(struct run *run)
{
	struct vm *vm = &run->vms[0];
	volatile const uint32_t *first = (volatile const uint32_t *)host_address(vm, DATA_GPA);

	while (*first == 0)
		usleep(PAUSE_US);
	while (vm->n_vcpus < run->options->vcpus) {
		struct vcpu *vcpu = &vm->vcpus[vm->n_vcpus];

		create_vcpu(run, vm, vm->n_vcpus);
		start_thread(vcpu);
		sem_post(&vcpu->go);
		usleep(PAUSE_US);
	}
}

/* For guests that halt: the kernel then keeps them until an interrupt. Without it a halt is the VMM's to wait for. */
void give_irqchip(struct run *run, struct vm *vm)
{
	if (vm->program.ends != END_BY_HALT || (run->options->how != NULL && strcmp(run->options->how, "userspace") == 0))
		return;
	if (ioctl(vm->fd, KVM_CREATE_IRQCHIP, 0) < 0)
		fail(EXIT_NO_ABILITY, "scenario %s needs interrupt controllers in the kernel: %s", run->scenario->name,
		     strerror(errno));
	vm->irqchip = true;
}

void wake_halted(struct run *run)
{
	usleep(HALTED_US);
	for (unsigned v = 0; v < run->n_vms; v++) {
		for (unsigned i = 0; run->vms[v].irqchip && i < run->vms[v].n_vcpus; i++) {
			struct kvm_msi msi = {.address_lo = MSI_ADDRESS | i << 12, .data = WAKE_VECTOR};

			if (ioctl(run->vms[v].fd, KVM_SIGNAL_MSI, &msi) < 0)
				fail(EXIT_GUEST_FAILED, "KVM_SIGNAL_MSI: %s", strerror(errno));
		}
	}
}
