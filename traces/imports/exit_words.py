# SPDX-License-Identifier: Apache-2.0
"""How kernels and libtraceevent print the names of exits, and which vendor's they are."""

from __future__ import annotations

from typing import Final

from traces.kernels import exit_names
from traces.kernels.vendors import SVM, VMX, Vendor

VMX_BIT: Final = 0  # of a word's value, above 32 bits of code: 1 for SVM
SVM_BIT: Final = 1
FAILED_ENTRY: Final = 1 << 31

# Where the kernel's word is not the name in lower case (arch/x86/include/uapi/asm/svm.h, SVM_EXIT_REASONS).
_SVM_WORDS: Final = {
    0x60: "interrupt", 0x66: "read_idtr", 0x67: "read_gdtr", 0x68: "read_ldtr", 0x69: "read_rt", 0x6A: "write_idtr",
    0x6B: "write_gdtr", 0x6C: "write_ldtr", 0x6D: "write_rt", 0x7B: "io", 0x81: "hypercall", 0x8F: "write_efer_trap",
    0x90: "write_cr0_trap", 0x94: "write_cr4_trap", 0x98: "write_cr8_trap", 0xA5: "buslock", 0xA6: "idle-halt",
    0x8C: "mwait_cond",
}  # fmt: skip
_SVM_MORE: Final = {
    "invalid_guest_state": (1 << 32) - 1,
    "EXIT_ERR": (1 << 32) - 1,
    "vmgexit_mmio_read": 0x80000001,
    "vmgexit_mmio_write": 0x80000002,
}
_VMX_MORE: Final = {"PENDING_INTERRUPT": 7, "TDCALL": 77, "MSR_READ_IMM": 84, "MSR_WRITE_IMM": 85}  # until 5.6; 6.16


def svm_word(code: int) -> str:
    """A kernel's word for an SVM exit; the number where it has none."""
    if code in _SVM_WORDS:
        return _SVM_WORDS[code]
    if code == _SVM_MORE["invalid_guest_state"]:
        return "invalid_guest_state"
    name = exit_names.exit_name(SVM, code)
    return f"{name.removeprefix('EXCP_')} excp" if name.startswith("EXCP_") else name.lower()


def vmx_word(code: int) -> str:
    """A kernel's word for a VMX exit; the number where it has none."""
    name = exit_names.exit_name(VMX, code & 0xFFFF)
    return name + (" FAILED_VMENTRY" if code & FAILED_ENTRY else "")


def word(vendor: Vendor, code: int) -> str:
    """The kernel's word for an exit."""
    return vmx_word(code) if vendor is VMX else svm_word(code)


def words() -> dict[str, int]:
    """Each word that may be printed: code, and the vendor above it (`VMX_BIT`, `SVM_BIT`)."""
    svm, vmx = exit_names.codes(SVM), exit_names.codes(VMX)
    found = {vmx_word(code): code for code in vmx} | _VMX_MORE
    of_svm = {svm_word(code): code for code in svm}
    of_svm |= {f"EXIT_{exit_names.exit_name(SVM, code)}": code for code in svm} | _SVM_MORE  # libtraceevent's
    return found | {name: code | SVM_BIT << 32 for name, code in of_svm.items()}
