/* SPDX-License-Identifier: Apache-2.0 */
/* /dev/kvm, VMs and their memory slots. */
#include "vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define TSS_GPA 0xfffbd000u
#define SMM_ADDRESS_SPACE (1u << 16)

int open_kvm(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (fd < 0 && errno == EACCES)
		fail(EXIT_NO_ABILITY, "cannot open /dev/kvm (%s): sudo usermod -aG kvm \"$USER\", then log in again",
		     strerror(errno));
	if (fd < 0)
		fail(EXIT_NO_ABILITY, "cannot open /dev/kvm (%s): sudo modprobe kvm-amd || sudo modprobe kvm-intel",
		     strerror(errno));
	if (ioctl(fd, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
		fail(EXIT_NO_ABILITY, "/dev/kvm speaks another API than version %d", KVM_API_VERSION);
	return fd;
}

/* Bytes of one vCPU's working set, rounded up so that no two share a 2 MiB region (and with it a page table). */
size_t working_set_bytes(const struct run *run)
{
	size_t pages = (size_t)run->options->pages * (run->scenario->growing ? run->options->loops : 1);

	return (pages * PAGE + HUGE_PAGE - 1) & ~(size_t)(HUGE_PAGE - 1);
}

/* In every address space, as firmware expects: what runs in SMM sees the same memory. size 0 deletes the slot. */
void set_slot(struct run *run, struct vm *vm, unsigned slot, uint64_t gpa, size_t size, void *host, uint32_t flags)
{
	for (unsigned space = 0; space <= vm->smm; space++) {
		struct kvm_userspace_memory_region region = {
			.slot = slot | (space ? SMM_ADDRESS_SPACE : 0),
			.flags = flags,
			.guest_phys_addr = gpa,
			.memory_size = size,
			.userspace_addr = (uintptr_t)host,
		};

		if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
			fail(EXIT_GUEST_FAILED, "%s: memory slot %u at 0x%llx refused: %s", run->scenario->name, slot,
			     (unsigned long long)gpa, strerror(errno));
		run->tally.slot_changes++;
	}
}

unsigned slot_limit(const struct vm *vm)
{
	int limit = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);

	return limit > 0 ? (unsigned)limit : 32; /* 32: what the API promises where the capability is not known */
}

void enable(const struct vm *vm, unsigned capability, uint64_t argument, const char *name)
{
	struct kvm_enable_cap enabled = {.cap = capability, .args = {argument}};

	if (ioctl(vm->fd, KVM_ENABLE_CAP, &enabled) < 0)
		fail(EXIT_NO_ABILITY, "scenario %s needs %s: this KVM refuses it: %s", vm->run->scenario->name, name,
		     strerror(errno));
}

/* Device memory in the hole, with the MSI-X table's page between two slots: as QEMU maps such a BAR. */
void make_bar(struct run *run, struct vm *vm)
{
	unsigned table = run->options->mmio / 2, after = run->options->mmio - table - 1;
	uint8_t *host = host_address(vm, DATA_GPA);

	if (table > 0)
		set_slot(run, vm, SLOT_EXTRA, HOLE_GPA, table * PAGE, host, 0);
	if (after > 0)
		set_slot(run, vm, SLOT_EXTRA + 1, HOLE_GPA + (table + 1) * PAGE, after * PAGE, host + (table + 1) * PAGE, 0);
}

/* Flash in the hole: the guest reads it as memory, and a write is the VMM's to carry out. */
void make_flash(struct run *run, struct vm *vm)
{
	set_slot(run, vm, SLOT_EXTRA, HOLE_GPA, run->options->mmio * PAGE, host_address(vm, DATA_GPA), KVM_MEM_READONLY);
}

void create_vm(struct run *run, struct vm *vm)
{
	const struct scenario *scenario = run->scenario;
	unsigned sets = scenario->same_pages ? 1 : run->options->vcpus;

	memset(vm, 0, sizeof(*vm));
	vm->run = run;
	vm->program = scenario->others != NULL && vm != run->vms ? *scenario->others : scenario->guest;
	vm->smm = ioctl(run->kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM) > 0;
	if (scenario->smm == SMM_REQUIRED && !vm->smm)
		fail(EXIT_NO_ABILITY, "scenario %s needs SMM: this KVM has none (use a kernel with CONFIG_KVM_SMM=y, "
		     "or the kernel lab)", scenario->name);
	vm->fd = ioctl(run->kvm, KVM_CREATE_VM, 0);
	if (vm->fd < 0)
		fail(EXIT_NO_ABILITY, "KVM_CREATE_VM: %s", strerror(errno));
	/* Intel's KVM wants three pages of its own; AMD's takes the call and does nothing. */
	if (ioctl(vm->fd, KVM_SET_TSS_ADDR, TSS_GPA) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_TSS_ADDR: %s", strerror(errno));
	map_ram(run, vm, sets * working_set_bytes(run));
	vm->program.mmio = run->options->mmio;
	vm->program.cr4_bit = vm->program.toggle == TOGGLE_CR4 ? cr4_bit_named(run->options->bit) : 0;
	write_guest(vm, run->options->trees);
	set_slot(run, vm, SLOT_LOW, LOW_BASE, HUGE_PAGE, vm->ram, 0);
	set_slot(run, vm, SLOT_DATA, DATA_GPA, vm->data_size, host_address(vm, DATA_GPA), 0);
	if (scenario->prepare != NULL)
		scenario->prepare(run, vm);
	for (unsigned i = 0; i < run->options->vcpus - scenario->late_vcpus; i++)
		create_vcpu(run, vm, i);
	run->tally.vms++;
}

void destroy_vm(struct vm *vm)
{
	for (unsigned i = 0; i < vm->n_vcpus; i++)
		destroy_vcpu(&vm->vcpus[i]);
	close(vm->fd);
	unmap_ram(vm);
}
