/* SPDX-License-Identifier: Apache-2.0 */
/* The scenarios. What each one shows is what `--list` says; it must need no other words. */
#include "vmm.h"

#include <string.h>

#define TIMEOUT 60
#define LOOPS(n) .loops = (n), .timeout = TIMEOUT
#define KSM "/sys/kernel/mm/ksm/"
#define KVM "/sys/module/kvm/parameters/"

static const struct guest_program halts = {.ends = END_BY_HALT};

const struct scenario scenarios[] = {
	{
		.name = "smi-storm",
		.shows = "an SMI after each pass: a policy that frees unused roots refills the whole working set each time",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1},
		.smm = SMM_REQUIRED,
		.between = smi_to_all,
	},
	{
		.name = "smi-one",
		.shows = "SMIs to one vCPU while another runs on the same pages: the other one's root keeps the tables alive",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 2},
		.min_vcpus = 2,
		.smm = SMM_REQUIRED,
		.together = true,
		.same_pages = true,
		.between = smi_to_first,
	},
	{
		.name = "smi-both",
		.shows = "SMIs to both vCPUs, one after the other: the normal root always has a user, the SMM root never keeps one",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 2},
		.min_vcpus = 2,
		.smm = SMM_REQUIRED,
		.between = smi_to_all,
	},
	{
		.name = "smi-grow",
		.shows = "SMIs while each pass touches --pages more than the one before: the cost of a lost root grows with use",
		.defaults = {LOOPS(5), .pages = 128, .vcpus = 1},
		.smm = SMM_REQUIRED,
		.growing = true,
		.between = smi_to_all,
	},
	{
		.name = "wp-toggle",
		.shows = "a paging guest flips CR0.WP after each pass: a reset with a new role on old kernels, nothing on new ones",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1},
		.guest = {.paging = true, .toggle = TOGGLE_CR0_WP},
	},
	{
		.name = "cr4-toggle",
		.shows = "a paging guest flips a CR4 bit after each pass: every kernel unloads for smep, only old ones for pge",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1, .bit = "smep"},
		.guest = {.paging = true, .toggle = TOGGLE_CR4},
		.choices = "smep|smap|pse|pge",
	},
	{
		.name = "efer-toggle",
		.shows = "a paging guest flips EFER.NX after each pass: every kernel unloads, and NX is in the role of old ones",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1},
		.guest = {.paging = true, .toggle = TOGGLE_EFER_NX},
	},
	{
		.name = "slot-delete",
		.shows = "the working set's memslot is deleted and made again after each pass: all roots go, or its leaves alone",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1, .how = "roots"},
		.prepare = choose_slot_zap,
		.between = delete_slot,
		.choices = "roots|leaves",
	},
	{
		.name = "slot-move",
		.shows = "a memslot that the guest never touches moves after each pass: all roots go nevertheless",
		.defaults = {LOOPS(5), .pages = 256, .vcpus = 1},
		.between = move_slot,
	},
	{
		.name = "slot-create",
		.shows = "a memslot is added after each pass: roots and tables stay",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1},
		.between = create_slot,
	},
	{
		.name = "notifier",
		.shows = "the host changes the memory under the guest after each pass: leaves go by MMU notifier, roots stay",
		.defaults = {LOOPS(5), .pages = 256, .vcpus = 1, .how = "mprotect"},
		.between = notify,
		.choices = "mprotect|dontneed",
	},
	{
		.name = "dirty-log",
		.shows = "dirty logging on, read, off between passes: write protection, and with --huge split and recovery",
		.defaults = {LOOPS(7), .pages = 256, .vcpus = 1, .how = "get"},
		.prepare = choose_dirty_log,
		.between = toggle_dirty_log,
		.choices = "get|clear|ring",
	},
	{
		.name = "huge",
		.shows = "SMIs on 2 MiB-backed memory: the refill costs one fault for 512 pages",
		.defaults = {LOOPS(5), .pages = 2048, .vcpus = 1, .huge = true},
		.smm = SMM_REQUIRED,
		.between = smi_to_all,
	},
	{
		.name = "mmio",
		.shows = "each pass also stores to addresses without a memslot, with SMIs where there is SMM: MMIO entries go with a root",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1, .mmio = 16},
		.smm = SMM_IF_PRESENT,
		.between = smi_to_all,
	},
	{
		.name = "churn",
		.shows = "each loop creates a VM, runs one pass and destroys it: the whole life of roots, and the teardown's cost",
		.defaults = {LOOPS(3), .pages = 512, .vcpus = 1},
		.vm_per_loop = true,
	},
	{
		.name = "two-vms",
		.shows = "two VMs at once, SMIs to the first one's first vCPU only: the second one's roots stay as they are",
		.defaults = {LOOPS(5), .pages = 256, .vcpus = 1},
		.smm = SMM_REQUIRED,
		.n_vms = 2,
		.together = true,
		.between = smi_to_first,
	},
	{
		.name = "other-thread",
		.shows = "vCPU threads reset each other's MMU, change the SMM root's memory, and one destroys the VM of both",
		.defaults = {LOOPS(7), .pages = 64, .vcpus = 2},
		.min_vcpus = 2,
		.smm = SMM_IF_PRESENT,
		.between = act_for_others,
		.ended_by_vcpu = true,
	},
	{
		.name = "late-vcpu",
		.shows = "a vCPU is created while another one runs, as by hotplug: it finds the root that is there",
		.defaults = {LOOPS(5000), .pages = 128, .vcpus = 2},
		.guest = {.passes_in_guest = true},
		.min_vcpus = 2,
		.late_vcpus = 1,
		.during = add_vcpus,
	},
	{
		.name = "one-mapping",
		.shows = "two VMs in one mapping, which the host changes after each pass and unmaps in the end: each loses its own",
		.defaults = {LOOPS(4), .pages = 64, .vcpus = 1},
		.n_vms = 2,
		.one_mapping = true,
		.between = notify_all,
	},
	{
		.name = "cross-fault",
		.shows = "one VM's vCPU thread writes to pages that another VM has read: the host's faults zap in that other VM",
		.defaults = {LOOPS(4), .pages = 64, .vcpus = 1},
		.guest = {.access = LOADS},
		.n_vms = 2,
		.between = write_to_second,
	},
	{
		.name = "steady",
		.shows = "a vCPU that never stops touching its pages: the control, one load and no unload until the end",
		.defaults = {LOOPS(5), .pages = 512, .vcpus = 1},
		.guest = {.passes_in_guest = true},
	},
	{
		.name = "roots",
		.shows = "a paging guest loads the next of --trees page-table trees after each pass: shadow roots made and found again",
		.defaults = {LOOPS(300), .pages = 8, .vcpus = 1, .trees = 100},
		.guest = {.paging = true, .toggle = TOGGLE_CR3},
	},
	{
		.name = "storm",
		.shows = "as roots, and each pass ends by an MMIO store: some 1600 emulator events a pass on a software KVM",
		.defaults = {LOOPS(1000), .pages = 64, .vcpus = 1, .trees = 100},
		.guest = {.paging = true, .toggle = TOGGLE_CR3, .ends = END_BY_DOORBELL},
	},
	{
		.name = "efault",
		.shows = "the host unmaps a page of the guest: every KVM_RUN from then on fails with EFAULT at the same place",
		.defaults = {LOOPS(400), .pages = 64, .vcpus = 1},
		.between = lose_page,
		.loses_memory = true,
	},
	{
		.name = "mmio-poll",
		.shows = "a guest that reads one address without a memslot for ever: every exit is the VMM's to answer",
		.defaults = {LOOPS(400), .pages = 64, .vcpus = 1},
		.guest = {.ends = END_BY_POLLING},
	},
	{
		.name = "bar",
		.shows = "device memory with one page that the VMM emulates, as an MSI-X table within a BAR: memslots round a hole",
		.defaults = {LOOPS(20), .pages = 16, .vcpus = 1, .mmio = 16},
		.prepare = make_bar,
	},
	{
		.name = "flash",
		.shows = "a guest that reads, then writes a read-only memslot: every write goes to the VMM, no page is mapped for it",
		.defaults = {LOOPS(20), .pages = 16, .vcpus = 1, .mmio = 16},
		.guest = {.access = LOADS_THEN_STORES},
		.prepare = make_flash,
	},
	{
		.name = "triple-fault",
		.shows = "every pass ends in a triple fault, and the VMM resets the vCPU: a guest that reboots for ever",
		.defaults = {LOOPS(10), .pages = 64, .vcpus = 1},
		.guest = {.ends = END_BY_TRIPLE_FAULT},
	},
	{
		.name = "lost-idt",
		.shows = "an exception whose IDT is where no memory is: KVM cannot go on and says so at every entry",
		.defaults = {LOOPS(400), .pages = 64, .vcpus = 1},
		.guest = {.ends = END_BY_LOST_IDT},
	},
	{
		.name = "not-emulated",
		.shows = "an instruction that KVM does not emulate, on an address without memory: an internal error at every entry",
		.defaults = {LOOPS(400), .pages = 64, .vcpus = 1},
		.guest = {.ends = END_BY_FNSAVE},
	},
	{
		.name = "idle",
		.shows = "a guest halted for 20 ms in each pass, in the kernel until an interrupt or in the VMM: not a hang",
		.defaults = {LOOPS(20), .pages = 64, .vcpus = 1, .how = "kernel"},
		.guest = {.ends = END_BY_HALT},
		.prepare = give_irqchip,
		.during = wake_halted,
		.choices = "kernel|userspace",
	},
	{
		.name = "one-idle",
		.shows = "two VMs, of which one gets SMIs and the other is halted in the kernel: only the first one is worth a look",
		.defaults = {LOOPS(10), .pages = 64, .vcpus = 1},
		.smm = SMM_IF_PRESENT,
		.others = &halts,
		.n_vms = 2,
		.prepare = give_irqchip,
		.between = smi_to_all,
		.during = wake_halted,
	},
	{
		.name = "apicv",
		.shows = "interrupts are blocked and let through between passes: APICv is inhibited, and the APIC's page is zapped",
		.defaults = {LOOPS(5), .pages = 64, .vcpus = 1},
		.guest = {.ends = END_BY_HALT},
		.prepare = give_irqchip,
		.between = inhibit_apicv,
		.during = wake_halted,
	},
	{
		.name = "cow",
		.shows = "fresh anonymous memory that the guest reads, then writes: every page is the zero page first, then its own",
		.defaults = {LOOPS(5), .pages = 64, .vcpus = 1},
		.guest = {.access = LOADS_THEN_STORES},
		.between = give_back,
	},
	{
		.name = "ksm",
		.shows = "the host merges the guest's pages after each pass (KSM): read, they are shared; written, copied",
		.defaults = {LOOPS(4), .pages = 64, .vcpus = 1},
		.guest = {.access = LOADS_THEN_STORES},
		.settings = {{KSM "sleep_millisecs", "10"}, {KSM "pages_to_scan", "1000"}, {KSM "run", "1"}},
		.between = merge_pages,
	},
	{
		.name = "nx-recovery",
		.shows = "huge pages without execute permission: what the guest executes is split to 4 KiB, then recovered, each pass",
		.defaults = {LOOPS(6), .pages = 1024, .vcpus = 1, .huge = true},
		.guest = {.calls = true},
		.settings = {
			{KVM "nx_huge_pages_recovery_ratio", "1"},
			{KVM "nx_huge_pages_recovery_period_ms", "50"},
			{KVM "nx_huge_pages", "force"},
		},
		.between = wait_for_recovery,
	},
	{
		.name = "notifier-storm",
		.shows = "the guest's memory is given back again and again while it runs, by a thread of the VMM or another process",
		.defaults = {LOOPS(2000), .pages = 32, .vcpus = 1, .how = "thread"},
		.guest = {.passes_in_guest = true},
		.prepare = start_other,
		.during = notify_often,
		.choices = "thread|process",
	},
	{
		.name = "slot-storm",
		.shows = "a memslot that the guest never touches is made and deleted while it runs, at least once a pass",
		.defaults = {LOOPS(20), .pages = 32, .vcpus = 1},
		.during = change_slots_often,
	},
};

const size_t n_scenarios = sizeof(scenarios) / sizeof(*scenarios);

const struct scenario *find_scenario(const char *name)
{
	for (size_t i = 0; i < n_scenarios; i++)
		if (strcmp(scenarios[i].name, name) == 0)
			return &scenarios[i];
	return NULL;
}
