/* SPDX-License-Identifier: Apache-2.0 */
/* Guest machine code and page tables.
 *
 * Registers at entry (set in vcpu.c): ebx first byte of the working set, ebp pages to touch, edi pages added after
 * each pass, edx passes (only where the guest counts them), r8/r9/r10 current, end and first top-level table.
 * eax, ecx and esi are scratch; eax begins as four RET instructions, so that what is stored can be called. Only calls and
 * interrupts use the stack. The encodings below mean the same in 32-bit and 64-bit mode unless said otherwise.
 */
#include "vmm.h"

#include <string.h>

#define PTE_PRESENT_WRITE 0x3u
#define PTE_LARGE 0x80u
#define CR0_WP 0x10000u
#define EFER_NX 0x800u
#define MSR_EFER 0xc0000080u

struct code {
	uint8_t *start, *next;
};

static void bytes(struct code *code, const char *opcodes, size_t n)
{
	memcpy(code->next, opcodes, n);
	code->next += n;
}
#define EMIT(code, opcodes) bytes(code, opcodes, sizeof(opcodes) - 1)

static void word(struct code *code, uint32_t value)
{
	memcpy(code->next, &value, sizeof(value));
	code->next += sizeof(value);
}

/* The displacement of a near jump back to `target`. */
static void back_to(struct code *code, const uint8_t *target)
{
	word(code, (uint32_t)(target - (code->next + 4)));
}

/* One instruction of two bytes for each of ecx addresses from esi on, `step` bytes apart. */
static void emit_loop(struct code *code, const char *instruction, uint32_t step)
{
	const uint8_t *top = code->next;

	bytes(code, instruction, 2);
	EMIT(code, "\x81\xc6"); /* add esi, step */
	word(code, step);
	EMIT(code, "\xff\xc9"); /* dec ecx */
	EMIT(code, "\x0f\x85"); /* jnz top */
	back_to(code, top);
}

static void emit_hole(struct code *code, unsigned pages)
{
	EMIT(code, "\xbe"); /* mov esi, HOLE; mov ecx, pages */
	word(code, HOLE_GPA);
	EMIT(code, "\xb9");
	word(code, pages);
}

static void emit_working_set(struct code *code)
{
	EMIT(code, "\x89\xde\x89\xe9"); /* mov esi, ebx; mov ecx, ebp */
}

/* The working set or, of `hole` pages, the hole: one access to each page, or first one to each and then the other. */
static void emit_accesses(struct code *code, enum access access, unsigned hole)
{
	for (int stores = access == STORES; stores <= (access != LOADS); stores++) {
		if (hole > 0)
			emit_hole(code, hole);
		else
			emit_working_set(code);
		emit_loop(code, stores ? "\x89\x06" : "\x8b\x06", PAGE); /* mov [esi], eax or mov eax, [esi] */
	}
}

/* 32-bit mode only. */
static void emit_calls(struct code *code)
{
	emit_working_set(code);
	EMIT(code, "\xc1\xe9\x09");              /* shr ecx, 9: pages in 2 MiB */
	emit_loop(code, "\xff\xd6", HUGE_PAGE); /* call esi */
}

/* 64-bit mode only. */
static void emit_toggle(struct code *code, const struct guest_program *program)
{
	switch (program->toggle) {
	case TOGGLE_NONE:
		break;
	case TOGGLE_CR0_WP:
		EMIT(code, "\x0f\x20\xc0\x35"); /* mov rax, cr0; xor eax, WP */
		word(code, CR0_WP);
		EMIT(code, "\x0f\x22\xc0"); /* mov cr0, rax */
		break;
	case TOGGLE_CR4:
		EMIT(code, "\x0f\x20\xe0\x35"); /* mov rax, cr4; xor eax, bit */
		word(code, program->cr4_bit);
		EMIT(code, "\x0f\x22\xe0"); /* mov cr4, rax */
		break;
	case TOGGLE_EFER_NX:
		EMIT(code, "\xb9"); /* mov ecx, EFER; rdmsr; xor eax, NX; wrmsr */
		word(code, MSR_EFER);
		EMIT(code, "\x0f\x32\x35");
		word(code, EFER_NX);
		EMIT(code, "\x0f\x30");
		break;
	case TOGGLE_CR3:
		EMIT(code, "\x49\x81\xc0"); /* add r8, PAGE */
		word(code, PAGE);
		EMIT(code, "\x4d\x39\xc8");     /* cmp r8, r9 */
		EMIT(code, "\x72\x03");         /* jb over the next instruction */
		EMIT(code, "\x4d\x89\xd0");     /* mov r8, r10 */
		EMIT(code, "\x41\x0f\x22\xd8"); /* mov cr3, r8 */
		break;
	}
}

static void emit_end(struct code *code, enum pass_end ends)
{
	const uint8_t out[] = {0xe6, PASS_PORT}; /* out PASS_PORT, al */

	switch (ends) {
	case END_BY_DOORBELL:
		EMIT(code, "\x89\x04\x25"); /* mov [DOORBELL], eax; 64-bit mode only */
		word(code, DOORBELL_GPA);
		break;
	case END_BY_POLLING:
		emit_hole(code, 1);
		EMIT(code, "\x8b\x06\xeb\xfc"); /* mov eax, [esi]; jmp to it */
		break;
	case END_BY_TRIPLE_FAULT:
		EMIT(code, "\x0f\x0b"); /* ud2 */
		break;
	case END_BY_LOST_IDT:
		EMIT(code, "\xcc"); /* int3 */
		break;
	case END_BY_FNSAVE:
		emit_hole(code, 1);
		EMIT(code, "\xdd\x36"); /* fnsave [esi] */
		break;
	case END_BY_HALT:
		EMIT(code, "\xfb\xf4\xfa"); /* sti; hlt; cli */
		bytes(code, (const char *)out, sizeof(out));
		break;
	case END_BY_OUT:
		bytes(code, (const char *)out, sizeof(out));
		break;
	}
}

static void write_code(const struct vm *vm)
{
	const struct guest_program *program = &vm->program;
	struct code code = {.start = host_address(vm, CODE_GPA)};

	code.next = code.start;
	emit_accesses(&code, program->access, 0);
	if (program->calls)
		emit_calls(&code);
	EMIT(&code, "\x01\xfd"); /* add ebp, edi */
	if (program->mmio > 0)
		emit_accesses(&code, program->access, program->mmio);
	emit_toggle(&code, program);
	if (program->passes_in_guest) {
		EMIT(&code, "\xff\xca\x0f\x85"); /* dec edx; jnz start */
		back_to(&code, code.start);
	}
	emit_end(&code, program->ends);
	EMIT(&code, "\xe9"); /* jmp start */
	back_to(&code, code.start);
}

/* What wakes a halted guest: one interrupt gate, the segment that it loads, and the handler, which ends the pass. */
static void write_interrupt(const struct vm *vm)
{
	static const uint64_t segments[] = {0, 0x00cf9b000000ffff}; /* flat code */
	uint64_t *gate = (uint64_t *)host_address(vm, IDT_GPA) + WAKE_VECTOR;
	struct code code = {.next = host_address(vm, HANDLER_GPA)};

	memcpy(host_address(vm, GDT_GPA), segments, sizeof(segments));
	*gate = (uint64_t)(HANDLER_GPA >> 16) << 48 | 0x8e0000080000 | HANDLER_GPA; /* present, 32-bit, selector 8 */
	EMIT(&code, "\xa3\xb0\x00\xe0\xfe"); /* mov [0xfee000b0], eax: end of interrupt */
	EMIT(&code, "\x83\xc4\x0c");         /* add esp, 12: not by iret, which a KVM that emulates does not know */
	emit_end(&code, END_BY_OUT);
	EMIT(&code, "\xe9"); /* jmp start */
	back_to(&code, host_address(vm, CODE_GPA));
}

/* All trees share the lower levels: only the top-level page tells them apart, which is all that a root is. */
static void write_page_tables(const struct vm *vm, unsigned trees)
{
	uint64_t *pdpt = (uint64_t *)host_address(vm, PDPT_GPA);
	uint64_t *pd = (uint64_t *)host_address(vm, PD_GPA);

	for (unsigned tree = 0; tree < trees; tree++)
		*(uint64_t *)host_address(vm, TREES_GPA + tree * PAGE) = PDPT_GPA | PTE_PRESENT_WRITE;
	pdpt[0] = PD_GPA | PTE_PRESENT_WRITE;
	for (uint64_t i = 0; i < PAGE / sizeof(*pd); i++)
		pd[i] = i * HUGE_PAGE | PTE_PRESENT_WRITE | PTE_LARGE;
}

void write_guest(const struct vm *vm, unsigned trees)
{
	write_code(vm);
	if (vm->program.paging)
		write_page_tables(vm, trees > 0 ? trees : 1);
	if (vm->program.ends == END_BY_HALT)
		write_interrupt(vm);
	memcpy(host_address(vm, SMM_ENTRY_GPA), "\x0f\xaa", 2); /* rsm */
}
