/* SPDX-License-Identifier: Apache-2.0 */
/* What the scenarios change between passes, as a VMM's main thread would, with all vCPUs stopped. */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* As in Linux 6.12: older headers do not have them. */
#define QUIRK_SLOT_ZAP_ALL (1u << 7)
#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213
#endif

/* For vCPUs that run in turns only: they share one SMBASE, where their saved states would overwrite each other. */
void smi_to_all(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];

	(void)pass;
	for (unsigned i = 0; i < vm->n_vcpus; i++)
		vm->vcpus[i].smi_due = vm->smm;
}

void smi_to_first(struct run *run, unsigned pass)
{
	(void)pass;
	run->vms[0].vcpus[0].smi_due = true;
}

/* From 6.12 on a VMM may have it that the leaves of a memslot that is deleted go alone, and the roots stay. */
void choose_slot_zap(struct run *run, struct vm *vm)
{
	if (strcmp(run->options->how, "leaves") == 0)
		enable(vm, KVM_CAP_DISABLE_QUIRKS2, QUIRK_SLOT_ZAP_ALL, "KVM_X86_QUIRK_SLOT_ZAP_ALL to be off");
}

void delete_slot(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];
	uint8_t *host = host_address(vm, DATA_GPA);

	(void)pass;
	set_slot(run, vm, SLOT_DATA, DATA_GPA, 0, host, 0);
	set_slot(run, vm, SLOT_DATA, DATA_GPA, vm->data_size, host, 0);
}

/* A debugger that steps with interrupts blocked inhibits APICv, whose zap of the APIC's page nothing undoes. */
void inhibit_apicv(struct run *run, unsigned pass)
{
	const struct vcpu *vcpu = &run->vms[0].vcpus[0];
	struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ};

	(void)pass;
	if (ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
		fail(EXIT_NO_ABILITY, "scenario %s needs KVM_GUESTDBG_BLOCKIRQ: %s", run->scenario->name, strerror(errno));
	debug.control = 0;
	if (ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_GUEST_DEBUG: %s", strerror(errno));
}

/* A slot that the guest never touches, backed by the working set's memory: only the move itself can show. */
void move_slot(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];
	uint64_t gpa = EXTRA_GPA + (uint64_t)(pass % 2) * vm->data_size;

	if (pass == 1) /* moved at once, so that every pass is followed by a move */
		set_slot(run, vm, SLOT_EXTRA, EXTRA_GPA, vm->data_size, host_address(vm, DATA_GPA), 0);
	set_slot(run, vm, SLOT_EXTRA, gpa, vm->data_size, host_address(vm, DATA_GPA), 0);
}

void create_slot(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];
	unsigned slot = SLOT_EXTRA + pass - 1;

	if (slot >= slot_limit(vm))
		fail(EXIT_BAD_USAGE, "scenario %s: --loops %u needs more memory slots than the %u of this KVM",
		     run->scenario->name, run->options->loops, slot_limit(vm));
	set_slot(run, vm, slot, EXTRA_GPA + (uint64_t)(pass - 1) * vm->data_size, vm->data_size,
		 host_address(vm, DATA_GPA), 0);
}

void notify(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];
	uint8_t *host = host_address(vm, DATA_GPA);
	int result;

	(void)pass;
	if (strcmp(run->options->how, "dontneed") == 0) {
		result = madvise(host, vm->data_size, MADV_DONTNEED);
		run->tally.host_calls++;
	} else {
		result = mprotect(host, vm->data_size, PROT_READ);
		if (result == 0)
			result = mprotect(host, vm->data_size, PROT_READ | PROT_WRITE);
		run->tally.host_calls += 2;
	}
	if (result < 0)
		fail(EXIT_GUEST_FAILED, "scenario %s: %s: %s", run->scenario->name, run->options->how, strerror(errno));
	/* Or the host's own write fault would come inside KVM's: 5.10 then copies any page that still sits in a per-CPU
	 * LRU batch, the copy invalidates, and KVM retries the guest's fault, a varying number of times. */
	populate(host, vm->data_size);
}

static void host_call(struct run *run, int result)
{
	run->tally.host_calls++;
	if (result < 0)
		fail(EXIT_GUEST_FAILED, "scenario %s: changing memory: %s", run->scenario->name, strerror(errno));
}

/* Takes every page away from the guests, in all address spaces, and leaves what is in it. */
static void take_away(struct run *run, uint8_t *start, size_t size)
{
	host_call(run, mprotect(start, size, PROT_READ));
	host_call(run, mprotect(start, size, PROT_READ | PROT_WRITE));
	touch(start, size); /* see notify */
}

static void take_own_memory_away(struct run *run, struct vcpu *vcpu)
{
	take_away(run, vcpu->vm->ram, HUGE_PAGE + vcpu->vm->data_size);
}

static void reset_next_vcpu(struct run *run, struct vcpu *vcpu)
{
	(void)run;
	flip_cr4_pge(&vcpu->vm->vcpus[(vcpu->index + 1) % vcpu->vm->n_vcpus]);
}

/* On in one turn, off in the next, of the slot that has the SMM handler. */
static void log_low_slot(struct run *run, struct vcpu *vcpu)
{
	bool on = vcpu->pass / 3 % 2 == 1;

	set_slot(run, vcpu->vm, SLOT_LOW, LOW_BASE, HUGE_PAGE, vcpu->vm->ram, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

/* What concerns another vCPU, or the root that is not loaded, done by a vCPU's thread. */
void act_for_others(struct run *run, unsigned pass)
{
	static void (*const errands[])(struct run *, struct vcpu *) = {
		log_low_slot, reset_next_vcpu, take_own_memory_away,
	};
	struct vm *vm = &run->vms[0];

	on_thread_of(&vm->vcpus[pass % vm->n_vcpus], errands[pass % 3]);
	smi_to_all(run, pass);
}

/* One change of one mapping, over the memory of every VM. */
void notify_all(struct run *run, unsigned pass)
{
	struct vm *last = &run->vms[run->n_vms - 1];
	uint8_t *start = run->vms[0].ram;

	(void)pass;
	take_away(run, start, (size_t)(last->ram + HUGE_PAGE + last->data_size - start));
}

static void write_to_data_of_second(struct run *run, struct vcpu *vcpu)
{
	struct vm *other = &run->vms[1];

	(void)vcpu;
	touch(host_address(other, DATA_GPA), other->data_size);
}

/* The second VM's guest has only read: its memory is the zero page, which the first one's vCPU thread replaces. Then
 * the memory is given back, so that the next pass reads the zero page again. */
void write_to_second(struct run *run, unsigned pass)
{
	struct vm *other = &run->vms[1];
	uint8_t *data = host_address(other, DATA_GPA);

	if (pass > 1)
		on_thread_of(&run->vms[0].vcpus[0], write_to_data_of_second);
	host_call(run, madvise(data, other->data_size, MADV_DONTNEED));
}

/* The guest's memory goes back to the host, and the next pass finds zero pages: read first, they are not the guest's to
 * write, and a write makes each page a new one. */
void give_back(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];

	(void)pass;
	host_call(run, madvise(host_address(vm, DATA_GPA), vm->data_size, MADV_DONTNEED));
}

/* Until the host has merged the working set, whose pages are all alike; a guest that writes gets its page back. */
void merge_pages(struct run *run, unsigned pass)
{
	static const char sharing[] = "/sys/kernel/mm/ksm/pages_sharing";
	struct vm *vm = &run->vms[0];
	unsigned long long most = run->options->pages * vm->n_vcpus;

	if (pass == 1)
		host_call(run, madvise(host_address(vm, DATA_GPA), vm->data_size, MADV_MERGEABLE));
	for (unsigned waits = 0; read_setting(sharing) < most / 2; waits++) {
		if (waits == 1000)
			fail(EXIT_NO_ABILITY, "scenario %s: the host merged %llu of %llu pages in 20 s",
			     run->scenario->name, read_setting(sharing), most);
		usleep(20000);
	}
}

/* After the first pass the host no longer maps the page in the middle of the working set. */
void lose_page(struct run *run, unsigned pass)
{
	uint32_t gpa = DATA_GPA + run->options->pages / 2 * PAGE;

	if (pass == 1)
		host_call(run, munmap(host_address(&run->vms[0], gpa), PAGE));
}

/* Longer than the period that the scenario sets: what the guest executed is 4 KiB pages, and goes as a whole table. */
void wait_for_recovery(struct run *run, unsigned pass)
{
	(void)run;
	(void)pass;
	usleep(200000);
}
