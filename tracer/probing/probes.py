# SPDX-License-Identifier: Apache-2.0
"""The dated table of probes: for each kind of event, the points in the kernel that show it, best first.

A point is one of
  tp      a classic tracepoint; `$name` in an expression is a field of its format (`$?name`: 0 where it is lacking)
  raw     the same tracepoint's raw arguments, `@0`, `@1`, ...: for the pointers that the format does not print, and
          because the kernel then makes no record of it first; `#name` is the type of a field of the format
  entry   a function's entry, arguments `@0`, ...; fentry where bcc can (KVM built in), else kprobe
  return  a function's return, value `@ret`
Expressions are C over the helpers of ebpf/helpers.c (SP_ROLE, VCPU_ROOT, ...). `since`/`until` bound the kernel
versions in which the point means this (until is exclusive); where BTF knows the function, `signature` must match as
well. A raw point has to give what the classic tracepoint shows, to the bit, and is left out where that is not sure. The
first point that holds on a kernel is used; what it was, and why an earlier one was not, goes into the trace's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tracer.probing.points import EXIT_IN_MEMORY, FUTURE, OLDEST, PHYSICAL, RIP_IN_MEMORY, Hook, Point, Probe, Version

PRESETS = ("roots", "time", "mmu", "all")

_SP = {
    "gfn": "SP_GFN(@0)", "table": "SP_TABLE(@0)", "refs": "SP_REFS_OF(@0)", "role": "SP_ROLE_OF(@0)",
    "level": "SP_ROLE_OF(@0) & 15", "root": "SP_ROOT(@0, self)",
}  # fmt: skip
_SP_FIELDS = {"gfn": "$gfn", "refs": "$root_count", "role": "$role", "level": "$role & 15"}
_UNSYNC = "(SP_UNSYNC_OF(@0) << 1)"


def _page(name: str, preset: str, created: str = "") -> Probe:
    """A tracepoint of the kvm_mmu_page class: raw for the page's address, its fields where the layout is unknown."""
    flags = f"(@1 ? 1 : 0) | {_UNSYNC}" if created else _UNSYNC
    fields = "($created ? 1 : 0) | ($unsync ? 2 : 0)" if created else "($unsync ? 2 : 0)"
    return Probe(
        name,
        (
            Point("raw", f"kvmmmu:{name}", {**_SP, "flags": flags}, signature=("kvm_mmu_page *",)),
            Point("tp", f"kvmmmu:{name}", {**_SP_FIELDS, "flags": fields}),
        ),
        preset,
    )


def _tp(kind: str, where: str, preset: str, **fill: str) -> Probe:
    return Probe(kind, (Point("tp", where, fill),), preset)


def _plain(kind: str, where: str, preset: str, arguments: Mapping[str, str], **fill: str) -> Probe:
    """A tracepoint that shows its arguments as they are; `arguments`: the type of each, by the name of its field."""
    numbers = {name: number for number, name in enumerate(arguments)}
    raw = {
        column: re.sub(r"\$(\w+)", lambda found: f"((#{found[1]})@{numbers[found[1]]})", text)
        for column, text in fill.items()
    }
    signature, printed = tuple(arguments.values()), tuple(arguments)
    return Probe(
        kind, (Point("raw", where, raw, signature=signature, printed=printed), Point("tp", where, fill)), preset
    )


def _vcpu_function(kind: str, preset: str, function: str, since: Version = OLDEST, **fill: str) -> Probe:
    """A function whose first argument is the vCPU; the root is the vCPU's current one as the function begins."""
    base = {"vcpu": "@0", "root": "VCPU_ROOT(@0)", "role": "VCPU_ROLE(@0)"}
    return Probe(kind, (Point("entry", function, {**base, **fill}, since, signature=("kvm_vcpu *",)),), preset)


def _rip_points(
    where: str,
    fill: Mapping[str, str],
    signature: tuple[str, ...],
    printed: tuple[str, ...] = (),
    needs: str = RIP_IN_MEMORY,
    shared: str = "",
) -> tuple[Point, Point]:
    """A raw tracepoint that shows the RIP of the vCPU that `rip` names; of a protected one 0 from TDX on.

    That first release, 6.16, is inferred. Rows of such guests (SEV-ES) have no RIP worth reading before it either.
    """

    def point(rip: str, since: Version, until: Version) -> Point:
        shown = {**fill, "rip": f"{rip}({fill['rip']})"}
        return Point("raw", where, shown, since, until, signature, printed, needs, shared)

    return point("VCPU_RIP", OLDEST, (6, 16)), point("SHOWN_RIP", (6, 16), FUTURE)


_U64, _U32 = "long long unsigned int", "unsigned int"
_CURRENT = {"root": "CURRENT_ROOT(self)"}
_CURRENT_BOTH = {"root": "frame_in(&mmu)", "role": "ROLE_IN(&mmu)"}
_MMU = "struct mmu mmu = vcpu_mmu_now(self->vcpu);"
_FAULT, _EXIT = "struct fault fault = fault_at({});", "struct vmcb_exit exit = vmcb_exit({});"
TRACEPOINTS: tuple[Probe, ...] = (
    _page("kvm_mmu_get_page", "roots", created="@1"),
    _page("kvm_mmu_prepare_zap_page", "mmu"),
    _page("kvm_mmu_sync_page", "mmu"),
    _page("kvm_mmu_unsync_page", "mmu"),
    Probe("kvm_mmu_spte_requested", (
        # 5.16+ (f0066d94c92d)
        Point("raw", "kvmmmu:kvm_mmu_spte_requested",
              {"gfn": "FAULT_GFN", "value": "asked_pfn(FAULT_PFN, FAULT_GFN, FAULT_LEVEL)", "level": "FAULT_LEVEL",
               **_CURRENT},
              signature=("kvm_page_fault *",), shared=_FAULT.format("@0")),
        Point("raw", "kvmmmu:kvm_mmu_spte_requested",
              {"gfn": "@0 >> 12", "value": "asked_pfn(@2, @0 >> 12, @1)", "level": "@1", **_CURRENT}, until=(5, 16),
              signature=(_U64, "int", _U64), printed=("gfn", "pfn", "level")),
        Point("tp", "kvmmmu:kvm_mmu_spte_requested",
              {"gfn": "$gfn", "value": "$pfn", "level": "$level", **_CURRENT}),
    ), "time"),
    Probe("kvm_mmu_set_spte", (
        Point("raw", "kvmmmu:kvm_mmu_set_spte",
              {"gfn": "@1", "new": "READ64(@2)", "table": "frame_of(@2)", "level": "@0", **_CURRENT},
              signature=("int", _U64, "long long unsigned int *"),
              printed=("gfn", "spte", "sptep", "level", "r", "x", "u"), needs=PHYSICAL),
        Point("tp", "kvmmmu:kvm_mmu_set_spte",
              {"gfn": "$gfn", "new": "$spte", "table": "$sptep >> 12", "level": "$level", **_CURRENT}),
    ), "time"),
    # 5.15+ (33dd3574f5fe); 5.10's TDP MMU changes SPTEs without an event.
    Probe("kvm_tdp_mmu_spte_changed", (
        Point("raw", "kvmmmu:kvm_tdp_mmu_spte_changed",
              {"gfn": "@1", "old": "@3", "new": "@4", "level": "@2", "as_id": "@0",
               "root": "CHANGED_ROOT(self, (u32)@0)"},
              signature=("int", _U64, "int", _U64, _U64)),
        Point("tp", "kvmmmu:kvm_tdp_mmu_spte_changed",
              {"gfn": "$gfn", "old": "$old_spte", "new": "$new_spte", "level": "$level", "as_id": "$as_id",
               "root": "CHANGED_ROOT(self, $as_id)"}),
    ), "mmu"),
    Probe("fast_page_fault", (
        # 5.16+ (f0066d94c92d)
        Point("raw", "kvmmmu:fast_page_fault",
              {"addr": "FAULT_ADDR", "code": "(#error_code)FAULT_CODE", "old": "@3", "new": "READ64(@2)", "ret": "@4",
               **_CURRENT},
              signature=("kvm_vcpu *", "kvm_page_fault *", "long long unsigned int *", _U64,
                         "int"), shared=_FAULT.format("@1")),
        Point("raw", "kvmmmu:fast_page_fault",
              {"addr": "@1", "code": "(#error_code)@2", "old": "@4", "new": "READ64(@3)", "ret": "@5", **_CURRENT},
              until=(5, 16),
              signature=("kvm_vcpu *", _U64, _U32, "long long unsigned int *",
                         _U64, "int"),
              printed=("vcpu_id", "cr2_or_gpa", "error_code", "sptep", "old_spte", "new_spte", "ret")),
        Point("tp", "kvmmmu:fast_page_fault",
              {"addr": "$cr2_or_gpa", "code": "$error_code", "old": "$old_spte", "new": "$new_spte", "ret": "$ret",
               **_CURRENT}),
    ), "time"),
    Probe("kvm_mmu_zap_all_fast", (
        Point("raw", "kvmmmu:kvm_mmu_zap_all_fast", {"kvm": "@0", "value": "KVM_USED(@0)", "flags": "KVM_GEN(@0)"},
              signature=("kvm *",)),
        Point("tp", "kvmmmu:kvm_mmu_zap_all_fast", {"value": "$mmu_used_pages", "flags": "$mmu_valid_gen"}),
    ), "roots"),
    _tp("kvm_mmu_split_huge_page", "kvmmmu:kvm_mmu_split_huge_page", "mmu",
        gfn="$gfn", old="$spte", level="$level", ret="$errno"),
    _tp("mark_mmio_spte", "kvmmmu:mark_mmio_spte", "time", gfn="$gfn", code="$access", value="$gen", **_CURRENT),
    _plain("handle_mmio_page_fault", "kvmmmu:handle_mmio_page_fault", "time",
           {"addr": _U64, "gfn": _U64, "access": _U32}, addr="$addr", gfn="$gfn", code="$access", **_CURRENT),
    _plain("check_mmio_spte", "kvmmmu:check_mmio_spte", "time",
           {"spte": _U64, "kvm_gen": _U32, "spte_gen": _U32}, old="$spte", value="$kvm_gen", code="$spte_gen"),
    # The emulator's two hottest events.
    _plain("kvm_mmu_pagetable_walk", "kvmmmu:kvm_mmu_pagetable_walk", "all", {"addr": _U64, "pferr": _U32},
           addr="$addr", code="$pferr"),
    _plain("kvm_mmu_paging_element", "kvmmmu:kvm_mmu_paging_element", "all", {"pte": _U64, "level": "int"},
           value="$pte", level="$level"),
    _tp("kvm_mmu_set_accessed_bit", "kvmmmu:kvm_mmu_set_accessed_bit", "all", addr="$gpa"),
    _tp("kvm_mmu_set_dirty_bit", "kvmmmu:kvm_mmu_set_dirty_bit", "all", addr="$gpa"),
    _tp("kvm_mmu_walker_error", "kvmmmu:kvm_mmu_walker_error", "all", code="$pferr"),
    Probe("kvm_page_fault", (
        # vcpu and RIP are in the format from 6.1 (faebdc6b4e7c); 5.10 and 5.15 print address and error code only.
        *_rip_points("kvm:kvm_page_fault",
                     {"addr": "@1", "code": "(#error_code)@2", "rip": "@0", **_CURRENT_BOTH},
                     ("kvm_vcpu *", _U64, _U64), shared=_MMU),
        Point("raw", "kvm:kvm_page_fault",
              {"addr": "@0", "code": "(#error_code)@1", **_CURRENT_BOTH},
              signature=("long unsigned int", _U32), printed=("fault_address", "error_code"), shared=_MMU),
        Point("tp", "kvm:kvm_page_fault",
              {"addr": "$fault_address", "code": "$error_code", "rip": "$?guest_rip", **_CURRENT_BOTH}, shared=_MMU),
    ), "time"),
    Probe("kvm_entry", (
        # immediate_exit came in 6.10 and was taken back into 6.1.y
        *_rip_points("kvm:kvm_entry", {"rip": "@0", "flags": "(u8)@1 ? 1 : 0", **_CURRENT}, ("kvm_vcpu *", "_Bool")),
        *_rip_points("kvm:kvm_entry", {"rip": "@0", **_CURRENT}, ("kvm_vcpu *",), ("vcpu_id", "rip")),
        Point("tp", "kvm:kvm_entry", {"rip": "$rip", "flags": "$?immediate_exit ? 1 : 0", **_CURRENT}),
    ), "time"),
    Probe("kvm_exit", (
        # 5.16+ (0a62a0319abb): the reason is no argument any more
        *_rip_points("kvm:kvm_exit",
                     {"code": "(#exit_reason)exit.code", "rip": "@0", "value": "exit.info_1",
                      "addr": "exit.info_2"},
                     ("kvm_vcpu *", _U32), needs=EXIT_IN_MEMORY, shared=_EXIT.format("@0")),
        *_rip_points("kvm:kvm_exit",
                     {"code": "(#exit_reason)@0", "rip": "@1", "value": "exit.info_1", "addr": "exit.info_2"},
                     (_U32, "kvm_vcpu *", _U32), needs=EXIT_IN_MEMORY,
                     shared=_EXIT.format("@1")),
        Point("tp", "kvm:kvm_exit",
              {"code": "$exit_reason", "rip": "$guest_rip", "value": "$info1", "addr": "$info2"}),
    ), "time"),
    Probe("kvm_smm_transition", (
        Point("tp", "kvm:kvm_smm_transition", {"addr": "$smbase", "flags": "$entering ? 1 : 0"}),
        # the name until 5.16
        Point("tp", "kvm:kvm_enter_smm", {"addr": "$smbase", "flags": "$entering ? 1 : 0"}),
    ), "roots"),
    _plain("kvm_cr", "kvm:kvm_cr", "roots", {"rw": _U32, "cr": _U32, "val": "long unsigned int"},
           code="$cr", value="$val", flags="$rw ? 1 : 0"),
    _plain("kvm_msr", "kvm:kvm_msr", "time", {"write": _U32, "ecx": _U32, "data": _U64, "exception": "_Bool"},
           code="$ecx", value="$data", flags="($write ? 1 : 0) | ($exception ? 2 : 0)"),
    _plain("kvm_userspace_exit", "kvm:kvm_userspace_exit", "time", {"reason": _U32, "errno": "int"},
           code="$reason", ret="$errno"),
    _tp("kvm_unmap_hva_range", "kvm:kvm_unmap_hva_range", "roots", addr="$start", value="$end"),
    _tp("kvm_age_hva", "kvm:kvm_age_hva", "mmu", addr="$start", value="$end"),
    _tp("kvm_test_age_hva", "kvm:kvm_test_age_hva", "mmu", addr="$hva"),
    _tp("kvm_set_spte_hva", "kvm:kvm_set_spte_hva", "roots", addr="$hva"),
    Probe("kvm_apicv_inhibit_changed", (
        Point("tp", "kvm:kvm_apicv_inhibit_changed",
              {"code": "$reason", "value": "$inhibits", "flags": "$set ? 1 : 0"}),
        # the name until 5.18: `activate` is the opposite of an inhibit being set
        Point("tp", "kvm:kvm_apicv_update_request", {"code": "$bit", "flags": "$activate ? 0 : 1"}),
    ), "roots"),
    Probe("kvm_nested_vmenter", (
        Point("tp", "kvm:kvm_nested_vmenter", {"rip": "$nested_rip", "addr": "$vmcb", "value": "$?guest_pgd"}),
        # the name until 6.3
        Point("tp", "kvm:kvm_nested_vmrun", {"rip": "$nested_rip", "addr": "$vmcb"}),
    ), "roots"),
    _tp("kvm_nested_vmexit", "kvm:kvm_nested_vmexit", "roots",
        code="$exit_reason", rip="$guest_rip", value="$info1", addr="$info2"),
    _tp("kvm_emulate_insn", "kvm:kvm_emulate_insn", "all", rip="$rip", flags="$failed ? 1 : 0"),
    _tp("kvm_pio", "kvm:kvm_pio", "all", code="$port", value="$val", flags="$rw ? 1 : 0"),
    _tp("kvm_mmio", "kvm:kvm_mmio", "all", addr="$gpa", value="$val", code="$len | ($type << 8)"),
    _plain("kvm_fast_mmio", "kvm:kvm_fast_mmio", "mmu", {"gpa": _U64}, addr="$gpa"),
    _tp("vcpu_match_mmio", "kvm:vcpu_match_mmio", "all", addr="$gpa", flags="$write ? 1 : 0"),
    _tp("kvm_inj_exception", "kvm:kvm_inj_exception", "mmu", code="$exception", value="$error_code",
        flags="$has_error ? 1 : 0"),
)  # fmt: skip

_SHADOW_ROOT = {"root": "READ64(@1) >> 12", "table": "READ64(@1) >> 12", "refs": "HPA_REFS(READ64(@1))",
                "role": "HPA_ROLE(READ64(@1))"}  # fmt: skip
_ROOT = {"kvm": "@0", "root": "SP_TABLE(@1)", "role": "SP_ROLE_OF(@1)"}

FUNCTIONS: tuple[Probe, ...] = (
    Probe("mmu_load", (
        Point("return", "kvm_mmu_load",
              {"ret": "@ret", "root": "CURRENT_ROOT(self)", "role": "CURRENT_ROLE(self)"}),
    ), "roots"),
    Probe("root_get", (
        Point("return", "kvm_tdp_mmu_get_vcpu_root_hpa",  # 5.10 to 6.8: returns the root's address
              {"root": "@ret >> 12", "role": "CURRENT_ROLE(self)", "refs": "HPA_REFS(@ret)"}, until=(6, 9),
              after="self->walk_root = 0;"),
        Point("return", "kvm_tdp_mmu_alloc_root",  # 6.9+ (f5238c2a60f1): finds or creates, stores it in the slot
              {"root": "CURRENT_ROOT(self)", "role": "CURRENT_ROLE(self)",
               "refs": "HPA_REFS(CURRENT_ROOT(self) << 12)"}, since=(6, 9), after="self->walk_root = 0;"),
    ), "roots"),
    _vcpu_function("mmu_unload", "roots", "kvm_mmu_unload"),
    _vcpu_function("mmu_reset", "roots", "kvm_mmu_reset_context"),
    Probe("mmu_free_roots", (
        Point("entry", "kvm_mmu_free_roots",
              {"kvm": "@0", "vcpu": "MMU_VCPU(@1, @0)", "value": "@2", "root": "MMU_ROOT(@1)",
               "role": "MMU_ROLE(@1)"}, since=(5, 18),
              signature=("kvm *", "kvm_mmu *")),
        Point("entry", "kvm_mmu_free_roots",
              {"vcpu": "@0", "value": "@2", "root": "MMU_ROOT(@1)", "role": "MMU_ROLE(@1)"}, until=(5, 18),
              signature=("kvm_vcpu *", "kvm_mmu *")),
    ), "roots"),
    _vcpu_function("mmu_free_obsolete_roots", "roots", "kvm_mmu_free_obsolete_roots", since=(5, 18)),
    _vcpu_function("new_pgd", "roots", "kvm_mmu_new_pgd", value="@1"),
    # TDP roots from 5.12 (2bdb3d84ce52); `refs` is the count before this put
    Probe("root_put", (
        Point("entry", "kvm_tdp_mmu_put_root",
              {**_ROOT, "table": "SP_TABLE(@1)", "refs": "SP_REFS_OF(@1)"}, since=(5, 12),
              signature=("kvm *", "kvm_mmu_page *")),
    ), "roots"),
    # Shadow roots, and every root before 5.12, where the put of a TDP root is inlined into this function.
    Probe("root_put", (
        Point("entry", "mmu_free_root_page",
              {"kvm": "@0", **_SHADOW_ROOT},
              since=(5, 12), only_if="HPA_VALID(READ64(@1)) && !HPA_TDP(READ64(@1))"),
        Point("entry", "mmu_free_root_page",
              {"kvm": "@0", **_SHADOW_ROOT},
              until=(5, 12), only_if="HPA_VALID(READ64(@1))"),
    ), "roots"),
    Probe("table_free", (
        Point("entry", "tdp_mmu_free_sp_rcu_callback",  # 5.12+ (7cca2d0b7e7d): children and roots alike, after RCU
              {"gfn": "SP_GFN(@0 - OFF_SP_RCU)", "table": "SP_TABLE(@0 - OFF_SP_RCU)",
               "refs": "SP_REFS_OF(@0 - OFF_SP_RCU)", "role": "SP_ROLE_OF(@0 - OFF_SP_RCU)",
               "level": "SP_ROLE_OF(@0 - OFF_SP_RCU) & 15", "root": "SP_ROOT(@0 - OFF_SP_RCU, self)"},
              since=(5, 12), in_interrupt=True),
        Point("return", "kvm_tdp_mmu_free_root",  # 5.10: the root only, freed inline; the zap is bracketed below
              {"root": "self->zap_root", "table": "self->zap_root"}, until=(5, 12)),
    ), "mmu"),
    Probe("roots_invalidate", (
        Point("entry", "kvm_tdp_mmu_invalidate_roots", {"kvm": "@0", "value": "@1"}, since=(6, 14)),
        Point("entry", "kvm_tdp_mmu_invalidate_all_roots", {"kvm": "@0"}, since=(5, 12), until=(6, 14)),
    ), "roots"),
    Probe("zap_root_begin", (
        Point("entry", "__tdp_mmu_zap_root",  # 5.18+ (1b6043e8e5c2): once a pass, level is the pass
              {**_ROOT, "level": "@3", "flags": "@2 ? 1 : 0", "refs": "SP_REFS_OF(@1)"}, since=(5, 18),
              signature=("kvm *", "kvm_mmu_page *"), before="self->zap_root = SP_TABLE(@1); self->zap_kvm = @0;"),
        Point("entry", "tdp_mmu_zap_root",
              {**_ROOT, "flags": "@2 ? 1 : 0", "refs": "SP_REFS_OF(@1)"}, since=(5, 18),
              signature=("kvm *", "kvm_mmu_page *"), before="self->zap_root = SP_TABLE(@1); self->zap_kvm = @0;"),
        Point("entry", "kvm_tdp_mmu_free_root", {**_ROOT, "refs": "SP_REFS_OF(@1)"}, until=(5, 12),
              before="self->zap_root = SP_TABLE(@1); self->zap_kvm = @0;"),
    ), "roots"),
    Probe("zap_root_end", (
        Point("return", "__tdp_mmu_zap_root", {"root": "self->zap_root"}, since=(5, 18),
              after="self->zap_root = 0; self->zap_kvm = 0;"),
        Point("return", "tdp_mmu_zap_root", {"root": "self->zap_root"}, since=(5, 18),
              after="self->zap_root = 0; self->zap_kvm = 0;"),
        Point("return", "kvm_tdp_mmu_free_root", {}, until=(5, 12), after="self->zap_kvm = 0;"),
    ), "roots"),
    Probe("zap_invalidated_begin", (
        Point("entry", "kvm_tdp_mmu_zap_invalidated_roots", {"kvm": "@0"}, since=(5, 12), before="self->ended = @0;"),
    ), "roots"),
    Probe("zap_invalidated_end", (
        Point("return", "kvm_tdp_mmu_zap_invalidated_roots", {}, since=(5, 12)),
    ), "roots"),
    Probe("zap_leafs", (
        Point("entry", "kvm_tdp_mmu_zap_leafs", {"kvm": "@0", "gfn": "@1", "value": "@2"}, since=(5, 18),
              signature=("kvm *", "long long unsigned int", "long long unsigned int")),
        Point("entry", "kvm_tdp_mmu_zap_leafs", {"kvm": "@0", "as_id": "@1", "gfn": "@2", "value": "@3"},
              since=(5, 18), signature=("kvm *", "int")),
        Point("entry", "__kvm_tdp_mmu_zap_gfn_range", {"kvm": "@0", "as_id": "@1", "gfn": "@2", "value": "@3"},
              since=(5, 12), until=(5, 18)),
        Point("entry", "kvm_tdp_mmu_zap_gfn_range", {"kvm": "@0", "gfn": "@1", "value": "@2"}, until=(5, 12)),
    ), "roots"),
    Probe("zap_all", (
        Point("entry", "kvm_tdp_mmu_zap_all", {"kvm": "@0"}, before="self->ended = @0;"),
        Point("entry", "kvm_mmu_zap_all", {"kvm": "@0"}, before="self->ended = @0;"),
    ), "roots"),
    # Before anything can name the new VM; where there is no such probe, the ioctl's end shows it.
    Probe("vm_create", (
        Point("entry", "kvm_arch_init_vm", {"kvm": "@0"}, before="vm_begins(self, @0);"),
    ), "roots"),
    Probe("vm_destroy", (
        Point("entry", "kvm_arch_destroy_vm", {"kvm": "@0"}, before="self->ended = @0; self->kvm = 0;"),
    ), "roots"),
)  # fmt: skip

PROBES: tuple[Probe, ...] = (*TRACEPOINTS, *FUNCTIONS)


def _notifier(function: str, *serves: str) -> tuple[Hook, Hook]:
    """A notifier's function gets the struct mmu_notifier within the VM's struct kvm; its tracepoint names no VM."""
    return (
        Hook(
            (Point("entry", function, before="self->notified = NOTIFIED(@0);", signature=("mmu_notifier *",)),), serves
        ),
        Hook((Point("return", function, before="self->notified = 0;", signature=("mmu_notifier *",)),), serves),
    )


_CHANGES = ("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page")

HOOKS: tuple[Hook, ...] = (
    *_notifier("kvm_mmu_notifier_invalidate_range_start", "kvm_unmap_hva_range", *_CHANGES),
    *_notifier("kvm_mmu_notifier_clear_flush_young", "kvm_age_hva", *_CHANGES),
    *_notifier("kvm_mmu_notifier_clear_young", "kvm_age_hva", *_CHANGES),
    *_notifier("kvm_mmu_notifier_test_young", "kvm_test_age_hva", *_CHANGES),
    *_notifier("kvm_mmu_notifier_change_pte", "kvm_set_spte_hva", *_CHANGES),  # to 6.9 (f7842747d13d)
    *_notifier("kvm_mmu_notifier_release", "zap_all", *_CHANGES),
    # 5.15+: every loop over TDP roots that may yield takes its next root here; NULL ends the loop.
    Hook((Point("return", "tdp_mmu_next_root", before="self->walk_root = @ret ? SP_TABLE(@ret) : 0;"),), _CHANGES[:1]),
    # ... except where a load's search ends at the root that it wants (6.9+).
    Hook((Point("return", "kvm_tdp_mmu_alloc_root", before="self->walk_root = 0;"),), _CHANGES[:1]),
    # NX recovery: a kernel thread's, which is no VM's.
    *(
        Hook((Point(how, function, before=before, signature=("kvm *", "kvm_mmu_page *")),), _CHANGES)
        for function in ("kvm_tdp_mmu_zap_sp", "kvm_tdp_mmu_zap_possible_nx_huge_page")  # the latter from 6.18 on
        for how, before in (
            ("entry", "self->ended = @0; self->walk_root = top_table(@1);"),
            ("return", "self->ended = self->walk_root = 0;"),
        )
    ),
    Hook((Point("return", "kvm_arch_destroy_vm", before="self->ended = 0;"),), ("vm_destroy", *_CHANGES)),
)  # fmt: skip

# Kinds that ebpf/sched.c writes: its two raw tracepoints, and the state of the task that leaves, by their prototypes.
SCHED_KINDS = ("sched_in",)
SCHED_PRESETS = ("time", "mmu", "all")
SCHED_PREV_STATE = {
    # 5.18+ (9c2136be0878): by then the task itself may be awake again
    ("_Bool", "task_struct *", "task_struct *", "unsigned int"): "((ctx)->args[3])",
    ("_Bool", "task_struct *", "task_struct *"): "read32((prev) + OFF_TASK_STATE)",
}

# Kinds that program.py's ioctl programs write, from the syscall tracepoints: no probe table needed.
IOCTL_KINDS = ("vm_create", "ioctl", "ioctl_end", "memslot")


def preset_kinds(preset: str) -> frozenset[str]:
    """The kinds a preset records, those of the smaller presets included."""
    wanted = PRESETS[: PRESETS.index(preset) + 1]
    scheduler = SCHED_KINDS if preset in SCHED_PRESETS else ()
    return frozenset(probe.kind for probe in PROBES if probe.preset in wanted) | {*IOCTL_KINDS, *scheduler}
