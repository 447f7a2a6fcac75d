# SPDX-License-Identifier: Apache-2.0
"""Names of KVM's interface to userspace on x86: what KVM_RUN returns with, and ioctls (include/uapi/linux/kvm.h).

Numbers never change; later kernels add to them: SET_USER_MEMORY_REGION2, SET_MEMORY_ATTRIBUTES and CREATE_GUEST_MEMFD
are of 6.8, PRE_FAULT_MEMORY is of 6.11, the exits MEMORY_FAULT and TDX are of 6.8 and 6.16.
"""

from __future__ import annotations

import errno
from typing import Final

USER_EXITS: Final = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", 5: "HLT", 6: "MMIO", 7: "IRQ_WINDOW_OPEN",
    8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR", 11: "SET_TPR", 12: "TPR_ACCESS", 16: "NMI", 17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT", 26: "IOAPIC_EOI", 27: "HYPERV", 29: "X86_RDMSR", 30: "X86_WRMSR", 31: "DIRTY_RING_FULL",
    32: "AP_RESET_HOLD", 33: "X86_BUS_LOCK", 34: "XEN", 37: "NOTIFY", 39: "MEMORY_FAULT", 40: "TDX",
}  # fmt: skip
IOCTLS: Final = {
    0xae00: "GET_API_VERSION", 0xae01: "CREATE_VM", 0xc004ae02: "GET_MSR_INDEX_LIST", 0xae03: "CHECK_EXTENSION",
    0xae04: "GET_VCPU_MMAP_SIZE", 0xc008ae05: "GET_SUPPORTED_CPUID", 0xc008ae09: "GET_EMULATED_CPUID",
    0xc004ae0a: "GET_MSR_FEATURE_INDEX_LIST", 0xae41: "CREATE_VCPU", 0x4010ae42: "GET_DIRTY_LOG",
    0xae44: "SET_NR_MMU_PAGES", 0xae45: "GET_NR_MMU_PAGES", 0x4020ae46: "SET_USER_MEMORY_REGION",
    0xae47: "SET_TSS_ADDR", 0x4008ae48: "SET_IDENTITY_MAP_ADDR", 0x40a0ae49: "SET_USER_MEMORY_REGION2",
    0xae60: "CREATE_IRQCHIP", 0x4008ae61: "IRQ_LINE", 0xc208ae62: "GET_IRQCHIP", 0x8208ae63: "SET_IRQCHIP",
    0xae64: "CREATE_PIT", 0xc048ae65: "GET_PIT", 0x8048ae66: "SET_PIT", 0x4010ae67: "REGISTER_COALESCED_MMIO",
    0xc008ae67: "IRQ_LINE_STATUS", 0x4010ae68: "UNREGISTER_COALESCED_MMIO", 0x4008ae6a: "SET_GSI_ROUTING",
    0xae71: "REINJECT_CONTROL", 0x4020ae76: "IRQFD", 0x4040ae77: "CREATE_PIT2", 0xae78: "SET_BOOT_CPU_ID",
    0x4040ae79: "IOEVENTFD", 0x4038ae7a: "XEN_HVM_CONFIG", 0x4030ae7b: "SET_CLOCK", 0x8030ae7c: "GET_CLOCK",
    0xae80: "RUN", 0x8090ae81: "GET_REGS", 0x4090ae82: "SET_REGS", 0x8138ae83: "GET_SREGS", 0x4138ae84: "SET_SREGS",
    0xc018ae85: "TRANSLATE", 0x4004ae86: "INTERRUPT", 0xc008ae88: "GET_MSRS", 0x4008ae89: "SET_MSRS",
    0x4008ae8a: "SET_CPUID", 0x4004ae8b: "SET_SIGNAL_MASK", 0x81a0ae8c: "GET_FPU", 0x41a0ae8d: "SET_FPU",
    0x8400ae8e: "GET_LAPIC", 0x4400ae8f: "SET_LAPIC", 0x4008ae90: "SET_CPUID2", 0xc008ae91: "GET_CPUID2",
    0xc028ae92: "TPR_ACCESS_REPORTING", 0x4008ae93: "SET_VAPIC_ADDR", 0x8004ae98: "GET_MP_STATE",
    0x4004ae99: "SET_MP_STATE", 0xae9a: "NMI", 0x4048ae9b: "SET_GUEST_DEBUG", 0x4008ae9c: "X86_SETUP_MCE",
    0x8008ae9d: "X86_GET_MCE_CAP_SUPPORTED", 0x4040ae9e: "X86_SET_MCE", 0x8040ae9f: "GET_VCPU_EVENTS",
    0x8070ae9f: "GET_PIT2", 0x4040aea0: "SET_VCPU_EVENTS", 0x4070aea0: "SET_PIT2", 0x8080aea1: "GET_DEBUGREGS",
    0xaea2: "SET_TSC_KHZ", 0x4080aea2: "SET_DEBUGREGS", 0xaea3: "GET_TSC_KHZ", 0x4068aea3: "ENABLE_CAP",
    0x9000aea4: "GET_XSAVE", 0x4020aea5: "SIGNAL_MSI", 0x5000aea5: "SET_XSAVE", 0x8188aea6: "GET_XCRS",
    0x4188aea7: "SET_XCRS", 0x4010aeab: "GET_ONE_REG", 0x4010aeac: "SET_ONE_REG", 0xaead: "KVMCLOCK_CTRL",
    0x4020aeb2: "SET_PMU_EVENT_FILTER", 0xaeb7: "SMI", 0xc008aeba: "MEMORY_ENCRYPT_OP",
    0x8010aebb: "MEMORY_ENCRYPT_REG_REGION", 0x8010aebc: "MEMORY_ENCRYPT_UNREG_REGION", 0x4018aebd: "HYPERV_EVENTFD",
    0xc080aebe: "GET_NESTED_STATE", 0x4080aebf: "SET_NESTED_STATE", 0xc018aec0: "CLEAR_DIRTY_LOG",
    0xc008aec1: "GET_SUPPORTED_HV_CPUID", 0x4188aec6: "X86_SET_MSR_FILTER", 0xaec7: "RESET_DIRTY_RINGS",
    0xc048aec8: "XEN_HVM_GET_ATTR", 0x4048aec9: "XEN_HVM_SET_ATTR", 0xc048aeca: "XEN_VCPU_GET_ATTR",
    0x4048aecb: "XEN_VCPU_SET_ATTR", 0x8140aecc: "GET_SREGS2", 0x4140aecd: "SET_SREGS2", 0xaece: "GET_STATS_FD",
    0x9000aecf: "GET_XSAVE2", 0x400caed0: "XEN_HVM_EVTCHN_SEND", 0x4020aed2: "SET_MEMORY_ATTRIBUTES",
    0xc040aed4: "CREATE_GUEST_MEMFD", 0xc040aed5: "PRE_FAULT_MEMORY", 0xc00caee0: "CREATE_DEVICE",
    0x4018aee1: "SET_DEVICE_ATTR", 0x4018aee2: "GET_DEVICE_ATTR", 0x4018aee3: "HAS_DEVICE_ATTR",
}  # fmt: skip


def user_exit_name(reason: int, ret: int) -> str:
    """Return a name such as `KVM_EXIT_IO`, or the error where KVM_RUN failed (`ret` < 0): `KVM_RUN: EINTR`."""
    if ret < 0:
        return f"KVM_RUN: {errno.errorcode.get(-ret, -ret)}"
    return f"KVM_EXIT_{USER_EXITS.get(reason, reason)}"


def ioctl_name(command: int) -> str:
    """Return a name such as `KVM_SET_USER_MEMORY_REGION`; the number where an ioctl has no name."""
    name = IOCTLS.get(command)
    return f"KVM_{name}" if name else f"{command:#x}"
