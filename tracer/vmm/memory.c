/* SPDX-License-Identifier: Apache-2.0 */
/* The host memory behind a VM: touched before the guest starts, so that no host fault mixes with the guest's. */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* KiB of transparent huge pages in [start, start + size), from the mapping's own smaps entry. */
static size_t huge_kib(const uint8_t *start, size_t size)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char line[512];
	bool inside = false;
	size_t total = 0;

	if (smaps == NULL)
		fail(EXIT_NO_ABILITY, "cannot read /proc/self/smaps (%s): mount /proc", strerror(errno));
	while (fgets(line, sizeof(line), smaps) != NULL) {
		unsigned long from, to;
		size_t kib;

		if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
			inside = from < (uintptr_t)start + size && to > (uintptr_t)start;
		else if (inside && sscanf(line, "AnonHugePages: %zu kB", &kib) == 1)
			total += kib;
	}
	fclose(smaps);
	return total;
}

void populate(uint8_t *start, size_t size)
{
	for (size_t offset = 0; offset < size; offset += PAGE)
		*(volatile uint8_t *)(start + offset) = 0;
}

void touch(uint8_t *start, size_t size)
{
	for (size_t offset = 0; offset < size; offset += PAGE) {
		volatile uint8_t *byte = start + offset;

		*byte = *byte;
	}
}

static uint8_t *map(const struct run *run, size_t size)
{
	int kind = run->memory_file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	uint8_t *start;

	if (run->memory_file >= 0 && ftruncate(run->memory_file, (off_t)size) < 0)
		fail(EXIT_NO_ABILITY, "no file for a guest of %zu MiB: %s", size >> 20, strerror(errno));
	start = mmap(NULL, size, PROT_READ | PROT_WRITE, kind | MAP_NORESERVE, run->memory_file, 0);
	if (start == MAP_FAILED)
		fail(EXIT_NO_ABILITY, "no memory for a guest of %zu MiB: %s", size >> 20, strerror(errno));
	return start;
}

static uint8_t *aligned(uint8_t *start)
{
	return (uint8_t *)(((uintptr_t)start + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
}

void map_all(struct run *run, size_t data_size)
{
	run->mapping_size = run->n_vms * (HUGE_PAGE + data_size) + HUGE_PAGE; /* room to align */
	run->mapping = map(run, run->mapping_size);
}

void unmap_all(struct run *run)
{
	munmap(run->mapping, run->mapping_size);
}

void map_ram(struct run *run, struct vm *vm, size_t data_size)
{
	size_t size = HUGE_PAGE + data_size;
	bool huge = run->options->huge;

	vm->data_size = data_size;
	if (run->mapping != NULL) {
		vm->ram = aligned(run->mapping) + (size_t)(vm - run->vms) * size;
	} else {
		vm->mapping_size = size + HUGE_PAGE; /* room to align */
		vm->mapping = map(run, vm->mapping_size);
		vm->ram = aligned(vm->mapping);
	}
	/* A kernel without THP refuses both: right for small pages, and huge ones are checked below. */
	madvise(vm->ram, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	populate(vm->ram, size); /* MAP_POPULATE would come before the advice */
	if (huge && huge_kib(vm->ram, size) < size >> 10)
		fail(EXIT_NO_ABILITY, "--huge: the host gave no 2 MiB pages for %zu MiB: "
		     "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled", size >> 20);
}

void unmap_ram(struct vm *vm)
{
	if (vm->mapping != NULL)
		munmap(vm->mapping, vm->mapping_size);
	vm->mapping = NULL;
}

uint8_t *host_address(const struct vm *vm, uint32_t gpa)
{
	return gpa >= DATA_GPA ? vm->ram + HUGE_PAGE + (gpa - DATA_GPA) : vm->ram + gpa;
}
