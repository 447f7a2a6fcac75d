# SPDX-License-Identifier: Apache-2.0
"""Where the probes find things: offsets of the running kernel's structs, as #defines for the BPF programs.

Everything comes from BTF. The one exception is `struct kvm_mmu_page` on kernels before module BTF (5.11): KVM is a
module there and vmlinux knows the struct only by name, so offsets come from the kernel's description
(Kernel.page_struct).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracer.probing.btf import BTF_DIRECTORY, Btf
from tracer.probing.points import OLDEST
from traces.kernels import at

# macro name: (struct, alternatives in order of age, newest first)
_MEMBERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "VCPU_KVM": ("kvm_vcpu", ("kvm",)),
    "VCPU_ID": ("kvm_vcpu", ("vcpu_id",)),
    "VCPU_PID": ("kvm_vcpu", ("pid",)),
    "VCPU_MMU": ("kvm_vcpu", ("arch.mmu",)),
    "VCPU_ROOT_MMU": ("kvm_vcpu", ("arch.root_mmu",)),
    "VCPU_GUEST_MMU": ("kvm_vcpu", ("arch.guest_mmu",)),
    # root {hpa, pgd} since 5.18 (b9e5603c2a3a), root_hpa before
    "MMU_ROOT": ("kvm_mmu", ("root.hpa", "root_hpa")),
    # root_role since 5.19 (cpu_role/root_role split), mmu_role.base before
    "MMU_ROLE": ("kvm_mmu", ("root_role", "mmu_role.base")),
    "SP_ROLE": ("kvm_mmu_page", ("role",)),
    "SP_GFN": ("kvm_mmu_page", ("gfn",)),
    "SP_SPT": ("kvm_mmu_page", ("spt",)),
    "SP_REFS": ("kvm_mmu_page", ("tdp_mmu_root_count", "root_count")),
    "SP_PTEP": ("kvm_mmu_page", ("ptep",)),  # 5.18+, NULL in a TDP root
    "SP_TDP": ("kvm_mmu_page", ("tdp_mmu_page",)),
    "SP_UNSYNC": ("kvm_mmu_page", ("unsync",)),
    "SP_RCU": ("kvm_mmu_page", ("rcu_head", "callback_head")),
    "KVM_USED_PAGES": ("kvm", ("arch.n_used_mmu_pages",)),
    "KVM_GENERATION": ("kvm", ("arch.mmu_valid_gen",)),
    "KVM_ROOTS": ("kvm", ("arch.tdp_mmu_roots",)),
    "KVM_NOTIFIER": ("kvm", ("mmu_notifier",)),
    "KVM_MEMSLOTS": ("kvm", ("memslots",)),
    "SLOTS_HASH": ("kvm_memslots", ("id_hash",)),  # 5.17+ (a54d806688fe); an array with used_slots before
    "SLOTS_NODE": ("kvm_memslots", ("node_idx",)),
    "SLOTS_USED": ("kvm_memslots", ("used_slots",)),
    "SLOTS_ARRAY": ("kvm_memslots", ("memslots",)),
    "SLOT_NODE": ("kvm_memory_slot", ("id_node",)),
    "SLOT_GFN": ("kvm_memory_slot", ("base_gfn",)),
    "SLOT_PAGES": ("kvm_memory_slot", ("npages",)),
    "SLOT_HVA": ("kvm_memory_slot", ("userspace_addr",)),
    "SLOT_FLAGS": ("kvm_memory_slot", ("flags",)),
    "SLOT_ID": ("kvm_memory_slot", ("id",)),
    "FILE_PRIVATE": ("file", ("private_data",)),
    "FILE_DENTRY": ("file", ("f_path.dentry",)),
    "DENTRY_NAME": ("dentry", ("d_name.name", "__d_name.name")),
    "TASK_TGID": ("task_struct", ("tgid",)),
    "TASK_TID": ("task_struct", ("pid",)),
    "TASK_STATE": ("task_struct", ("__state", "state")),  # renamed in 5.14 (2f064a59a11f)
    "TASK_FILES": ("task_struct", ("files",)),
    "TASK_LEADER": ("task_struct", ("group_leader",)),
    "TASK_PID": ("task_struct", ("thread_pid",)),
    "TASK_COMM": ("task_struct", ("comm",)),
    "FILES_FDT": ("files_struct", ("fdt",)),
    "FDT_FD": ("fdtable", ("fd",)),
    "FDT_MAX": ("fdtable", ("max_fds",)),
    "PAGE_PRIVATE": ("page", ("private",)),
    "FAULT_ADDR": ("kvm_page_fault", ("addr",)),  # 5.16+ (f0066d94c92d: what tracepoints get)
    "FAULT_CODE": ("kvm_page_fault", ("error_code",)),
    "FAULT_GFN": ("kvm_page_fault", ("gfn",)),
    "FAULT_PFN": ("kvm_page_fault", ("pfn",)),
    "FAULT_LEVEL": ("kvm_page_fault", ("goal_level",)),
    "VCPU_RIP": ("kvm_vcpu", ("arch.rip",)),  # 7.x; before, one of arch.regs
    "VCPU_PROTECTED": ("kvm_vcpu", ("arch.guest_state_protected",)),
    "PID_NR": ("pid", ("numbers",)),
    "PID_LEVEL": ("pid", ("level",)),
}


# What is read at once of a struct: members near each other, of at most 8 bytes each.
MMU_MEMBERS = ("MMU_ROOT", "MMU_ROLE")
FAULT_MEMBERS = ("FAULT_ADDR", "FAULT_CODE", "FAULT_GFN", "FAULT_PFN", "FAULT_LEVEL")

# Without these there is no saying whose an event is, or which root's.
_NEEDED = (
    "VCPU_KVM", "VCPU_ID", "VCPU_PID", "VCPU_MMU", "MMU_ROOT", "MMU_ROLE", "SP_ROLE", "SP_GFN", "SP_SPT", "SP_REFS",
    "SP_TDP", "SP_UNSYNC", "FILE_PRIVATE", "FILE_DENTRY", "DENTRY_NAME", "TASK_TID", "TASK_TGID", "TASK_STATE",
    "TASK_FILES", "TASK_LEADER", "TASK_PID", "TASK_COMM", "FILES_FDT", "FDT_FD", "FDT_MAX", "PID_NR", "PID_LEVEL",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Offsets of struct members (bytes), the role word's fields, and the members that were not found (`missing`)."""

    offsets: dict[str, int]
    role: dict[str, tuple[int, int]]
    source: str
    missing: tuple[str, ...] = ()
    bases: dict[str, int] = field(default_factory=dict)
    spte: dict[str, Any] = field(default_factory=dict)

    def defines(self) -> str:
        """Return C #defines: OFF_X and HAVE_X for each known offset, and what the probes read of a role word."""
        lines = [f"#define OFF_{name} {value}\n#define HAVE_{name} 1" for name, value in sorted(self.offsets.items())]
        for name, members in (("MMU", MMU_MEMBERS), ("FAULT", FAULT_MEMBERS)):
            at = [self.offsets[member] for member in members if member in self.offsets] or [0]
            first = min(at) & ~7  # what is aligned in the struct has to be on the stack
            lines.append(f"#define {name}_FIRST {first}\n#define {name}_SPAN {max(at) + 8 - first}")
        invalid, smm = self.role.get("invalid", (31, 0)), self.role.get("smm", (24, 8))
        lines.append(f"#define ROLE_INVALID {((1 << invalid[1]) - 1) << invalid[0]:#x}u")
        lines.append(f"#define ROLE_SMM(role) (((role) >> {smm[0]}) & {(1 << smm[1]) - 1:#x}u)")
        return "\n".join(lines) + "\n"

    def unknown(self) -> str:
        """Return why this kernel cannot be recorded, in one line; empty where every offset needed is known."""
        lacking = [name for name in _NEEDED if name not in self.offsets]
        if not lacking:
            return ""
        structs = ", ".join(dict.fromkeys(f"struct {_MEMBERS[name][0]}" for name in lacking))
        if not (BTF_DIRECTORY / "kvm").exists():
            return (
                f"the layout of {structs} is not known: the kvm module loaded here has no BTF ({BTF_DIRECTORY}/kvm is "
                "missing) and its kernel is in no dated table: load one built with CONFIG_DEBUG_INFO_BTF_MODULES=y"
            )
        return f"the layout of {structs} is not known: {self.source} has no {', '.join(lacking)}"

    def metadata(self) -> dict[str, Any]:
        return {
            "role": {name: list(bits) for name, bits in self.role.items()},
            "spte": self.spte,
            "source": self.source,
            "missing": list(self.missing),
            # Without the direct map's base `table` holds the kernel's virtual frame, not the physical one.
            "table_is_physical": "PAGE_OFFSET_BASE" in self.bases,
        }


def kernel_layout(btf: Btf, version: tuple[int, int], bases: dict[str, int]) -> Layout:
    """Return this kernel's offsets: from BTF, else its description. For `bases` see attachments.kernel_bases."""
    kernel = at(f"{max(version, OLDEST)[0]}.{max(version, OLDEST)[1]}")
    offsets: dict[str, int] = {}
    for macro, (struct, alternatives) in _MEMBERS.items():
        for path in alternatives:
            member = btf.member(struct, path)
            if member is not None:
                offsets[macro] = member.offset
                break
    for macro, struct in (("PAGE_STRUCT_SIZE", "page"), ("SLOT_STRUCT_SIZE", "kvm_memory_slot")):
        if size := btf.size(struct):
            offsets[macro] = size
    if size := btf.member_size("kvm_page_fault", "error_code"):
        offsets["FAULT_CODE_SIZE"] = size
    registers, rip = btf.member("kvm_vcpu", "arch.regs"), btf.enumerator("kvm_reg", "VCPU_REGS_RIP")
    if registers and rip is not None:
        offsets["VCPU_RIP"] = registers.offset + 8 * rip
    role = btf.bitfields("kvm_mmu_page_role")
    source = "BTF of " + " and ".join(Path(path).name for path in btf.sources)
    if "SP_ROLE" not in offsets and kernel.page_struct:
        offsets.update(kernel.page_struct)
        source += f"; kvm_mmu_page from the dated table for {version[0]}.{version[1]} (no module BTF before 5.11)"
    if not role and kernel.page_struct:
        role = kernel.layout.shifts
    spte = {**kernel.spte.to_dict(), "source": "dated table of 2026-11: BTF does not name SPTE bits"}
    missing = tuple(macro for macro in _MEMBERS if macro not in offsets)
    return Layout(offsets, role, source, missing, bases, spte)
