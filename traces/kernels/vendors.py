"""What differs between processors: the codes of exits and of nested page faults. Of the hardware, not of a kernel.

AMD's are SVM exit codes and the error code of a nested page fault, which is that of #PF with more bits on top; Intel's
are VMX basic exit reasons and the exit qualification of an EPT violation (docs/kvm-mmu.md, "Vendors").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class FaultCode:
    """How `kvm_page_fault.code` reads. Masks: any of their bits says so."""

    present: int  # a leaf was there
    write: int
    fetch: int
    reserved: int  # the entry is an MMIO SPTE; 0: those do not come as page faults
    walk: tuple[int, int]  # (mask, value): the guest's own page tables were being read

    def is_walk(self, code: int) -> bool:
        """Whether the processor read the guest's page tables, rather than data."""
        return code & self.walk[0] == self.walk[1]


@dataclass(frozen=True)
class Vendor:
    """One vendor's virtualization. Exits are `kvm_exit.code`; tuples hold every code of a meaning.

    `cr` and `msr` are (code, mask of the exit's `value`, wanted bits) of a write, where one code is for several.
    """

    name: str  # svm, vmx
    cpu: str  # vendor_id of /proc/cpuinfo
    module: str
    paging: str  # its nested paging: npt, ept
    fault: FaultCode
    accessed: int  # the SPTE bits that the processor sets by itself
    dirty: int
    exits: Mapping[int, str] = field(repr=False, hash=False)
    hlt: tuple[int, ...]
    io: tuple[int, ...]
    interrupt: tuple[int, ...]
    nested_fault: tuple[int, ...]
    mmio: tuple[int, ...]  # an access to a cached MMIO SPTE, where it has an exit of its own
    rsm: tuple[int, ...]
    undefined: tuple[int, ...]  # #UD, by which an RSM may come; with other exceptions on VMX
    invpcid: tuple[int, ...]
    cr: int | None  # one exit for all control registers, with the register in bits 3:0 of the exit's `value`
    cr0_write: tuple[int, ...]
    cr4_write: tuple[int, ...]
    msr: int | None  # one exit for reads and writes, a write having bit 0 of the exit's `value`
    msr_write: tuple[int, ...]

    def exit_name(self, code: int) -> str:
        """An exit's name without the vendor's prefix; its number where it has none."""
        return self.exits.get(code & 0xFFFF if self.name == "vmx" else code, f"{code:#x}")


_SVM: Final = {
    **{0x00 + n: f"READ_CR{n}" for n in (0, 2, 3, 4, 8)},
    **{0x10 + n: f"WRITE_CR{n}" for n in (0, 2, 3, 4, 8)},
    **{0x20 + n: f"READ_DR{n}" for n in range(8)},
    **{0x30 + n: f"WRITE_DR{n}" for n in range(8)},
    **{0x40 + n: f"EXCP_{name}" for n, name in (
        (0, "DE"), (1, "DB"), (3, "BP"), (4, "OF"), (5, "BR"), (6, "UD"), (7, "NM"), (8, "DF"), (10, "TS"), (11, "NP"),
        (12, "SS"), (13, "GP"), (14, "PF"), (16, "MF"), (17, "AC"), (18, "MC"), (19, "XF"), (21, "CP"),
    )},
    0x60: "INTR", 0x61: "NMI", 0x62: "SMI", 0x63: "INIT", 0x64: "VINTR", 0x65: "CR0_SEL_WRITE", 0x66: "IDTR_READ",
    0x67: "GDTR_READ", 0x68: "LDTR_READ", 0x69: "TR_READ", 0x6A: "IDTR_WRITE", 0x6B: "GDTR_WRITE", 0x6C: "LDTR_WRITE",
    0x6D: "TR_WRITE", 0x6E: "RDTSC", 0x6F: "RDPMC", 0x70: "PUSHF", 0x71: "POPF", 0x72: "CPUID", 0x73: "RSM",
    0x74: "IRET", 0x75: "SWINT", 0x76: "INVD", 0x77: "PAUSE", 0x78: "HLT", 0x79: "INVLPG", 0x7A: "INVLPGA",
    0x7B: "IOIO", 0x7C: "MSR", 0x7D: "TASK_SWITCH", 0x7E: "FERR_FREEZE", 0x7F: "SHUTDOWN", 0x80: "VMRUN",
    0x81: "VMMCALL", 0x82: "VMLOAD", 0x83: "VMSAVE", 0x84: "STGI", 0x85: "CLGI", 0x86: "SKINIT", 0x87: "RDTSCP",
    0x88: "ICEBP", 0x89: "WBINVD", 0x8A: "MONITOR", 0x8B: "MWAIT", 0x8C: "MWAIT_COND", 0x8D: "XSETBV", 0x8E: "RDPRU",
    0x8F: "EFER_WRITE_TRAP", **{0x90 + n: f"CR{n}_WRITE_TRAP" for n in (0, 4, 8)}, 0xA2: "INVPCID",
    0xA5: "BUS_LOCK", 0xA6: "IDLE_HLT", 0x400: "NPF", 0x401: "AVIC_INCOMPLETE_IPI", 0x402: "AVIC_UNACCELERATED_ACCESS",
    0x403: "VMGEXIT",
}  # fmt: skip

_VMX: Final = {
    0: "EXCEPTION_NMI", 1: "EXTERNAL_INTERRUPT", 2: "TRIPLE_FAULT", 3: "INIT_SIGNAL", 4: "SIPI_SIGNAL", 6: "OTHER_SMI",
    7: "INTERRUPT_WINDOW", 8: "NMI_WINDOW", 9: "TASK_SWITCH", 10: "CPUID", 12: "HLT", 13: "INVD", 14: "INVLPG",
    15: "RDPMC", 16: "RDTSC", 17: "RSM", 18: "VMCALL", 19: "VMCLEAR", 20: "VMLAUNCH", 21: "VMPTRLD", 22: "VMPTRST",
    23: "VMREAD", 24: "VMRESUME", 25: "VMWRITE", 26: "VMOFF", 27: "VMON", 28: "CR_ACCESS", 29: "DR_ACCESS",
    30: "IO_INSTRUCTION", 31: "MSR_READ", 32: "MSR_WRITE", 33: "INVALID_STATE", 34: "MSR_LOAD_FAIL",
    36: "MWAIT_INSTRUCTION", 37: "MONITOR_TRAP_FLAG", 39: "MONITOR_INSTRUCTION", 40: "PAUSE_INSTRUCTION",
    41: "MCE_DURING_VMENTRY", 43: "TPR_BELOW_THRESHOLD", 44: "APIC_ACCESS", 45: "EOI_INDUCED", 46: "GDTR_IDTR",
    47: "LDTR_TR", 48: "EPT_VIOLATION", 49: "EPT_MISCONFIG", 50: "INVEPT", 51: "RDTSCP", 52: "PREEMPTION_TIMER",
    53: "INVVPID", 54: "WBINVD", 55: "XSETBV", 56: "APIC_WRITE", 57: "RDRAND", 58: "INVPCID", 59: "VMFUNC",
    60: "ENCLS", 61: "RDSEED", 62: "PML_FULL", 63: "XSAVES", 64: "XRSTORS", 67: "UMWAIT", 68: "TPAUSE", 74: "BUS_LOCK",
    75: "NOTIFY",
}  # fmt: skip

SVM: Final = Vendor(
    name="svm",
    cpu="AuthenticAMD",
    module="kvm_amd",
    paging="npt",
    fault=FaultCode(present=1 << 0, write=1 << 1, fetch=1 << 4, reserved=1 << 3, walk=(1 << 33, 1 << 33)),
    accessed=1 << 5,
    dirty=1 << 6,
    exits=_SVM,
    hlt=(0x78, 0xA6),
    io=(0x7B,),
    interrupt=(0x60,),
    nested_fault=(0x400,),
    mmio=(),
    rsm=(0x73,),
    undefined=(0x46,),
    invpcid=(0xA2,),
    cr=None,
    cr0_write=(0x10, 0x65),
    cr4_write=(0x14,),
    msr=0x7C,
    msr_write=(),
)
VMX: Final = Vendor(
    name="vmx",
    cpu="GenuineIntel",
    module="kvm_intel",
    paging="ept",
    # Bits 5:3 say what the entry allowed; bit 7 that a guest address goes with it, bit 8 that it was its final page.
    fault=FaultCode(present=7 << 3, write=1 << 1, fetch=1 << 2, reserved=0, walk=(3 << 7, 1 << 7)),
    accessed=1 << 8,
    dirty=1 << 9,
    exits=_VMX,
    hlt=(12,),
    io=(30,),
    interrupt=(1,),
    nested_fault=(48,),
    mmio=(49,),
    rsm=(17,),
    undefined=(0,),
    invpcid=(58,),
    cr=28,
    cr0_write=(),
    cr4_write=(),
    msr=None,
    msr_write=(32,),
)
VENDORS: Final = (SVM, VMX)

_LIKE: Final = {"HygonGenuine": SVM, "CentaurHauls": VMX, "  Shanghai  ": VMX}


def vendor_of(cpu: str) -> Vendor:
    """The virtualization of a processor by its vendor_id; AMD's where that is not known."""
    return next((vendor for vendor in VENDORS if vendor.cpu == cpu), _LIKE.get(cpu, SVM))
