/* SPDX-License-Identifier: Apache-2.0 */
/* Dirty logging of the data slot: by a bitmap that reading protects again, by one with a call of its own for that
 * (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, which QEMU uses), or by a ring of written pages in each vCPU. */
#include "vmm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define RING_BYTES PAGE /* 256 entries, of which KVM keeps 64 free: a pass of 256 pages fills it once */
#define RING_ENTRIES (RING_BYTES / sizeof(struct kvm_dirty_gfn))
#define PAGES_AT_ONCE 64u

static bool is(const struct run *run, const char *how)
{
	return strcmp(run->options->how, how) == 0;
}

void choose_dirty_log(struct run *run, struct vm *vm)
{
	if (is(run, "clear"))
		enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
		       "KVM_DIRTY_LOG_INITIALLY_SET");
	else if (is(run, "ring"))
		enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES, "dirty rings");
}

static void map_ring(struct vcpu *vcpu)
{
	vcpu->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd,
			  KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	if (vcpu->ring == MAP_FAILED)
		fail(EXIT_GUEST_FAILED, "mapping the dirty ring of vCPU %u: %s", vcpu->index, strerror(errno));
}

void unmap_ring(struct vcpu *vcpu)
{
	if (vcpu->ring != NULL)
		munmap(vcpu->ring, RING_BYTES);
	vcpu->ring = NULL;
}

/* Takes what the guest wrote, and has KVM protect it again. */
void empty_ring(struct vcpu *vcpu)
{
	if (vcpu->ring == NULL)
		map_ring(vcpu);
	for (;;) {
		struct kvm_dirty_gfn *entry = &vcpu->ring[vcpu->ring_next % RING_ENTRIES];

		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			break;
		vcpu->ring_pages += entry->slot == SLOT_DATA;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		vcpu->ring_next++;
	}
	if (ioctl(vcpu->vm->fd, KVM_RESET_DIRTY_RINGS, 0) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_RESET_DIRTY_RINGS: %s", strerror(errno));
}

static void clear_log(struct vm *vm, uint64_t *bitmap, size_t pages)
{
	for (size_t first = 0; first < pages; first += PAGES_AT_ONCE) {
		struct kvm_clear_dirty_log clear = {
			.slot = SLOT_DATA, .first_page = first, .num_pages = PAGES_AT_ONCE, .dirty_bitmap = bitmap + first / 64,
		};

		if (ioctl(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
			fail(EXIT_GUEST_FAILED, "KVM_CLEAR_DIRTY_LOG: %s", strerror(errno));
	}
}

static uint64_t read_bitmap(struct run *run, struct vm *vm)
{
	size_t pages = vm->data_size / PAGE;
	uint64_t *bitmap = calloc(pages / 64, sizeof(*bitmap));
	struct kvm_dirty_log log = {.slot = SLOT_DATA, .dirty_bitmap = bitmap};
	uint64_t dirty = 0;

	if (bitmap == NULL)
		fail(EXIT_NO_ABILITY, "no memory for the dirty bitmap");
	if (ioctl(vm->fd, KVM_GET_DIRTY_LOG, &log) < 0)
		fail(EXIT_GUEST_FAILED, "KVM_GET_DIRTY_LOG: %s", strerror(errno));
	for (size_t i = 0; i < pages / 64; i++)
		dirty += (uint64_t)__builtin_popcountll(bitmap[i]);
	if (is(run, "clear"))
		clear_log(vm, bitmap, pages);
	free(bitmap);
	return dirty;
}

static uint64_t read_rings(struct vm *vm)
{
	uint64_t dirty = 0;

	for (unsigned i = 0; i < vm->n_vcpus; i++) {
		empty_ring(&vm->vcpus[i]);
		dirty += vm->vcpus[i].ring_pages;
		vm->vcpus[i].ring_pages = 0;
	}
	return dirty;
}

/* Reads the log, which write-protects what was dirty. Must be just what the guest wrote; a log that is cleared by a call
 * of its own begins with all of the slot, and a page may be twice in a ring that was emptied while the guest wrote it. */
static void read_log(struct run *run, struct vm *vm, bool first)
{
	uint64_t written = (uint64_t)run->options->pages * vm->n_vcpus, twice = 0, dirty;

	if (first && is(run, "clear"))
		written = vm->data_size / PAGE;
	for (unsigned i = 0; i < vm->n_vcpus; i++) {
		twice += vm->vcpus[i].ring_full;
		vm->vcpus[i].ring_full = 0;
	}
	dirty = is(run, "ring") ? read_rings(vm) : read_bitmap(run, vm);
	if (dirty < written || dirty > written + twice)
		fail(EXIT_GUEST_FAILED, "scenario %s: KVM logged %llu dirty pages where the guest wrote %llu",
		     run->scenario->name, (unsigned long long)dirty, (unsigned long long)written);
	run->tally.dirty_pages += dirty;
}

/* Rounds of three: on | read, stay on | read, off. So one pass in three finds everything write-protected by the
 * start of logging, one by the read, and one finds logging ended. */
void toggle_dirty_log(struct run *run, unsigned pass)
{
	struct vm *vm = &run->vms[0];
	uint8_t *host = host_address(vm, DATA_GPA);

	if (pass % 3 != 1)
		read_log(run, vm, pass % 3 == 2);
	if (pass % 3 == 1)
		set_slot(run, vm, SLOT_DATA, DATA_GPA, vm->data_size, host, KVM_MEM_LOG_DIRTY_PAGES);
	else if (pass % 3 == 0)
		set_slot(run, vm, SLOT_DATA, DATA_GPA, vm->data_size, host, 0);
}
