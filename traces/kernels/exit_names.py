# SPDX-License-Identifier: Apache-2.0
"""Names of KVM's exits to the host, by vendor, as /sys/kernel/tracing and perf kvm stat print them.

SVM exit codes are those of AMD's manual (volume 2, appendix C), VMX basic exit reasons those of Intel's (volume 3,
appendix C).
"""

from __future__ import annotations

from typing import Final

from traces.kernels.vendors import VMX, Vendor

_SVM: Final[dict[int, str]] = {
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

_VMX: Final[dict[int, str]] = {
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
_INVALID: Final = (1 << 64) - 1  # SVM: the guest's state was not valid; a 32-bit -1 on older kernels


def exit_name(vendor: Vendor, code: int) -> str:
    """Return an exit's name without the vendor's prefix; its number in hexadecimal where it has no name."""
    if vendor is VMX:
        failed = "FAILED_VMENTRY_" if code & 1 << 31 else ""
        return failed + _VMX.get(code & 0xFFFF, f"{code & 0xFFFF:#x}")
    return "ERR" if code in (_INVALID, _INVALID >> 32) else _SVM.get(code, f"{code:#x}")


def codes(vendor: Vendor) -> tuple[int, ...]:
    """Return the codes of the exits that have a name."""
    return tuple(_VMX if vendor is VMX else _SVM)
