/* Guest machine code and page tables.
 *
 * Registers at entry (set in vcpu.c): ebx first byte of the working set, ebp pages to touch, edi pages added after
 * each pass, edx passes (only where the guest counts them), r8/r9/r10 current, end and first top-level table.
 * eax, ecx and esi are scratch. The encodings below mean the same in 32-bit and 64-bit mode unless said otherwise.
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

/* One store to each of ecx pages from esi on, or one load. */
static void emit_loop(struct code *code, bool loads)
{
	const uint8_t *top = code->next;

	if (loads)
		EMIT(code, "\x8b\x06"); /* mov eax, [esi] */
	else
		EMIT(code, "\x89\x06"); /* mov [esi], eax */
	EMIT(code, "\x81\xc6"); /* add esi, PAGE */
	word(code, PAGE);
	EMIT(code, "\xff\xc9"); /* dec ecx */
	EMIT(code, "\x0f\x85"); /* jnz top */
	back_to(code, top);
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

static void write_code(const struct vm *vm, const struct guest_program *program)
{
	struct code code = {.start = host_address(vm, CODE_GPA)};

	code.next = code.start;
	EMIT(&code, "\x89\xde\x89\xe9"); /* mov esi, ebx; mov ecx, ebp */
	emit_loop(&code, program->loads);
	EMIT(&code, "\x01\xfd"); /* add ebp, edi */
	if (program->mmio_stores > 0) {
		EMIT(&code, "\xbe"); /* mov esi, HOLE; mov ecx, stores */
		word(&code, HOLE_GPA);
		EMIT(&code, "\xb9");
		word(&code, program->mmio_stores);
		emit_loop(&code, false);
	}
	emit_toggle(&code, program);
	if (program->passes_in_guest) {
		EMIT(&code, "\xff\xca\x0f\x85"); /* dec edx; jnz start */
		back_to(&code, code.start);
	}
	if (program->ends_by_mmio) {
		EMIT(&code, "\x89\x04\x25"); /* mov [DOORBELL], eax */
		word(&code, DOORBELL_GPA);
	} else {
		const uint8_t out[] = {0xe6, PASS_PORT}; /* out PASS_PORT, al */

		bytes(&code, (const char *)out, sizeof(out));
	}
	EMIT(&code, "\xe9"); /* jmp start */
	back_to(&code, code.start);
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

void write_guest(const struct vm *vm, const struct guest_program *program, unsigned trees)
{
	write_code(vm, program);
	if (program->paging)
		write_page_tables(vm, trees > 0 ? trees : 1);
	memcpy(host_address(vm, SMM_ENTRY_GPA), "\x0f\xaa", 2); /* rsm */
}
