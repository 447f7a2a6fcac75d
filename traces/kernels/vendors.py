# SPDX-License-Identifier: Apache-2.0
"""What differs between processors: the codes of exits and of nested page faults, whatever the kernel version.

AMD's are SVM exit codes and the error code of a nested page fault, which is that of #PF with more bits on top; Intel's
are VMX basic exit reasons and the exit qualification of an EPT violation (docs/kvm-mmu.md, "Vendors").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OFF: Final = ("N", "n", "0")  # what turns a module's parameter off, or says that it is


@dataclass(frozen=True)
class FaultCode:
    """How to read `kvm_page_fault.code`: each field is a mask, of which any bit that is set means yes."""

    present: int  # a leaf was there
    write: int
    fetch: int
    reserved: int  # the entry is an MMIO SPTE; 0: those do not come as page faults
    walk: tuple[int, int]  # (mask, value): the guest's own page tables were being read


@dataclass(frozen=True)
class Vendor:
    """One vendor's virtualization. Exits are values of `kvm_exit.code`; a tuple holds all codes of one meaning.

    `cr` and `msr` are (code, mask of the exit's `value`, wanted bits) of a write, because one code stands for several
    registers.
    """

    name: str  # svm, vmx
    cpu: str  # vendor_id of /proc/cpuinfo
    module: str
    paging: str  # its nested paging: npt, ept
    fault: FaultCode
    accessed: int  # the SPTE bits that the processor sets by itself
    dirty: int
    hlt: tuple[int, ...]
    mwait: tuple[int, ...]  # KVM emulates it as nothing: the guest idles, and comes again at once
    io: tuple[int, ...]
    interrupt: tuple[int, ...]
    asynchronous: tuple[int, ...]  # interrupts, NMIs, timers, windows, and PAUSE: the guest goes on where it was
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


SVM: Final = Vendor(
    name="svm",
    cpu="AuthenticAMD",
    module="kvm_amd",
    paging="npt",
    fault=FaultCode(present=1 << 0, write=1 << 1, fetch=1 << 4, reserved=1 << 3, walk=(1 << 33, 1 << 33)),
    accessed=1 << 5,
    dirty=1 << 6,
    hlt=(0x78, 0xA6),
    mwait=(0x8B, 0x8C),
    io=(0x7B,),
    interrupt=(0x60,),
    asynchronous=(0x60, 0x61, 0x62, 0x64, 0x77),
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
    hlt=(12,),
    mwait=(36, 67, 68),
    io=(30,),
    interrupt=(1,),
    asynchronous=(1, 7, 8, 40, 52),
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
    """Return the virtualization of a processor by its vendor_id; AMD's where that is not known."""
    return next((vendor for vendor in VENDORS if vendor.cpu == cpu), _LIKE.get(cpu, SVM))
