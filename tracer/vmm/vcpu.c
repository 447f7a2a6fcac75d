/* SPDX-License-Identifier: Apache-2.0 */
/* vCPUs: their mode and registers at the first entry. */
#include "vmm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CR0_PE 0x1u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_PG 0x80000000u
#define CR4_PAE 0x20u
#define CR4_PGE 0x80u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u
#define RFLAGS_RESERVED 0x2u
#define MAX_CPUID 256u
#define LAPIC_SPURIOUS 0xf0 /* bit 8 of this register switches the controller on */
#define LAPIC_ENABLED 0x1

/* CR4 bits that a guest can toggle without more ado, and where CPUID announces them. */
static const struct {
	const char *name;
	uint32_t bit;
	uint32_t function;
	char output; /* 'd' edx, 'b' ebx */
	uint32_t feature;
} cr4_bits[] = {
	{"pse", 1u << 4, 1, 'd', 1u << 3},
	{"pge", 1u << 7, 1, 'd', 1u << 13},
	{"smep", 1u << 20, 7, 'b', 1u << 7},
	{"smap", 1u << 21, 7, 'b', 1u << 20},
};

uint32_t cr4_bit_named(const char *name)
{
	for (size_t i = 0; i < sizeof(cr4_bits) / sizeof(*cr4_bits); i++)
		if (strcmp(cr4_bits[i].name, name) == 0)
			return cr4_bits[i].bit;
	fail(EXIT_BAD_USAGE, "no CR4 bit '%s'", name);
}

static bool announced(const struct kvm_cpuid2 *cpuid, size_t which)
{
	for (unsigned i = 0; i < cpuid->nent; i++) {
		const struct kvm_cpuid_entry2 *entry = &cpuid->entries[i];

		if (entry->function == cr4_bits[which].function && entry->index == 0)
			return ((cr4_bits[which].output == 'b' ? entry->ebx : entry->edx) & cr4_bits[which].feature) != 0;
	}
	return false;
}

/* Long mode, and the CR4 bits, are the guest's only if its CPUID says so. */
static void set_cpuid(struct run *run, struct vcpu *vcpu)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + MAX_CPUID * sizeof(cpuid->entries[0]));
	const char *bit = run->options->bit;

	if (cpuid == NULL)
		fail(EXIT_NO_ABILITY, "no memory for the CPUID table");
	cpuid->nent = MAX_CPUID;
	if (ioctl(run->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_GET_SUPPORTED_CPUID: %s", strerror(errno));
	for (size_t i = 0; bit != NULL && i < sizeof(cr4_bits) / sizeof(*cr4_bits); i++)
		if (strcmp(cr4_bits[i].name, bit) == 0 && !announced(cpuid, i))
			fail(EXIT_NO_ABILITY, "scenario %s needs CR4.%s: this KVM does not offer it (try another --bit)",
			     run->scenario->name, bit);
	if (ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_CPUID2: %s", strerror(errno));
	free(cpuid);
}

static struct kvm_segment flat_segment(uint8_t type, uint16_t selector, bool long_mode)
{
	return (struct kvm_segment){
		.limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1, .g = 1,
		.db = !long_mode, .l = long_mode,
	};
}

static void set_descriptor_tables(struct kvm_sregs *sregs, enum pass_end ends)
{
	switch (ends) {
	case END_BY_HALT:
		sregs->gdt = (struct kvm_dtable){.base = GDT_GPA, .limit = 2 * 8 - 1};
		sregs->idt = (struct kvm_dtable){.base = IDT_GPA, .limit = (WAKE_VECTOR + 1) * 8 - 1};
		break;
	case END_BY_LOST_IDT:
		sregs->idt = (struct kvm_dtable){.base = HOLE_GPA, .limit = PAGE - 1};
		break;
	case END_BY_TRIPLE_FAULT:
	case END_BY_FNSAVE:
		sregs->idt = (struct kvm_dtable){0};
		break;
	default:
		break; /* the guest has no exceptions */
	}
}

static void set_mode(struct vcpu *vcpu)
{
	const struct guest_program *program = &vcpu->vm->program;
	struct kvm_sregs sregs;

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_GET_SREGS: %s", strerror(errno));
	sregs.cs = flat_segment(0xb, 0x8, program->paging); /* execute, read, accessed */
	sregs.ds = flat_segment(0x3, 0x10, false);          /* read, write, accessed */
	sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.ds;
	sregs.cr0 |= CR0_PE | CR0_NE;
	if (program->paging) {
		sregs.cr0 |= CR0_WP | CR0_PG;
		sregs.cr3 = TREES_GPA;
		sregs.cr4 |= CR4_PAE;
		sregs.efer |= EFER_LME | EFER_LMA;
	}
	set_descriptor_tables(&sregs, program->ends);
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_SREGS: %s", strerror(errno));
}

/* A bit that no guest of ours looks at: KVM resets the vCPU's MMU all the same. */
void flip_cr4_pge(struct vcpu *vcpu)
{
	struct kvm_sregs sregs;

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_GET_SREGS: %s", strerror(errno));
	sregs.cr4 ^= CR4_PGE;
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_SREGS: %s", strerror(errno));
}

static void set_registers(struct run *run, struct vcpu *vcpu)
{
	const struct options *options = run->options;
	unsigned set = run->scenario->same_pages ? 0 : vcpu->index;
	struct kvm_regs regs = {
		.rip = CODE_GPA,
		.rsp = STACK_GPA,
		.rax = 0xc3c3c3c3,
		.rflags = RFLAGS_RESERVED,
		.rbx = DATA_GPA + set * working_set_bytes(run),
		.rbp = options->pages,
		.rdi = run->scenario->growing ? options->pages : 0,
		.rdx = options->loops,
		.r8 = TREES_GPA,
		.r9 = TREES_GPA + (uint64_t)options->trees * PAGE,
		.r10 = TREES_GPA,
	};

	if (ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_REGS: %s", strerror(errno));
}

void forget_exception(struct vcpu *vcpu)
{
	struct kvm_vcpu_events events = {0};

	if (ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_VCPU_EVENTS: %s", strerror(errno));
}

void reset_vcpu(struct vcpu *vcpu)
{
	forget_exception(vcpu);
	set_mode(vcpu);
	set_registers(vcpu->vm->run, vcpu);
}

/* In the kernel's interrupt controllers a vCPU begins with its own one off, and all but the first wait for a start. */
static void enable_lapic(struct vcpu *vcpu)
{
	struct kvm_mp_state running = {.mp_state = KVM_MP_STATE_RUNNABLE};
	struct kvm_lapic_state lapic;

	if (ioctl(vcpu->fd, KVM_GET_LAPIC, &lapic) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_GET_LAPIC: %s", strerror(errno));
	lapic.regs[LAPIC_SPURIOUS + 1] |= LAPIC_ENABLED;
	if (ioctl(vcpu->fd, KVM_SET_LAPIC, &lapic) < 0 || ioctl(vcpu->fd, KVM_SET_MP_STATE, &running) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_SET_LAPIC, KVM_SET_MP_STATE: %s", strerror(errno));
}

void create_vcpu(struct run *run, struct vm *vm, unsigned index)
{
	struct vcpu *vcpu = &vm->vcpus[index];
	int size = ioctl(run->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	vcpu->vm = vm;
	vcpu->index = index;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)index);
	if (vcpu->fd < 0 || size < 0)
		fail(EXIT_GUEST_FAILED, "KVM_CREATE_VCPU %u: %s", index, strerror(errno));
	vcpu->run_size = (size_t)size;
	vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		fail(EXIT_GUEST_FAILED, "mapping vCPU %u: %s", index, strerror(errno));
	if (vm->program.paging)
		set_cpuid(run, vcpu);
	if (vm->irqchip)
		enable_lapic(vcpu);
	set_mode(vcpu);
	set_registers(run, vcpu);
	vm->n_vcpus++;
}

void destroy_vcpu(struct vcpu *vcpu)
{
	unmap_ring(vcpu);
	munmap(vcpu->run, vcpu->run_size);
	close(vcpu->fd);
}
