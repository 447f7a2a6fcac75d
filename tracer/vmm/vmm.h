/* SPDX-License-Identifier: Apache-2.0 */
/* kvmtrace-vmm: a small VMM over /dev/kvm whose scenarios make MMU events in known numbers.
 *
 * A run is one or two VMs. Each vCPU has a thread of its own (the kernel names it by that thread) and runs in
 * passes: the guest touches its working set and ends the pass with an exit. Between passes, with every vCPU
 * stopped, the scenario changes something. That order is what makes the numbers repeatable.
 */
#ifndef KVMTRACE_VMM_H
#define KVMTRACE_VMM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 0x1000u
#define HUGE_PAGE 0x200000u
#define MAX_VCPUS 8u
#define MAX_VMS 2u
#define MAX_TREES 256u

/* Guest physical layout. Everything lies below 1 GiB, so that one page directory of 2 MiB entries maps it. */
#define LOW_BASE 0x0u          /* slot 0, 2 MiB: code, page tables, SMM handler */
#define CODE_GPA 0x1000u
#define PDPT_GPA 0x2000u
#define PD_GPA 0x3000u
#define HANDLER_GPA 0x4000u    /* of the interrupt that wakes a halted guest */
#define GDT_GPA 0x5000u
#define IDT_GPA 0x6000u
#define STACK_GPA 0x8000u      /* where the stack begins, downwards */
#define SMM_ENTRY_GPA 0x38000u /* the architectural SMBASE 0x30000, plus 0x8000 */
#define TREES_GPA 0x100000u    /* one top-level page table per tree */
#define HOLE_GPA 0x200000u     /* 2 MiB that no slot backs: MMIO */
#define DOORBELL_GPA 0x3ff000u /* last page of the hole: a store here ends a pass */
#define DATA_GPA 0x400000u     /* slot 1: the working sets, one after another, each on a 2 MiB boundary */
#define GUEST_TOP 0x40000000u
#define EXTRA_GPA GUEST_TOP    /* slots that the guest never touches begin here */

#define WAKE_VECTOR 0x40u
#define HALTED_US 20000u /* how long a halted guest is left alone */

#define PASS_PORT 0xe0u

enum slot { SLOT_LOW, SLOT_DATA, SLOT_EXTRA };

/* Exit codes of the program, the project's own. */
enum exit_code { EXIT_GUEST_FAILED = 1, EXIT_BAD_USAGE = 2, EXIT_NO_ABILITY = 3 };

/* What the user may choose. In a scenario's defaults, zero or NULL means "does not take this option". */
struct options {
	unsigned loops;
	unsigned pages; /* per vCPU, 4 KiB each */
	unsigned vcpus;
	unsigned trees;
	unsigned mmio; /* pages of the hole stored to in each pass */
	const char *bit;
	const char *how;
	bool huge;
	unsigned timeout; /* seconds */
};

/* What the guest itself does at the end of each pass. */
enum toggle { TOGGLE_NONE, TOGGLE_CR0_WP, TOGGLE_CR4, TOGGLE_EFER_NX, TOGGLE_CR3 };

/* What it does to each page of its working set, and of the hole. */
enum access { STORES, LOADS, LOADS_THEN_STORES };

/* How a pass ends. */
enum pass_end {
	END_BY_OUT,
	END_BY_DOORBELL,     /* a store to an address without memory */
	END_BY_POLLING,      /* loads from such an address for ever, each of which ends a pass */
	END_BY_HALT,         /* and, woken up, by OUT */
	END_BY_TRIPLE_FAULT, /* an exception, and no IDT */
	END_BY_LOST_IDT,     /* an exception, and the IDT where there is no memory */
	END_BY_FNSAVE,       /* an instruction that KVM does not emulate, to an address without memory */
};

struct guest_program {
	bool paging;          /* 64-bit mode with page tables; otherwise 32-bit flat protected mode */
	enum toggle toggle;
	uint32_t cr4_bit;     /* for TOGGLE_CR4 */
	unsigned mmio;        /* pages of the hole accessed in each pass */
	enum access access;
	enum pass_end ends;
	bool calls;           /* it also executes the first byte of each 2 MiB of its working set */
	bool passes_in_guest; /* all passes without an exit between them */
};

struct run;
struct vm;

struct vcpu {
	int fd;
	unsigned index;
	struct vm *vm;
	struct kvm_run *run;
	size_t run_size;
	pthread_t thread;
	sem_t go, done;
	bool quit;
	bool smi_due; /* inject an SMI just before the next entry */
	void (*errand)(struct run *run, struct vcpu *vcpu); /* instead of the next pass; see on_thread_of */
	unsigned pass;
	uint64_t guest_ns; /* wall time inside KVM_RUN */
	uint64_t smis, io_exits, mmio_exits;
	uint64_t halts, shutdowns, internal_errors, failed_runs;
	struct kvm_dirty_gfn *ring; /* of written pages, where the VM has dirty rings */
	unsigned ring_next;
	uint64_t ring_pages, ring_full;
};

struct vm {
	int fd;
	struct run *run;
	struct guest_program program;
	bool irqchip;     /* the kernel has its interrupt controllers: it halts there, too */
	bool smm;         /* this KVM has SMM, and with it a second address space */
	uint8_t *mapping; /* host memory as mapped, unaligned; NULL where it lies in run->mapping */
	size_t mapping_size;
	uint8_t *ram;     /* 2 MiB aligned: the low slot, then the data slot */
	size_t data_size; /* bytes in the data slot, a multiple of 2 MiB */
	unsigned n_vcpus;
	struct vcpu vcpus[MAX_VCPUS];
};

struct tally {
	uint64_t setup_ns, wall_ns;
	uint64_t guest_ns[MAX_VMS * MAX_VCPUS]; /* by VM, then vCPU; churn adds up its VMs, one after another */
	unsigned n_guest_ns;
	uint64_t vms, passes, smis, io_exits, mmio_exits;
	uint64_t halts, shutdowns, internal_errors, failed_runs;
	uint64_t slot_changes, host_calls, dirty_pages;
};

struct scenario;

struct run {
	const struct scenario *scenario;
	const struct options *options;
	int kvm; /* /dev/kvm */
	struct vm vms[MAX_VMS];
	unsigned n_vms;
	pid_t other;      /* the process that takes memory away, or 0 */
	int memory_file;  /* what guests' memory is, where another process shares it; otherwise -1 */
	uint8_t *mapping; /* where one mapping holds the memory of all VMs, one after another */
	size_t mapping_size;
	struct tally tally;
};

/* A setting of the host, by the file that has it. */
struct setting {
	const char *path, *value;
};
#define MAX_SETTINGS 4u

enum smm_use { SMM_UNUSED, SMM_IF_PRESENT, SMM_REQUIRED };

struct scenario {
	const char *name;
	const char *shows;
	struct options defaults;
	struct guest_program guest;
	enum smm_use smm;
	unsigned min_vcpus;
	struct setting settings[MAX_SETTINGS]; /* made before the first VM, and put back in the end */
	const struct guest_program *others; /* of all VMs after the first; NULL: the same guest */
	unsigned n_vms;       /* VMs that live at once; 0 means 1 */
	bool vm_per_loop;     /* every loop is a VM of its own */
	bool together;        /* after the first pass vCPUs run at the same time; otherwise always in turns */
	bool same_pages;      /* all vCPUs touch the same pages */
	bool growing;         /* pass k touches k times the pages */
	bool one_mapping;     /* the memory of all VMs is one mapping, unmapped at once while they live */
	bool loses_memory;    /* KVM_RUN fails with EFAULT where the guest accesses what the host no longer maps */
	unsigned late_vcpus;  /* of --vcpus, those that are created while the others run */
	bool ended_by_vcpu;   /* the first vCPU's thread unmaps the VM's memory, then destroys the VM */
	/* Called for each new VM, which has its memory and not yet its vCPUs. */
	void (*prepare)(struct run *run, struct vm *vm);
	/* Called between passes with all vCPUs stopped; `pass` counts the passes done so far, from 1. */
	void (*between)(struct run *run, unsigned pass);
	/* Called while the vCPUs run a pass, which they then do at the same time. */
	void (*during)(struct run *run);
	const char *choices; /* what --bit or --how may be, separated by | */
};

/* scenarios.c */
extern const struct scenario scenarios[];
extern const size_t n_scenarios;
const struct scenario *find_scenario(const char *name);

/* report.c */
void print_list(void);
void print_result(const struct run *run);
_Noreturn void fail(enum exit_code code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* memory.c */
void map_all(struct run *run, size_t data_size); /* one mapping for all VMs, from which map_ram then takes */
void unmap_all(struct run *run);
void map_ram(struct run *run, struct vm *vm, size_t data_size);
void unmap_ram(struct vm *vm);
void populate(uint8_t *start, size_t size); /* makes every page present and writable in the host; clears it */
void touch(uint8_t *start, size_t size);    /* the same, but leaves what is in it */
uint8_t *host_address(const struct vm *vm, uint32_t gpa);

/* host.c: settings of the host */
void make_settings(const struct scenario *scenario);
void put_settings_back(void); /* async-signal-safe */
unsigned long long read_setting(const char *path);

/* vm.c */
int open_kvm(void);
void create_vm(struct run *run, struct vm *vm);
void destroy_vm(struct vm *vm);
size_t working_set_bytes(const struct run *run);
void set_slot(struct run *run, struct vm *vm, unsigned slot, uint64_t gpa, size_t size, void *host, uint32_t flags);
unsigned slot_limit(const struct vm *vm);
void enable(const struct vm *vm, unsigned capability, uint64_t argument, const char *name);
void make_bar(struct run *run, struct vm *vm);
void make_flash(struct run *run, struct vm *vm);

/* vcpu.c */
void create_vcpu(struct run *run, struct vm *vm, unsigned index);
void reset_vcpu(struct vcpu *vcpu);  /* registers and mode as at the first entry, nothing pending */
void forget_exception(struct vcpu *vcpu);
void flip_cr4_pge(struct vcpu *vcpu);
void destroy_vcpu(struct vcpu *vcpu);
uint32_t cr4_bit_named(const char *name);

/* guest.c */
void write_guest(const struct vm *vm, unsigned trees);

/* run.c */
uint64_t now_ns(void);
void run_scenario(struct run *run);
bool all_done(struct run *run); /* the pass that the vCPUs run */
void on_thread_of(struct vcpu *vcpu, void (*errand)(struct run *run, struct vcpu *vcpu));
void start_thread(struct vcpu *vcpu);

/* changes.c: what a scenario changes between passes */
void smi_to_all(struct run *run, unsigned pass);
void smi_to_first(struct run *run, unsigned pass);
void choose_slot_zap(struct run *run, struct vm *vm);
void delete_slot(struct run *run, unsigned pass);
void inhibit_apicv(struct run *run, unsigned pass);
void move_slot(struct run *run, unsigned pass);
void create_slot(struct run *run, unsigned pass);
void notify(struct run *run, unsigned pass);
void act_for_others(struct run *run, unsigned pass);
void notify_all(struct run *run, unsigned pass);
void write_to_second(struct run *run, unsigned pass);
void give_back(struct run *run, unsigned pass);
void merge_pages(struct run *run, unsigned pass);
void lose_page(struct run *run, unsigned pass);
void wait_for_recovery(struct run *run, unsigned pass);

/* during.c: what it does while they run */
void start_other(struct run *run, struct vm *vm);
void notify_often(struct run *run);
void change_slots_often(struct run *run);
void give_irqchip(struct run *run, struct vm *vm);
void wake_halted(struct run *run);
void add_vcpus(struct run *run);

/* dirty.c: dirty logging by bitmap and by ring */
void choose_dirty_log(struct run *run, struct vm *vm);
void empty_ring(struct vcpu *vcpu);
void unmap_ring(struct vcpu *vcpu);
void toggle_dirty_log(struct run *run, unsigned pass);

#endif
