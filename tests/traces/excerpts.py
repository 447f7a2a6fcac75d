# SPDX-License-Identifier: Apache-2.0
"""Lines as kernels, trace-cmd and perf print them, by era, with the row that each is; and what mailers do to lines."""

# ruff: noqa: E501 - lines stand as tools print them

from __future__ import annotations

import binascii
import html
import random
import textwrap
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """A line, the kind of its row (empty: it makes none), and some of the row's columns."""

    text: str
    kind: str = ""
    row: dict[str, Any] = field(default_factory=dict)


def _line(text: str, kind: str = "", **row: Any) -> Line:
    return Line(text, kind, row)


# By where they come from; each list is a whole file.
EXCERPTS: dict[str, list[Line]] = {
    "2.6.32": [
        _line("     qemu-kvm-2133  [001]  5051.271840: kvm_entry: vcpu 0", "kvm_entry", vcpu=0, tid=2133, cpu=1,
              time=5051271840000),
        _line("     qemu-kvm-2133  [001]  5051.271845: kvm_exit: reason EPT_VIOLATION rip 0xfff0", "kvm_exit",
              code=48, rip=0xFFF0),
        _line("     qemu-kvm-2133  [001]  5051.271847: kvm_page_fault: address 1f400000 error_code 182",
              "kvm_page_fault", addr=0x1F400000, code=0x182, rip=0),
        _line("     qemu-kvm-2133  [001]  5051.271850: kvm_mmu_get_page: existing sp gfn 3a22e 1/4 q3 direct --x !pge "
              "!nxe root 6 sync", "kvm_mmu_get_page", gfn=0x3A22E, level=1, refs=6, flags=0),
        _line("     qemu-kvm-2133  [001]  5051.271852: kvm_mmu_get_page: sp gfn 10 4/4 q0 direct wux pge !nxe root 0 "
              "unsync new", "kvm_mmu_get_page", gfn=0x10, level=4, refs=0, flags=3),
        _line("     qemu-kvm-2133  [001]  5051.271855: kvm_msr: msr_write c0000080 = 0x500", "kvm_msr", code=0xC0000080,
              value=0x500, flags=1),
    ],
    "3.x": [
        _line(" qemu-system-x86-4011  [003]   101.000123: kvm_mmu_get_page: new sp gfn 0 4 q0 direct wux pae !nxe !wp "
              "root 0 sync", "kvm_mmu_get_page", gfn=0, level=4, flags=1),
        _line(" qemu-system-x86-4011  [003]   101.000124: kvm_mmu_prepare_zap_page: sp gfn 800 1 pae q1 -u- invalid nxe "
              "root 2 unsync", "kvm_mmu_prepare_zap_page", gfn=0x800, level=1, refs=2, flags=2),
        _line(" qemu-system-x86-4011  [003]   101.000125: kvm_exit: reason CR_ACCESS rip 0x8012ab info 4 0", "kvm_exit",
              code=28, value=4, addr=0),
        _line(" qemu-system-x86-4011  [003]   101.000126: kvm_cr: cr_write 0 = 0x80050033", "kvm_cr", code=0,
              value=0x80050033, flags=1),
        _line(" qemu-system-x86-4011  [003]   101.000127: kvm_pio: pio_write at 0x70 size 1 count 1 val 0x8f ",
              "kvm_pio", code=0x70, value=0x8F, flags=1),
        _line(" qemu-system-x86-4011  [003]   101.000128: kvm_exit: reason UNKNOWN (77) rip 0x1", "kvm_exit", code=77),
    ],
    "5.4": [
        _line("       CPU 3/KVM-5120    [006] d...  8123.400217: kvm_mmu_get_page: sp gen 0 gfn 14b600 l1 8-byte q0 "
              "direct wux nxe ad root 0 sync new", "kvm_mmu_get_page", gfn=0x14B600, level=1, flags=1, tid=5120, vcpu=3),
        _line("       CPU 3/KVM-5120    [006] d...  8123.400218: kvm_mmu_set_spte: gfn 800 spte 100b4a00ea7 (rwxu) "
              "level 2 at 10052fa5020", "kvm_mmu_set_spte", gfn=0x800, new=0x100B4A00EA7, level=2, table=0x10052FA5),
        _line("       CPU 3/KVM-5120    [006] ....  8123.400219: kvm_entry: vcpu 3, rip 0x7f08a4602116", "kvm_entry",
              vcpu=3, rip=0x7F08A4602116),
        _line("       CPU 3/KVM-5120    [006] d...  8123.400220: kvm_enter_smm: vcpu 3: entering SMM, smbase 0x30000",
              "kvm_smm_transition", addr=0x30000, flags=1),
        _line("       CPU 3/KVM-5120    [006] d...  8123.400221: kvm_nested_vmrun: rip: 0x0000000000000001 vmcb: "
              "0x0000000000002000 nrip: 0x0000000000000003 int_ctl: 0x00000000 event_inj: 0x00000000 npt: on",
              "kvm_nested_vmenter", rip=3, addr=0x2000),
        _line("       CPU 3/KVM-5120    [006] d...  8123.400222: kvm_apicv_update_request: deactivate bit=2",
              "kvm_apicv_inhibit_changed", code=2, flags=1),
    ],
    "6.1": [
        _line("# tracer: nop"),
        _line("# entries-in-buffer/entries-written: 812/9340   #P:8"),
        _line("       CPU 3/KVM-5120    [006] d..1.  8123.400217: kvm_exit: vcpu 3 reason EPT_VIOLATION rip 0x401a2b "
              "info1 0x0000000000000182 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000",
              "kvm_exit", vcpu=3, code=48, rip=0x401A2B, value=0x182, addr=0, cpu=6),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400219: kvm_page_fault: vcpu 3 rip 0x7f08a4602116 address "
              "0x0000000113600002 error_code 0x500000004", "kvm_page_fault", addr=0x113600002, code=0x500000004, vcpu=3),
        _line("CPU:6 [LOST 771 EVENTS]", "gap", value=771, cpu=6),
        _line("##### CPU 1 buffer started ####"),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400223: fast_page_fault: vcpu 3 gva 20fe612 error_code F sptep "
              "00000000fd98c937 old 0x61000034d4fe877 new 61000034d4fe877 spurious 1 fixed 0", "fast_page_fault",
              addr=0x20FE612, code=16, old=0x61000034D4FE877),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400224: kvm_mmu_spte_requested: gfn 84d pfn 100b4a4d level 2",
              "kvm_mmu_spte_requested", gfn=0x84D, value=0x100B4A4D, level=2),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400225: kvm_tdp_mmu_spte_changed: as id 0 gfn 0 level 4 old_spte "
              "2c583e907 new_spte 5a0", "kvm_tdp_mmu_spte_changed", gfn=0, level=4, old=0x2C583E907, new=0x5A0),
        _line(" => kvm_tdp_mmu_map"),
        _line(" => <stack trace>"),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400226: kvm_userspace_exit: reason restart (4)",
              "kvm_userspace_exit", ret=-4),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400226: kvm_userspace_exit: reason error (14)",
              "kvm_userspace_exit", ret=-14),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400227: kvm_userspace_exit: reason KVM_EXIT_IO (2)",
              "kvm_userspace_exit", code=2, ret=0),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400228: kvm_emulate_insn: 0:1:f4 (prot32) failed",
              "kvm_emulate_insn", rip=1, flags=1),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400229: kvm_unmap_hva_range: mmu notifier unmap range: "
              "0x7f1200000000 -- 0x7f1200200000", "kvm_unmap_hva_range", addr=0x7F1200000000, value=0x7F1200200000),
        _line("       CPU 3/KVM-5120    [006] .....  8123.400230: kvm_apic: apic_write APIC_EOI = 0x0"),
    ],
    "6.18 on AMD": [
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567890: kvm_entry: vcpu 0, rip 0xfff0 intr_info 0x80000b0e "
              "error_code 0x00000004[immediate exit]", "kvm_entry", rip=0xFFF0, flags=1, tid=4711),
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567891: kvm_exit: vcpu 0 reason npf rip 0xfff0 info1 "
              "0x0000000100000014 info2 0x00000000fffff000 intr_info 0x00000000 error_code 0x00000000 requests "
              "0x0000000000000000", "kvm_exit", code=0x400, value=0x100000014, addr=0xFFFFF000),
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567892: kvm_exit: vcpu 0 reason PF excp rip 0x1 info1 0x1 "
              "info2 0x2 intr_info 0x3 error_code 0x4", "kvm_exit", code=0x4E, value=1, addr=2),
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567893: kvm_inj_exception: #PF (0x2)", "kvm_inj_exception",
              code=14, value=2, flags=1),
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567894: kvm_inj_exception: #UD", "kvm_inj_exception", code=6,
              value=0, flags=0),
        _line("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567895: kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0",
              "kvm_mmio", code=4 | 2 << 8, addr=0xFEE000B0),
    ],
    "trace-cmd report": [
        _line("version = 7"),
        _line("CPU 7 is empty"),
        _line("cpus=64"),
        _line("      vmm-worker-777   [003]   512.000431: kvm_page_fault:       address 1f400000 error_code 182",
              "kvm_page_fault", addr=0x1F400000, code=0x182, tid=777, cpu=3, time=512000431000),
        _line("      vmm-worker-777   [003]   512.000432123: kvm_entry:            vcpu 1 rip 0xfff0", "kvm_entry", vcpu=1,
              rip=0xFFF0, time=512000432123),
        _line("--"),
        _line("      vmm-worker-777   [003]   512.000433: kvm_exit:             reason EXIT_NPF rip 0xfff0 info 100000004 "
              "fffffff0", "kvm_exit", code=0x400, value=0x100000004),
    ],
    "trace-cmd report -l": [
        _line("kvmtrace-176     1d..1.  6555.876457: kvm_entry: vcpu 0, rip 0x1", "kvm_entry", cpu=1, tid=176, vcpu=0, rip=1),
        _line("qemu-170        13.N..2  6555.876458: kvm_page_fault: vcpu 0 rip 0x1000 address 0x0000000000001000 error_code "
              "0x100000014", "kvm_page_fault", cpu=13, tid=170, vcpu=0, rip=0x1000, addr=0x1000, code=0x100000014),
        _line("kvmtrace-102     0d..1.    46.049471: kvm_mmu_prepare_zap_page: 2 q0 direct wux !pae nxe wp smm root 0 sync",
              "kvm_mmu_prepare_zap_page", cpu=0, tid=102, level=2, refs=0, flags=0),
    ],
    "libtraceevent's fields": [  # as their print formats have them; those of formats that it cannot read in decimal
        _line("    kvmtrace-vmm-103   [001]    29.613217632: kvm_entry:             vcpu_id=0 rip=0x1000 immediate_exit=0",
              "kvm_entry", vcpu=0, rip=0x1000),
        _line("    kvmtrace-vmm-103   [001]    29.617350797: kvm_mmu_get_page:      mmu_valid_gen=0 gfn=1024 role=14211 "
              "root_count=0 unsync=0 created=1", "kvm_mmu_get_page", gfn=1024, role=14211, level=3, flags=1),
        _line("    kvmtrace-vmm-103   [001]    29.618144130: kvm_tdp_mmu_spte_changed:  gfn=400 old_spte=0 new_spte=16e68e67 "
              "level=1 as_id=0", "kvm_tdp_mmu_spte_changed", gfn=0x400, old=0, new=0x16E68E67, level=1, as_id=0),
        _line("    kvmtrace-vmm-103   [001]    29.618543566: kvm_mmu_set_spte:      gfn=10 spte=c0ffee sptep=64a6008 level=1 "
              "r=1 x=1 u=1", "kvm_mmu_set_spte", gfn=0x10, new=0xC0FFEE, table=0x64A6, level=1),
    ],
    "libtraceevent's fields of old": [  # all in decimal
        _line("    kvmtrace-vmm-103   [001]    29.613217632: kvm_entry:             vcpu_id=0 rip=4096", "kvm_entry", vcpu=0,
              rip=0x1000),
        _line("    kvmtrace-vmm-103   [001]    29.618144130: kvm_tdp_mmu_spte_changed:  gfn=400 old_spte=0 new_spte=16068067 "
              "level=1 as_id=0", "kvm_tdp_mmu_spte_changed", gfn=400, old=0, new=16068067, level=1),
    ],
    "trace-cmd report -R": [
        _line("cpus=2"),
        _line("      vmm-worker-777   [001]   512.000433: kvm_exit:             exit_reason=0x400 guest_rip=0xfff0 isa=2 "
              "info1=0x100000004 info2=0xfff intr_info=0 error_code=0 vcpu_id=1", "kvm_exit", code=0x400, vcpu=1,
              rip=0xFFF0, value=0x100000004, addr=0xFFF),
        _line("      vmm-worker-777   [001]   512.000434: kvm_mmu_get_page:     mmu_valid_gen=0 gfn=0x10 role=0x3784 "
              "root_count=1 unsync=0 created=1", "kvm_mmu_get_page", gfn=0x10, role=0x3784, level=4, refs=1, flags=1),
        _line("      vmm-worker-777   [001]   512.000435: kvm_userspace_exit:   reason=2 errno=-14", "kvm_userspace_exit",
              code=2, ret=-14),
    ],
    "perf script": [
        _line("   fc_vcpu 2  41770 [011] 90311.220001:       kvm:kvm_entry: vcpu 2, rip 0xffffffff81040000", "kvm_entry",
              vcpu=2, rip=0xFFFFFFFF81040000, tid=41770, cpu=11),
        _line("        ffffffffc0a1b2c3 vcpu_enter_guest+0x4a3 ([kvm])"),
        _line("            7f12cafe0000 [unknown] (/usr/lib/libc.so.6)"),
        _line(""),
        _line("   fc_vcpu 2  41700/41770 [011] 90311.220002:          1       kvm:kvm_page_fault: address 80000000 "
              "error_code 181", "kvm_page_fault", addr=0x80000000, code=0x181, tid=41770),
        _line("    kvmtrace-vmm 22437/22444 [001] 31215.732491225:         kvmmmu:kvm_mmu_get_page: [FAILED TO PARSE] "
              "mmu_valid_gen=0 gfn=256 role=14084 root_count=0 unsync=0 created=1", "kvm_mmu_get_page", gfn=256, role=14084,
              level=4, flags=1, tid=22444),
        _line("   fc_vcpu 2  41770 [011] 90311.220003: PERF_RECORD_LOST lost 24", "gap", value=24),
    ],
    "perf trace": [
        _line("     731.042 qemu-system-x8/2700 kvm:kvm_page_fault:address 80000000 error_code 181", "kvm_page_fault",
              addr=0x80000000, code=0x181, tid=2700, time=731042000),
        _line("     731.050 (         ): CPU 0/KVM/4711 kvm:kvm_entry(vcpu_id: 0, rip: 77)", "kvm_entry", vcpu=0, rip=77,
              tid=4711),
    ],
    "bare": [
        _line("kvm_exit: vcpu 1 reason CPUID rip 0x1234 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0", "kvm_exit",
              vcpu=1, code=10, rip=0x1234),
        _line("kvm:kvm_entry: vcpu 1, rip 0x1236", "kvm_entry", vcpu=1, rip=0x1236),
    ],
    "odd tasks": [
        _line("     a-b c-d [x] 7-12-99    [000] ....   1.000001: kvm_entry: vcpu 0", "kvm_entry", tid=99, vcpu=0),
        _line("           <...>-4242  [000]    1.000002: kvm_entry: vcpu 1", "kvm_entry", tid=4242, vcpu=1),
        _line("   migration/0-17     [000]    1.000003: kvm_unmap_hva_range: mmu notifier unmap range: 0x00007f12 -- 0x8f12",
              "kvm_unmap_hva_range", tid=17, addr=0x7F12, value=0x8F12),
        _line("   qemu-12  [000] .N..2.102   1.000004: kvm_entry: vcpu 2", "kvm_entry", tid=12),
    ],
    "latency format": [
        _line("# irqsoff latency trace v1.1.5 on 5.15.0-91-generic"),
        _line("#  cmd     pid     |||||| time  |   caller"),
        _line("CPU 0/KV-4021      3d..1. 1203us : kvm_entry: vcpu 0, rip 0xffffffff8104c0de", "kvm_entry", cpu=3, tid=4021,
              time=1203000, rip=0xFFFFFFFF8104C0DE),
        _line("CPU 0/KV-4021     13dN.21 1207us+: kvm_userspace_exit: reason KVM_EXIT_IO (2)", "kvm_userspace_exit", cpu=13,
              tid=4021, time=1207000, code=2),
        _line("CPU 0/KV-4021      3d..1. 1301us!: <stack trace>"),
    ],
    "function_graph": [
        _line("# tracer: function_graph"),
        _line(" 3)               |  /* kvm_entry: vcpu 0, rip 0xfff0 */", "kvm_entry", cpu=3, rip=0xFFF0, vcpu=0),
        _line(" 11)  CPU 1/K-4021  |               |  /* kvm_entry: vcpu 1, rip 0xfff1 */", "kvm_entry", cpu=11, tid=4021,
              rip=0xFFF1),
    ],
    "cut at the end": [
        _line("   qemu-12  [000] d...  1.000001: kvm_exit: vcpu 2 reason HLT rip 0x401a2b info1 0x0000000000000001 info2 "
              "0x0000000000000002 intr_info ...", "kvm_exit", code=12, rip=0x401A2B, value=1, addr=2),
        _line("   qemu-12  [000] d...  1.000002: kvm_exit: vcpu 2 reason HLT rip 0x401a2b info1 0x00000000000....", "other"),
        _line("   qemu-12  [000] d...  1.000003: kvm_exit: vcpu 2 reason HLT rip 0x401a2b ....", "other"),
        _line("   qemu-12  [000] d...  1.000004: kvm_page_fault: address ...", "other"),
        _line("   qemu-12  [000] d...  1.000005: kvm_entry: vcpu 2, rip 0x7", "kvm_entry", rip=7),
    ],
    "ticks": [
        _line("   qemu-12  [000] d...  98765432109: kvm_entry: vcpu 2", "kvm_entry", tid=12, time=98765432109),
    ],
}  # fmt: skip


def text_of(name: str) -> str:
    """An excerpt as a file."""
    return "".join(f"{line.text}\n" for line in EXCERPTS[name])


def mailed(text: str, seed: int) -> bytes:
    """The text as some mailer sends it: quoted 1 to 8 deep, wrapped, indented, with entities or in quoted-printable."""
    chosen = random.Random(seed)
    lines = []
    width = chosen.choice((68, 72, 76))
    wraps, indent = chosen.random() < 0.7, " " * chosen.randrange(12)
    for line in text.splitlines():
        parts = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) if wraps else [line]
        lines += [indent + part for part in parts or [""]]
    deep = chosen.randrange(9)
    mark = chosen.choice(("> " * deep, ">" * deep + (" " if deep else "")))
    quoted = "".join(f"{mark}{line}\n" for line in lines)
    how = chosen.choice(("plain", "html", "qp", "crlf"))
    head = "From: a@example.org\nSubject: Re: hang\n\nOn Monday b@example.org wrote:\n"
    if how == "html":
        return f"<pre>{html.escape(head + quoted)}</pre>".encode()
    if how == "crlf":
        return (head + quoted).replace("\n", "\r\n").encode()
    if how == "qp":
        head = "Content-Transfer-Encoding: quoted-printable\n" + head
        return binascii.b2a_qp((head + quoted).encode(), istext=True)
    return (head + quoted).encode()
