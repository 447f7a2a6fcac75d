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

void create_vm(struct run *run, struct vm *vm)
{
	const struct scenario *scenario = run->scenario;
	struct guest_program program = scenario->guest;
	unsigned sets = scenario->same_pages ? 1 : run->options->vcpus;

	memset(vm, 0, sizeof(*vm));
	vm->run = run;
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
	program.mmio_stores = run->options->mmio;
	program.cr4_bit = program.toggle == TOGGLE_CR4 ? cr4_bit_named(run->options->bit) : 0;
	write_guest(vm, &program, run->options->trees);
	set_slot(run, vm, SLOT_LOW, LOW_BASE, HUGE_PAGE, vm->ram, 0);
	set_slot(run, vm, SLOT_DATA, DATA_GPA, vm->data_size, host_address(vm, DATA_GPA), 0);
	for (unsigned i = 0; i < run->options->vcpus; i++)
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
