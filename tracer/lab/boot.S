/* SPDX-License-Identifier: Apache-2.0
 *
 * Boot sector of a Bochs disk image: reads boot_params, command line and whatever else is not in memory yet by ATA PIO
 * from the primary master, and enters the kernel's 64-bit entry. It stands for a boot loader, and saves the kernel's own
 * unpacking. bochs.py fills in the table at 0x1c0: (lba, sectors, address) a piece, then (0, 0, entry).
 */
	.set PARAMS, 0x10000
	.set TABLES, 0x70000
	.set E820,   0x8000
	.code16
	.globl _start
_start:	ljmp $0, $1f
1:	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	xorl %ebx, %ebx
	xorw %bp, %bp
	movw $E820, %di
2:	movl $0xe820, %eax
	movl $20, %ecx
	movl $0x534d4150, %edx
	int $0x15
	jc 3f
	addw $20, %di
	incw %bp
	testl %ebx, %ebx
	jnz 2b
3:	movw %bp, count
	inb $0x92, %al
	orb $2, %al
	andb $0xfe, %al
	outb %al, $0x92
	lgdtl gdtr
	movl %cr0, %eax
	orb $1, %al
	movl %eax, %cr0
	ljmpl $0x08, $4f
	.code32
4:	movl $0x18, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0x7c00, %esp
	movw $0x3f6, %dx
	movb $2, %al		# no interrupts
	outb %al, %dx
	movl $table, %esi
5:	lodsl
	movl %eax, %ebx		# lba
	lodsl
	movl %eax, %ebp		# sectors
	lodsl
	movl %eax, %edi		# address
	testl %ebp, %ebp
	jz 9f
6:	movw $0x1f6, %dx
	movl %ebx, %eax
	shrl $24, %eax
	orb $0xe0, %al
	outb %al, %dx
	movl $128, %ecx
	cmpl %ecx, %ebp
	jae 7f
	movl %ebp, %ecx
7:	subl %ecx, %ebp
	movw $0x1f2, %dx
	movb %cl, %al
	outb %al, %dx
	movl %ebx, %eax
	incl %edx
	outb %al, %dx
	shrl $8, %eax
	incl %edx
	outb %al, %dx
	shrl $8, %eax
	incl %edx
	outb %al, %dx
	addl %ecx, %ebx
	movw $0x1f7, %dx
	movb $0x20, %al
	outb %al, %dx
8:	movw $0x1f7, %dx
	inb %dx, %al
	andb $0x88, %al		# BSY, DRQ
	cmpb $0x08, %al
	jne 8b
	pushl %ecx
	movw $0x1f0, %dx
	movl $256, %ecx
	rep insw
	popl %ecx
	loop 8b
	testl %ebp, %ebp
	jnz 6b
	jmp 5b
9:	movl %eax, entry	# the third word of the ending row
	movw $0x3f6, %dx
	movb $0, %al
	outb %al, %dx
	movl $E820, %esi
	movl $(PARAMS + 0x2d0), %edi
	movl $640, %ecx
	rep movsl
	movb count, %al
	movb %al, PARAMS + 0x1e8
	# identity map of 4 GiB in 2 MiB pages
	movl $TABLES, %edi
	xorl %eax, %eax
	movl $0x1800, %ecx
	rep stosl
	movl $(TABLES + 0x1003), TABLES
	movl $(TABLES + 0x2003), %eax
	movl $(TABLES + 0x1000), %edi
	movl $4, %ecx
10:	movl %eax, (%edi)
	addl $0x1000, %eax
	addl $8, %edi
	loop 10b
	movl $0x83, %eax
	movl $(TABLES + 0x2000), %edi
	movl $2048, %ecx
11:	movl %eax, (%edi)
	addl $0x200000, %eax
	addl $8, %edi
	loop 11b
	movl %cr4, %eax
	orb $0x20, %al
	movl %eax, %cr4
	movl $TABLES, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx
	rdmsr
	orb $1, %ah
	wrmsr
	movl $PARAMS, %esi
	movl entry, %edi
	movl %cr0, %eax
	orl $0x80000000, %eax
	movl %eax, %cr0
	ljmp $0x10, $12f
	.code64
12:	jmp *%rdi
	.balign 4
gdtr:	.word 31
	.long gdt
gdt:	.quad 0, 0x00cf9a000000ffff, 0x00af9a000000ffff, 0x00cf92000000ffff
	.set count, 0x7000
	.set entry, 0x7004
	.set table, 0x7c00 + 0x1c0
	.org 0x1c0
	.org 0x1fe
	.word 0xaa55
