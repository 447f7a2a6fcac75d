# SPDX-License-Identifier: Apache-2.0
"""How kernels print the events of KVM, by version: the one dated table by which text is read and written.

A form is the text after an event's name. `{column:how}` is a column of the trace (`traces/schema.py`), `{:how}` what no
column holds, `{vcpu:d}` the row's vCPU. How:

    x, 08x, 016x     hexadecimal, with or without 0x (a 0x before it in the form is what this version prints)
    d, -d            decimal; its negative
    p, w             a pointer (hashed, or `(nil)`); a word
    a=1|b=0|=0       one of these texts, and its value; the last may be empty
    exit             the name of an exit (`exit_names`), or its number
    pferr            the bits of a page fault's error code by name, `P|W|U`
    perm             what a leaf allows, `rwxu`
    failed           whether the text ends with `failed`; takes what is left
    role.FIELD       of the column `role`: a field of the role word, by what the text says of it

`{column<<8:...}` is the column's bits from 8 on, `{table>>12:x}` a number of which the column holds the upper bits,
`{flags&1:d}` only the lowest bit of it. A blank stands for any number of blanks.

`since` is the first version that prints so. Sources: KVM's trace.h and mmutrace.h of 2.6.32, 3.6, 3.19, 4.x, a 4.19
with 5.1's events and 6.18, as read, and lines in public reports. Where the first version lies between two of these,
it is inferred. Dated 2026-11. `libtraceevent` has its own text for some events (its KVM plugin), which `trace-cmd
report` and `perf script` then show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

Since = tuple[int, int]
PLUGIN: Final = (0, 0)  # printed by libtraceevent's plugin, whatever the kernel


@dataclass(frozen=True)
class Form:
    """A form of an event's text: `kind` is the trace's name of it, `event` the kernel's.

    `when` restricts it to some rows: (column, relation, number).
    """

    kind: str
    event: str
    since: Since
    text: str
    when: tuple[str, str, int] | None = None


_EXC: Final = (
    "#DE=0|#DB=1|#BP=3|#OF=4|#BR=5|#UD=6|#NM=7|#DF=8|#TS=10|#NP=11|#SS=12|#GP=13|#PF=14|#MF=16|#AC=17|#MC=18|#XM=19"
    "|#VE=20|#CP=21|#HV=28|#VC=29|#SX=30"
)
_ACCESS: Final = "{role.access:---=0|--x=1|w--=2|w-x=3|-u-=4|-ux=5|wu-=6|wux=7}"
_TAIL: Final = "root {refs:d} {flags<<1:unsync=1|sync=0}"
_DIRECT: Final = "{role.direct:direct=1|=0}"
_INVALID: Final = "{role.invalid:invalid=1|=0}"
_NX: Final = "{role.nx:nxe=1|!nxe=0}"
_AD: Final = "{role.ad_disabled:ad=0|!ad=1}"
_SP_2_6_32: Final = f"sp gfn {{gfn:x}} {{level:d}}/{{:d}} q{{role.quadrant:d}} {_DIRECT} {_ACCESS} {_INVALID} "
_SP_3_0: Final = (
    f"sp gfn {{gfn:x}} {{level:d}} {{:pae=1|=0}} q{{role.quadrant:d}} {_DIRECT} {_ACCESS} {_INVALID} {_NX} {_TAIL}"
)
_SP_3_11: Final = _SP_3_0.replace("sp gfn", "sp gen {:x} gfn")
_SP_4_13: Final = _SP_3_11.replace("{level:d}", "l{level:d}").replace(_NX, f"{_NX} {_AD}")
_SP_5_1: Final = _SP_4_13.replace("{:pae=1|=0}", "{role.gpte:8-byte=8|4-byte=4}")
_SP_PLUGIN: Final = (
    f"sp gfn {{gfn:x}} {{level:d}} q{{role.quadrant:d}} {_DIRECT} {_ACCESS} {_INVALID} {{:pae=1|!pae=0}} {_NX} "
    f"{{:wp=1|!wp=0}} {{:smep=1|=0}} {{:smap=1|=0}} {{role.smm:smm=1|=0}} {_TAIL}"
)
_SP_OLD_PLUGIN: Final = _SP_2_6_32 + f"{{:pge=1|!pge=0}} {_NX} {_TAIL}"
_SP_PAGES: Final = (
    ((2, 6), _SP_OLD_PLUGIN),
    ((3, 0), _SP_3_0),
    ((3, 11), _SP_3_11),
    ((4, 13), _SP_4_13),
    ((5, 1), _SP_5_1),
)
_NEW: Final = "{flags:new=1|existing=0}"
_EXIT: Final = "reason {code:exit} rip 0x{rip:x}"
_EXIT_5_11: Final = (
    f"vcpu {{vcpu:d}} {_EXIT} info1 0x{{value:016x}} info2 0x{{addr:016x}} intr_info 0x{{:08x}} error_code 0x{{:08x}}"
)
_NESTED_OLD: Final = (
    "reason: {code:exit} ext_inf1: 0x{value:016x} ext_inf2: 0x{addr:016x} ext_int: 0x{:08x} ext_int_err: 0x{:08x}"
)


def _pages() -> tuple[Form, ...]:
    """Return forms of shadow pages' events; kvm_mmu_get_page's own word is last, or first as the plugin prints it."""
    forms: list[Form] = []
    for since, text in _SP_PAGES:
        forms.append(Form("kvm_mmu_get_page", "kvm_mmu_get_page", since, f"{text} {_NEW}"))
        zap = "kvm_mmu_zap_page" if since < (3, 0) else "kvm_mmu_prepare_zap_page"
        forms.append(Form("kvm_mmu_prepare_zap_page", zap, since, text))
        forms += [Form(kind, kind, since, text) for kind in ("kvm_mmu_sync_page", "kvm_mmu_unsync_page")]
    forms += [
        Form(kind, kind, PLUGIN, _SP_PLUGIN.removeprefix("sp gfn {gfn:x} "))
        for kind in ("kvm_mmu_prepare_zap_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page")
    ]  # libtraceevent cannot read the format of these events
    forms += [
        Form("kvm_mmu_get_page", "kvm_mmu_get_page", PLUGIN, f"{_NEW} {text}") for text in (_SP_PLUGIN, _SP_OLD_PLUGIN)
    ]
    forms += [
        Form("kvm_mmu_get_page", "kvm_mmu_get_page", PLUGIN, f"{_NEW} {text}") for since, text in _SP_PAGES[1:]
    ]  # this form is in mails with traces of 3.x and 4.x
    return tuple(forms)


FORMS: Final[tuple[Form, ...]] = (
    # Not a kernel's event: what perf says that it lost
    Form("gap", "PERF_RECORD_LOST", PLUGIN, "lost {value:d}"),
    *_pages(),
    Form("kvm_mmu_spte_requested", "kvm_mmu_spte_requested", (5, 1), "gfn {gfn:x} pfn {value:x} level {level:d}"),
    Form("kvm_mmu_set_spte", "kvm_mmu_set_spte", (5, 1),
         "gfn {gfn:x} spte {new:x} ({new:perm}) level {level:d} at {table>>12:x}"),
    Form("kvm_tdp_mmu_spte_changed", "kvm_tdp_mmu_spte_changed", (5, 12),
         "as id {as_id:d} gfn {gfn:x} level {level:d} old_spte {old:x} new_spte {new:x}"),
    Form("fast_page_fault", "fast_page_fault", (3, 6),
         "vcpu {vcpu:d} gva {addr:x} error_code {code:pferr} sptep {:p} old 0x{old:x} new {new:x} "
         "spurious {ret<<1:1=1|0=0} fixed {ret:1=1|0=0}"),
    Form("kvm_mmu_zap_all_fast", "kvm_mmu_invalidate_zap_all_pages", (3, 11),
         "kvm-mmu-valid-gen {flags&1:x} used_pages {value:x}"),
    Form("kvm_mmu_zap_all_fast", "kvm_mmu_zap_all_fast", (5, 1), "kvm-mmu-valid-gen {flags&1:d} used_pages {value:x}"),
    Form("kvm_mmu_split_huge_page", "kvm_mmu_split_huge_page", (5, 18),
         "gfn {gfn:x} spte {old:x} level {level:d} errno {ret:d}"),
    Form("mark_mmio_spte", "mark_mmio_spte", (3, 1), "sptep:{:p} gfn {gfn:x} access {code:x}"),
    Form("mark_mmio_spte", "mark_mmio_spte", (3, 11), "sptep:{:p} gfn {gfn:x} access {code:x} gen {value:x}"),
    Form("handle_mmio_page_fault", "handle_mmio_page_fault", (3, 1), "addr:{addr:x} gfn {gfn:x} access {code:x}"),
    Form("check_mmio_spte", "check_mmio_spte", (3, 11), "spte {old:x} kvm_gen {value:x} spte-gen {code:x} valid {:d}"),
    Form("kvm_mmu_pagetable_walk", "kvm_mmu_pagetable_walk", (2, 6), "addr {addr:x} pferr {code:x} {code:pferr}"),
    Form("kvm_mmu_paging_element", "kvm_mmu_paging_element", (2, 6), "pte {value:x} level {level:d}"),
    Form("kvm_mmu_set_accessed_bit", "kvm_mmu_set_accessed_bit", (2, 6), "gpa {addr:x}"),
    Form("kvm_mmu_set_dirty_bit", "kvm_mmu_set_dirty_bit", (2, 6), "gpa {addr:x}"),
    Form("kvm_mmu_walker_error", "kvm_mmu_walker_error", (2, 6), "pferr {code:x} {code:pferr}"),
    Form("kvm_page_fault", "kvm_page_fault", (2, 6), "address {addr:x} error_code {code:x}"),
    Form("kvm_page_fault", "kvm_page_fault", (6, 1),
         "vcpu {vcpu:d} rip 0x{rip:x} address 0x{addr:016x} error_code 0x{code:x}"),
    Form("kvm_entry", "kvm_entry", (2, 6), "vcpu {vcpu:d}"),
    Form("kvm_entry", "kvm_entry", PLUGIN, "vcpu {vcpu:d} rip 0x{rip:x}"),
    Form("kvm_entry", "kvm_entry", (5, 0), "vcpu {vcpu:d}, rip 0x{rip:x}"),
    # Also in late 6.1.y.
    Form("kvm_entry", "kvm_entry", (6, 10), "vcpu {vcpu:d}, rip 0x{rip:x}{flags:[immediate exit]=1|=0}"),
    Form("kvm_entry", "kvm_entry", (6, 14),
         "vcpu {vcpu:d}, rip 0x{rip:x} intr_info 0x{:08x} error_code 0x{:08x}{flags:[immediate exit]=1|=0}"),
    Form("kvm_exit", "kvm_exit", (2, 6), _EXIT),
    Form("kvm_exit", "kvm_exit", (3, 0), f"{_EXIT} info {{value:x}} {{addr:x}}"),  # the plugin's text as well
    Form("kvm_exit", "kvm_exit", (5, 6), f"vcpu {{vcpu:d}} {_EXIT} info {{value:x}} {{addr:x}}"),
    Form("kvm_exit", "kvm_exit", (5, 11), _EXIT_5_11),
    Form("kvm_exit", "kvm_exit", (6, 16), f"{_EXIT_5_11} requests 0x{{:016x}}"),
    Form("kvm_smm_transition", "kvm_enter_smm", (4, 2),
         "vcpu {vcpu:d}: {flags:entering=1|leaving=0} SMM, smbase 0x{addr:x}"),
    Form("kvm_smm_transition", "kvm_smm_transition", (5, 17),
         "vcpu {vcpu:d}: {flags:entering=1|leaving=0} SMM, smbase 0x{addr:x}"),
    Form("kvm_cr", "kvm_cr", (2, 6), "cr_{flags:write=1|read=0} {code:x} = 0x{value:x}"),
    Form("kvm_msr", "kvm_msr", (2, 6), "msr_{flags:write=1|read=0} {code:x} = 0x{value:x} {flags<<1:(#GP)=1|=0}"),
    Form("kvm_userspace_exit", "kvm_userspace_exit", (2, 6), "reason restart ({ret:-d})", ("ret", "==", -4)),
    Form("kvm_userspace_exit", "kvm_userspace_exit", (2, 6), "reason error ({ret:-d})", ("ret", "<", 0)),
    Form("kvm_userspace_exit", "kvm_userspace_exit", (2, 6), "reason {:w} ({code:d})"),
    Form("kvm_unmap_hva_range", "kvm_unmap_hva_range", (4, 20),
         "mmu notifier unmap range: 0x{addr:014x} -- 0x{value:014x}"),
    Form("kvm_age_hva", "kvm_age_hva", (4, 20), "mmu notifier age hva: 0x{addr:014x} -- 0x{value:014x}"),
    Form("kvm_test_age_hva", "kvm_test_age_hva", (4, 20), "mmu notifier test age hva: 0x{addr:014x}"),
    Form("kvm_set_spte_hva", "kvm_set_spte_hva", (4, 20), "mmu notifier set pte hva: 0x{addr:014x}"),
    Form("kvm_apicv_inhibit_changed", "kvm_apicv_update_request", (5, 6),
         "{flags:activate=0|deactivate=1} bit={code:d}"),
    Form("kvm_apicv_inhibit_changed", "kvm_apicv_inhibit_changed", (5, 18),
         "{flags:set=1|cleared=0} reason={code:d}, inhibits=0x{value:x}"),
    Form("kvm_nested_vmenter", "kvm_nested_vmrun", (2, 6),
         "rip: 0x{:016x} vmcb: 0x{addr:016x} nrip: 0x{rip:016x} int_ctl: 0x{:08x} event_inj: 0x{:08x} "
         "npt: {:on=1|off=0}"),
    Form("kvm_nested_vmenter", "kvm_nested_vmenter", (6, 1),
         "rip: 0x{:016x} {:vmcb=0|vmcs=0}: 0x{addr:016x} nested_rip: 0x{rip:016x} int_ctl: 0x{:08x} "
         "event_inj: 0x{:08x} {:nested_npt=0|nested_ept=0}={:y=1|n=0} {:nested_cr3=0|nested_eptp=0|guest_cr3=0}: "
         "0x{value:016x}"),
    Form("kvm_nested_vmexit", "kvm_nested_vmexit", (2, 6), f"rip: 0x{{rip:016x}} {_NESTED_OLD}"),
    Form("kvm_nested_vmexit", "kvm_nested_vmexit", PLUGIN,
         "rip {rip:x} reason {code:exit} info1 {value:x} info2 {addr:x} int_info {:x} int_info_err {:x}"),
    Form("kvm_nested_vmexit", "kvm_nested_vmexit", (5, 11), _EXIT_5_11),
    Form("kvm_nested_vmexit", "kvm_nested_vmexit", (6, 16), f"{_EXIT_5_11} requests 0x{{:016x}}"),
    Form("kvm_emulate_insn", "kvm_emulate_insn", (2, 6), "{:x}:{rip:x}:{flags:failed}"),
    Form("kvm_pio", "kvm_pio", (2, 6), "pio_{flags:write=1|read=0} at 0x{code:x} size {:d} count {:d}"),
    Form("kvm_pio", "kvm_pio", (3, 15),
         "pio_{flags:write=1|read=0} at 0x{code:x} size {:d} count {:d} val 0x{value:x} {:(...)=0|=0}"),
    Form("kvm_mmio", "kvm_mmio", (2, 6),
         "mmio {code<<8:unsatisfied-read=0|read=1|write=2} len {code&255:d} gpa 0x{addr:x} val 0x{value:x}"),
    Form("kvm_fast_mmio", "kvm_fast_mmio", (3, 15), "fast mmio at gpa 0x{addr:x}"),
    Form("vcpu_match_mmio", "vcpu_match_mmio", (3, 1),
         "gva 0x{:x} gpa 0x{addr:x} {flags:Write=1|Read=0} {:GPA=1|GVA=0}"),
    Form("kvm_inj_exception", "kvm_inj_exception", (2, 6), f"{{code:{_EXC}}} (0x{{value:x}})"),
    Form("kvm_inj_exception", "kvm_inj_exception", (5, 19),
         f"{{code:{_EXC}}}{{flags: (0x=1}}{{value:x}}) {{:[reinjected]=1|=0}}", ("flags", "==", 1)),
    Form("kvm_inj_exception", "kvm_inj_exception", (5, 19), f"{{code:{_EXC}}} {{:[reinjected]=1|=0}}"),
)  # fmt: skip

_LEFT_OUT: Final = re.compile(r"\{[^{}|]*\|=0\}")


def told_since(form: Form) -> Since:
    """Return the first version that prints lines of this form, or an older one's if the rest may be left out."""
    texts = (form.text, _LEFT_OUT.sub("", form.text))
    return min(each.since for each in FORMS if each.event == form.event and each.text in texts)


# The fields of each event as its format names them: what `trace-cmd report -R` and `perf trace` print, with the column.
_PAGE: Final = {"gfn": "gfn", "role": "role", "root_count": "refs", "unsync": "flags<<1"}
_EXITS: Final = {
    "vcpu_id": "vcpu", "exit_reason": "code", "guest_rip": "rip", "info1": "value", "info2": "addr", "isa": "isa",
    "exit_code": "code", "exit_info1": "value", "exit_info2": "addr", "rip": "rip",
}  # fmt: skip
FIELDS: Final[dict[str, dict[str, str]]] = {
    "kvm_mmu_get_page": {**_PAGE, "created": "flags"},
    **dict.fromkeys(("kvm_mmu_prepare_zap_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page"), _PAGE),
    "kvm_mmu_spte_requested": {"gfn": "gfn", "pfn": "value", "level": "level"},
    "kvm_mmu_set_spte": {"gfn": "gfn", "spte": "new", "sptep": "table>>12", "level": "level"},
    "kvm_tdp_mmu_spte_changed": {
        "gfn": "gfn", "old_spte": "old", "new_spte": "new", "level": "level", "as_id": "as_id",
    },
    "fast_page_fault": {
        "vcpu_id": "vcpu", "cr2_or_gpa": "addr", "gva": "addr", "error_code": "code", "old_spte": "old",
        "new_spte": "new", "ret": "ret",
    },
    "kvm_mmu_zap_all_fast": {"mmu_valid_gen": "flags&1", "mmu_used_pages": "value"},
    "kvm_mmu_split_huge_page": {"gfn": "gfn", "spte": "old", "level": "level", "errno": "ret"},
    "mark_mmio_spte": {"gfn": "gfn", "access": "code", "gen": "value"},
    "handle_mmio_page_fault": {"addr": "addr", "gfn": "gfn", "access": "code"},
    "check_mmio_spte": {"spte": "old", "kvm_gen": "value", "spte_gen": "code"},
    "kvm_mmu_pagetable_walk": {"addr": "addr", "pferr": "code"},
    "kvm_mmu_paging_element": {"pte": "value", "level": "level"},
    "kvm_mmu_set_accessed_bit": {"gpa": "addr"},
    "kvm_mmu_set_dirty_bit": {"gpa": "addr"},
    "kvm_mmu_walker_error": {"pferr": "code"},
    "kvm_page_fault": {"vcpu_id": "vcpu", "guest_rip": "rip", "fault_address": "addr", "error_code": "code"},
    "kvm_entry": {"vcpu_id": "vcpu", "rip": "rip", "immediate_exit": "flags"},
    "kvm_exit": _EXITS,
    "kvm_smm_transition": {"vcpu_id": "vcpu", "smbase": "addr", "entering": "flags"},
    "kvm_cr": {"rw": "flags", "cr": "code", "val": "value"},
    "kvm_msr": {"write": "flags", "rw": "flags", "ecx": "code", "data": "value", "exception": "flags<<1"},
    "kvm_userspace_exit": {"reason": "code", "errno": "ret"},
    "kvm_unmap_hva_range": {"start": "addr", "end": "value"},
    "kvm_age_hva": {"start": "addr", "end": "value"},
    "kvm_test_age_hva": {"hva": "addr"},
    "kvm_set_spte_hva": {"hva": "addr"},
    "kvm_apicv_inhibit_changed": {"reason": "code", "set": "flags", "inhibits": "value", "bit": "code"},
    "kvm_nested_vmenter": {"nested_rip": "rip", "vmcb": "addr", "guest_pgd": "value"},
    "kvm_nested_vmexit": _EXITS,
    "kvm_emulate_insn": {"rip": "rip", "failed": "flags"},
    "kvm_pio": {"port": "code", "val": "value", "rw": "flags"},
    "kvm_mmio": {"gpa": "addr", "val": "value", "len": "code&255", "type": "code<<8"},
    "kvm_fast_mmio": {"gpa": "addr"},
    "vcpu_match_mmio": {"gpa": "addr", "write": "flags"},
    "kvm_inj_exception": {"exception": "code", "error_code": "value", "has_error": "flags"},
}  # fmt: skip
# The kinds whose print format libtraceevent cannot read (1.7, and those before), so that it prints fields in decimal.
UNREAD: Final = frozenset(
    ("kvm_mmu_get_page", "kvm_mmu_prepare_zap_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page", "kvm_inj_exception")
)
# `activate` of the older event is the opposite of an inhibit being set: only its text says so, see above.

PFERR: Final = (("RSVD", 3), ("SGX", 15), ("PK", 5), ("SS", 6), ("P", 0), ("W", 1), ("U", 2), ("F", 4))


def shown_kinds() -> frozenset[str]:
    """Return the kinds that a text can have rows of."""
    return frozenset(form.kind for form in FORMS) - {"gap"}
