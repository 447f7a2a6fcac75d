# SPDX-License-Identifier: Apache-2.0
"""What the rows of one recording show of each field of its kernel's description, whatever the description says."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from traces.kernels.policy_rows import PolicyRow, Watch
from traces.reader import Trace
from traces.row_values import values_of

PFN = (1 << 52) - (1 << 12)
# Bits of an SPTE that are the processor's own, but for the frame; the last of EPT's suppresses #VE.
HARDWARE = {"svm": 0xE7, "vmx": 0x3FF | 1 << 63}
USER_EXECUTE = 1 << 10  # of EPT: MBEC, which 7.3 sets in every entry; 5.10 has a bit of its own there
LARGE = 1 << 7
IO, HLT, MMIO = 2, 5, 6  # KVM_EXIT_*
SET_SREGS, SET_CPUID2 = (0xAE84, 0xAECD), 0xAE90
COLUMNS = (
    "vcpu", "tid", "kind", "root", "role", "level", "gfn", "old", "new", "table", "code", "value", "refs", "ret",
    "flags",
)  # fmt: skip
SMM = 1 << 24
# What a scenario's guest does over and over, by the trigger that it is.
REPEATED = {"wp-toggle": "CR0_WP", "cr4-toggle-bit-pge": "CR4_PGE", "cr4-toggle": "CR4", "efer-toggle": "EFER"}


class Row(NamedTuple):
    vcpu: int | None
    tid: int
    kind: str
    root: int
    role: int
    level: int
    gfn: int | None
    old: int
    new: int
    table: int
    code: int
    value: int
    refs: int
    ret: int
    flags: int


class Recording:
    """The rows of one recording, and what they show: `of` gives {field: value}, only what is shown."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.trace = Trace.open(path)
        self.meta = self.trace.metadata
        self.vms: list[list[Row]] = []
        for vm in self.meta.vms:
            batches = self.trace.batches(COLUMNS, vm=vm["id"])
            self.vms.append([row for batch in batches for row in map(Row._make, zip(*_lists(batch), strict=True))])
        self.kinds = {row.kind for rows in self.vms for row in rows}
        self.tdp = self.meta.policy != "shadow"
        self.vmx = self.meta.raw["host"]["vendor"] == "GenuineIntel"
        # Without A/D bits each SPTE's type (53:52) says so, and faults on absent leaves are tried without mmu_lock.
        self.ad_off = self.meta.raw["modules"].get("kvm_intel", {}).get("eptad") == "N"
        self.role = {name: ((1 << w) - 1) << s for name, (s, w) in self.meta.raw["layout"]["role"].items()}

    def of(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for observer in OBSERVERS:
            if self.tdp or observer in ANY_MMU:
                found.update({name: value for name, value in observer(self).items() if value is not None})
        return found

    def threads(self, *kinds: str) -> dict[tuple[int, int], list[Row]]:
        """Rows of these kinds, by VM and thread."""
        by: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for number, rows in enumerate(self.vms):
            for row in rows:
                if row.kind in kinds:
                    by[number, row.tid].append(row)
        return by

    def probed(self, kind: str) -> bool:
        return any(probe["kind"] == kind and probe["how"] != "none" for probe in self.meta.probes)


def _lists(batch: Any) -> list[list[Any]]:
    return [values_of(column) for column in batch.columns]


def policy(made: Recording) -> dict[str, Any]:
    watch = Watch("", made.role["invalid"])
    for rows in made.vms:
        for row in rows:
            watch.take(PolicyRow(row.kind, row.tid, row.root, row.role, row.refs))
    return {"policy": watch.policy or None}


def points(made: Recording) -> dict[str, Any]:
    """A probe of several tracepoints names the group of the first, or that of each."""
    there = set()
    for probe in made.meta.probes:
        if probe["how"] != "none":
            first, *more = probe["point"].split(", ")
            group = first.partition(":")[0]
            there |= {first, *(name if ":" in name else f"{group}:{name}" for name in more)}
    return {"points": there}


def layout(made: Recording) -> dict[str, Any]:
    roots = {row.role for rows in made.vms for row in rows if row.root and row.role & SMM and row.kind == "mmu_load"}
    nx = made.role.get("efer_nx") or made.role["nxe"]
    fields = {name: tuple(place) for name, place in made.meta.raw["layout"]["role"].items()}
    return {"layout.fields": fields, "layout.guest_bits": not all(role & nx for role in roots) if roots else None}


def zap_all_fast(made: Recording) -> dict[str, Any]:
    if "kvm_mmu_zap_all_fast" not in made.kinds:
        return {}
    puts = [row for rows in made.vms for row in rows if row.kind == "root_put"]
    marked = any(row.role & made.role["invalid"] for row in puts)
    obsolete = "mmu_free_obsolete_roots" in made.kinds
    reload = any(row.kind == "mmu_unload" and row.vcpu is not None for rows in made.vms for row in rows)
    return {
        "zap_all_fast": "invalidate" if marked else "empty" if puts else None,
        "request": "obsolete" if obsolete else "reload" if reload else None,
    }


def slot_zap(made: Recording) -> dict[str, Any]:
    """A slot that is deleted takes leaves along, and nothing says that every root goes."""
    for rows in made.threads("memslot", "ioctl_end", "kvm_mmu_zap_all_fast", "kvm_tdp_mmu_spte_changed").values():
        for before, row in itertools.pairwise(rows):
            if before.kind == "memslot" and not before.value and row.kind == "kvm_tdp_mmu_spte_changed":
                return {"slot_zap": True}
    return {}


def search_puts(made: Recording) -> dict[str, Any]:
    """In the storms of SMIs every other load passes the root that it does not want."""
    if not made.name.startswith(("smi-storm", "smi-one")) or made.meta.policy in ("sync", "async"):
        return {}
    found = False
    for rows in made.threads("mmu_free_roots", "root_put", "root_get").values():
        for before, row in itertools.pairwise(rows):
            found |= row.kind == "root_get" and before.kind == "root_put"
    return {"search_puts": found}


def triggers(made: Recording) -> dict[str, Any]:
    """Whether a vCPU resets or unloads between what its guest did and its next entry."""
    vendor_cr0, vendor_cr4, vendor_msr = ({16, 101}, {20}, {124})
    counts: dict[str, list[bool]] = defaultdict(list)
    repeated = next((name for start, name in REPEATED.items() if made.name.startswith(start)), "")
    kinds = (
        "kvm_exit",
        "kvm_entry",
        "kvm_smm_transition",
        "mmu_reset",
        "mmu_unload",
        "mmu_free_roots",
        "ioctl",
        "ioctl_end",
    )
    for rows in made.threads(*kinds).values():
        asked: list[str] = []
        for row in rows:
            if row.kind in ("kvm_entry", "ioctl_end"):
                for name in asked:
                    counts[name].append(False)
                asked = []
            elif row.kind in ("mmu_reset", "mmu_unload") or (row.kind == "mmu_free_roots" and asked == ["CPUID"]):
                for name in asked:
                    counts[name].append(True)
                asked = []
            elif row.kind == "kvm_smm_transition":
                asked = ["SMI" if row.flags & 1 else "RSM"]
            elif row.kind == "ioctl" and row.code & 0xFFFF in SET_SREGS:
                asked = ["SREGS"]
            elif row.kind == "ioctl" and row.code & 0xFFFF == SET_CPUID2:
                asked = ["CPUID"]
            elif row.kind == "kvm_exit" and repeated and made.vmx:
                # One exit for all control registers: which in bits 3:0, a MOV to it as 0 in bits 5:4.
                register = {"CR0_WP": 0, "CR4_PGE": 4, "CR4": 4}.get(repeated)
                wrote = row.code == 28 and row.value & 0x3F == register if register is not None else row.code == 32
                asked = [repeated] if wrote else []
            elif row.kind == "kvm_exit" and repeated:
                codes = {"CR0_WP": vendor_cr0, "CR4_PGE": vendor_cr4, "CR4": vendor_cr4, "EFER": vendor_msr}[repeated]
                asked = [repeated] if row.code in codes and (repeated != "EFER" or row.value & 1) else []
    ept = made.vmx and made.meta.raw["modules"]["kvm_intel"].get("ept") != "N"
    owned = {"guest_owns_wp": len(counts["CR0_WP"]) <= 3} if repeated == "CR0_WP" and ept else {}
    # The guest's way from boot to the loop writes the same registers a few times for other reasons.
    always = ("SMI", "RSM", "SREGS", "CPUID")
    told = {name: seen for name, seen in counts.items() if len(seen) > 3 or name in always}
    return owned | {f"unloads.{name}": sum(seen) * 2 > len(seen) for name, seen in told.items()}


def sptes(made: Recording) -> dict[str, Any]:
    changed = [row for rows in made.vms for row in rows if row.kind == "kvm_tdp_mmu_spte_changed"]
    leaves = [row.new for rows in made.vms for row in rows if row.kind == "kvm_mmu_set_spte"]
    mbec = USER_EXECUTE if made.vmx and made.meta.kernel.startswith("7.") else 0
    own = ~(HARDWARE["vmx" if made.vmx else "svm"] | mbec | (3 << 52 if made.ad_off else 0) | PFN)
    mmio = [word for word in leaves if word >> 52 & 3 == 3] if not made.probed("kvm_tdp_mmu_spte_changed") else []
    plain = [word for word in leaves if word not in mmio]
    found: dict[str, Any] = {"spte.writable": _all(plain) & own & (1 << 64) - 1 if plain else None}
    if mmio:
        found["spte.type_shift"] = 52  # an MMIO SPTE's type is 3, and nothing else is in the upper bits of these
    links = [row.new for row in changed if row.level > 1 and row.new & PFN and not row.new & LARGE and row.new & 1]
    if links:
        present = _all(links) & own & (1 << 64) - 1
        found["spte.present"] = present
        found["spte.writable"] = (found["spte.writable"] or 0) & ~present or None
        empty = {
            row.old for row in changed if row.new & present and not row.old & present and not row.old & PFN & ~LARGE
        }
        removed = {row.new for row in changed if not row.new & present and row.new & 0xFFF}
        frozen = {word for word in removed if word & 0xFF0 == word & ~(1 << 63)}
        found["spte.nonpresent"] = empty.pop() if len(empty) == 1 else None
        found["spte.frozen"] = frozen.pop() if len(frozen) == 1 else None
    return found


def _all(words: list[int]) -> int:
    bits = (1 << 64) - 1
    for word in words:
        bits &= word
    return bits


def codes(made: Recording) -> dict[str, Any]:
    tried = [row for rows in made.vms for row in rows if row.kind == "fast_page_fault"]
    fixed = {row.ret for row in tried if row.new != row.old and row.new & 1}
    other = {row.ret for row in tried if row.ret not in fixed} if fixed else set()
    fast: bool | None = True if tried else None
    if not tried and made.name.startswith("dirty-log-") and not made.vmx:
        fast = False
    return {
        "fast": fast,
        "ret_pf.fixed": fixed.pop() if len(fixed) == 1 else None,
        "ret_pf.invalid": other.pop() if len(other) == 1 else None,
    }


def zaps(made: Recording) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in made.threads("zap_root_begin", "zap_root_end").values():
        levels: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            if row.kind == "zap_root_begin":
                top = row.role & 15
                levels[row.root].append(0 if row.level == top else row.level)
        for seen in levels.values():
            if not any(seen) and len(seen) == 1:
                found["passes"] = ()
            elif 0 in seen:
                found["passes"] = tuple(seen[: seen.index(0) + 1])
    for rows in made.threads("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page").values():
        for before, row in itertools.pairwise(rows):
            if row.kind == "kvm_mmu_prepare_zap_page" and row.level == 1 and row.table:
                shown = before.kind == "kvm_tdp_mmu_spte_changed" and (before.old & PFN) >> 12 == row.table
                found["children_first"] = not shown
    for rows in made.vms:
        destroyed = False
        for row in rows:
            destroyed |= row.kind == "vm_destroy"
            if destroyed and row.kind == "zap_root_begin" and made.meta.policy == "preserve":
                found["ends_exclusively"] = not row.flags & 1
    return found


def dirty_logging(made: Recording) -> dict[str, Any]:
    if not made.name.startswith("dirty-log-huge"):
        return {}
    found: dict[str, Any] = {}
    changed = [row for rows in made.vms for row in rows if row.kind == "kvm_tdp_mmu_spte_changed" and row.level == 2]
    tables: set[int] = set()
    ended = False
    for row in changed:
        if row.new & 1 and not row.new & LARGE:
            tables.add((row.new & PFN) >> 12)
        elif (row.old & PFN) >> 12 in tables and row.old & 1 and not ended:
            ended = True
            found["recovers"] = bool(row.new & 1 and row.new & LARGE)
            if not found["recovers"]:
                found["zapped_as_frozen"] = bool(row.new & 0xFFF)
    if made.probed("kvm_mmu_split_huge_page"):
        found["eager_split"] = "kvm_mmu_split_huge_page" in made.kinds
    return found


def small_faults(made: Recording) -> dict[str, Any]:
    """What becomes of a huge leaf when the guest executes a page of it: a full table, or nothing at first."""
    if not made.name.startswith("nx-recovery"):
        return {}
    present = made.meta.raw["layout"]["spte"]["present"][0]
    changed = [row for rows in made.vms for row in rows if row.kind == "kvm_tdp_mmu_spte_changed" and row.level == 2]
    after = {row.new >> present & 1 == 1 for row in changed if row.vcpu is not None and row.old & LARGE}
    return {"split_in_place": after.pop() if len(after) == 1 else None}


def events(made: Recording) -> dict[str, Any]:
    pages = [row for rows in made.vms for row in rows if row.kind == "kvm_mmu_get_page"]
    roots = [row for row in pages if row.root]
    made_tables = [row for row in pages if not row.root and row.flags & 1]
    tables = [row.table for row in made_tables]
    twice = any(one == other for one, other in itertools.pairwise(tables))
    level = min((row.level for row in made_tables), default=0) - 1
    plain = made.name.startswith(("steady", "smi-storm"))  # leaves of 4 KiB, one VM
    return {
        "spte_changed": "kvm_tdp_mmu_spte_changed" in made.kinds,
        "root_get_page": bool(roots) if "root_get" in made.kinds else None,
        "get_page_twice": twice if tables else None,
        "child_level": level if plain and level >= 0 else None,
    }


def vendor(made: Recording) -> dict[str, Any]:
    """The exits before which, and the fault codes with which, KVM's own events name what it was."""
    found: dict[str, set[int]] = defaultdict(set)
    kinds = (
        "kvm_exit", "kvm_entry", "kvm_page_fault", "kvm_userspace_exit", "kvm_msr", "kvm_smm_transition",
        "check_mmio_spte", "fast_page_fault",
    )  # fmt: skip
    for rows in made.threads(*kinds).values():
        exit_, fault = None, None
        for row in rows:
            if row.kind == "kvm_exit":
                exit_, fault = row.code, None
            elif row.kind == "kvm_entry":
                exit_ = None
            elif exit_ is None:
                continue
            elif row.kind == "kvm_page_fault":
                fault = row.code
                found["vendor.nested_fault"].add(exit_)
            elif row.kind == "check_mmio_spte":
                if fault is None:
                    found["vendor.mmio"].add(exit_)
                else:
                    found["vendor.fault.reserved"].add(fault)
            elif row.kind == "fast_page_fault" and fault is not None and (row.old or not made.ad_off):
                found["vendor.fault.present"].add(fault)
                found["vendor.fault.write"].add(fault)
            elif row.kind == "kvm_msr" and row.flags & 1:
                found["vendor.msr_write"].add(exit_)
            elif row.kind == "kvm_smm_transition" and not row.flags & 1:
                found["vendor.rsm"].add(exit_)
            elif row.kind == "kvm_userspace_exit" and row.code in (IO, HLT) and row.ret >= 0:
                found["vendor.io" if row.code == IO else "vendor.hlt"].add(exit_)
    first = [row.code for rows in made.vms for row in rows if row.kind == "kvm_page_fault"][:1]
    if first and made.name.startswith(("steady", "smi-storm")):
        found["vendor.fault.fetch"].update(first)  # of the guest's first instruction
    return dict(found)


def prefetch(made: Recording) -> dict[str, Any]:
    """Shadow MMU in direct mode: neighbours of the page that was asked for."""
    if made.tdp or made.name.endswith(("-npt0", "-ept0")):
        return {}
    tail = neighbours = False
    for rows in made.threads("kvm_mmu_spte_requested", "kvm_mmu_set_spte").values():
        asked: int | None = None
        for row in rows:
            if row.kind == "kvm_mmu_spte_requested":
                asked = row.gfn
            elif asked is not None and row.gfn is not None and row.gfn != asked and row.level == 1:
                neighbours = True
                tail |= row.gfn > asked
    return {"prefetches_tail": tail if neighbours else None}


Observer = Callable[[Recording], dict[str, Any]]
OBSERVERS: tuple[Observer, ...] = (
    policy, points, layout, zap_all_fast, slot_zap, search_puts, triggers, sptes, codes, zaps, dirty_logging,
    small_faults, events, vendor, prefetch,
)  # fmt: skip
ANY_MMU: frozenset[Observer] = frozenset((points, prefetch))
