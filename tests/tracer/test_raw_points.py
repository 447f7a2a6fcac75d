# SPDX-License-Identifier: Apache-2.0
"""Which tracepoints are taken raw: where BTF or the format vouches for the arguments, and the machine has the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tracer.probing import attachments, host, tracefs
from tracer.probing.btf import Btf
from tracer.probing.offsets import FAULT_MEMBERS, Layout
from tracer.probing.points import EXIT_IN_MEMORY, PHYSICAL, RIP_IN_MEMORY, Version
from tracer.probing.probes import PROBES
from tracer.probing.program import Chosen, program
from tracer.probing.tracefs import Field

U64, U32 = "long long unsigned int", "unsigned int"
# Arguments as the BTF of the lab's kernels has them, and of 5.15 as in its source; there is none of 5.10's module.
_FROM_5_16 = {
    "kvm_mmu_spte_requested": ("kvm_page_fault *",),
    "kvm_mmu_set_spte": ("int", U64, f"{U64} *"),
    "fast_page_fault": ("kvm_vcpu *", "kvm_page_fault *", f"{U64} *", U64, "int"),
    "kvm_page_fault": ("kvm_vcpu *", U64, U64),
    "kvm_entry": ("kvm_vcpu *", "_Bool"),
    "kvm_exit": ("kvm_vcpu *", U32),
}
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "5.10": {},
    "5.15": {
        "kvm_mmu_spte_requested": (U64, "int", U64),
        "kvm_mmu_set_spte": ("int", U64, f"{U64} *"),
        "fast_page_fault": ("kvm_vcpu *", U64, U32, f"{U64} *", U64, "int"),
        "kvm_page_fault": ("long unsigned int", U32),
        "kvm_entry": ("kvm_vcpu *",),
        "kvm_exit": (U32, "kvm_vcpu *", U32),
    },
    "6.1": _FROM_5_16,
    "6.12": _FROM_5_16,
    "6.18": _FROM_5_16,
    "7.3": {**_FROM_5_16, "kvm_mmu_spte_requested": ("kvm_page_fault *", "unsigned char")},
}
_SPTE = ("gfn", "spte", "sptep", "level", "r", "x", "u")
_FAST = ("vcpu_id", "cr2_or_gpa", "error_code", "sptep", "old_spte", "new_spte", "ret")
_EXIT = ("exit_reason", "guest_rip", "isa", "info1", "info2", "intr_info", "error_code", "vcpu_id")
_OLD = {
    "kvm_mmu_spte_requested": ("gfn", "pfn", "level"),
    "kvm_mmu_set_spte": _SPTE,
    "fast_page_fault": _FAST,
    "kvm_page_fault": ("fault_address", "error_code"),
    "kvm_entry": ("vcpu_id", "rip"),
    "kvm_exit": _EXIT,
}
_NEW = {
    **_OLD,
    "kvm_page_fault": ("vcpu_id", "guest_rip", "fault_address", "error_code"),
    "kvm_entry": ("vcpu_id", "rip", "immediate_exit"),
}
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "5.10": _OLD,
    "5.15": _OLD,
    "6.1": _NEW,
    "6.12": _NEW,
    "6.18": _NEW,
    "7.3": {
        **_NEW,
        "kvm_mmu_spte_requested": ("gfn", "pfn", "level", "access"),
        "kvm_entry": ("vcpu_id", "rip", "immediate_exit", "intr_info", "error_code"),
        "kvm_exit": (*_EXIT, "requests"),
    },
}
# Those that show nothing but their arguments, which are the same in all of these kernels.
PLAIN = {
    "kvm_msr": {"write": U32, "ecx": U32, "data": U64, "exception": "_Bool"},
    "kvm_cr": {"rw": U32, "cr": U32, "val": "long unsigned int"},
    "kvm_userspace_exit": {"reason": U32, "errno": "int"},
    "check_mmio_spte": {"spte": U64, "kvm_gen": U32, "spte_gen": U32},
    "handle_mmio_page_fault": {"addr": U64, "gfn": U64, "access": U32},
    "kvm_fast_mmio": {"gpa": U64},
    "kvm_mmu_pagetable_walk": {"addr": U64, "pferr": U32},
    "kvm_mmu_paging_element": {"pte": U64, "level": "int"},
}
WHOLE = Layout(dict.fromkeys((*FAULT_MEMBERS, "FAULT_CODE_SIZE", "VCPU_RIP", "VCPU_PROTECTED", "SP_ROLE"), 8), {}, "")
WITHOUT_MODULE_BTF = Layout({"VCPU_RIP": 8, "SP_ROLE": 8}, {}, "")
AMD = frozenset((RIP_IN_MEMORY, EXIT_IN_MEMORY, PHYSICAL))
INTEL = frozenset((PHYSICAL,))


def chosen(
    kind: str,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
    signature: tuple[str, ...] | None = None,
    printed: tuple[str, ...] | None = None,
    layout: Layout | None = None,
) -> list[Chosen]:
    (probe,) = (probe for probe in PROBES if probe.kind == kind)
    major, _, minor = kernel.partition(".")
    known = SIGNATURES[kernel].get(kind) if signature is None else signature
    names = printed or FORMATS[kernel][kind]
    fields = {name: Field(8 + 8 * i, 4 if name == "errno" else 8, name == "errno") for i, name in enumerate(names)}
    version: Version = (int(major), int(minor))
    monkeypatch.setattr(attachments, "kernel_version", lambda: version)
    monkeypatch.setattr(attachments, "_symbols", dict)
    monkeypatch.setattr(tracefs, "tracepoint", lambda *_: fields)
    layout = layout or (WHOLE if SIGNATURES[kernel] else WITHOUT_MODULE_BTF)
    btf = SimpleNamespace(signature=lambda _: None if known is None else ("void *", *known))
    found = attachments._choose(probe, cast("Btf", btf), Path("/"), layout, "", False)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("kernel", SIGNATURES)
@pytest.mark.parametrize("kind", _FROM_5_16)
def test_frequent_tracepoints_are_raw(kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(kind, kernel, monkeypatch)
    amd, intel = (attachments._best(found, machine).how for machine in (AMD, INTEL))
    of_vcpu = kind in ("kvm_entry", "kvm_exit") or (kind == "kvm_page_fault" and kernel not in ("5.10", "5.15"))
    if kernel.startswith("7."):
        assert (amd, intel) == ("tp", "tp"), "a raw probe may be preempted, and its CPU then skips others"
        return
    assert intel == ("tp" if of_vcpu else "raw"), "with VMX a vCPU's RIP is not in memory"
    assert amd == ("tp" if (kind, kernel) == ("kvm_exit", "5.10") else "raw")


@pytest.mark.parametrize("kernel", SIGNATURES)
@pytest.mark.parametrize("kind", _FROM_5_16)
def test_the_text_has_what_every_machine_takes(kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that were compiled on one machine are for each machine with that kernel."""
    found = chosen(kind, kernel, monkeypatch)
    text = program(found, WHOLE)
    for machine in (AMD, INTEL, frozenset[str]()):
        assert f"int {attachments._best(found, machine).function}(void *ctx)" in text
    assert len({one.function for one in found}) == len(found)


@pytest.mark.parametrize("kind", _FROM_5_16)
def test_other_arguments_are_left_to_the_classic_tracepoint(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(kind, "6.18", monkeypatch, signature=("kvm_mmu *", "int"))
    assert [one.how for one in found] == ["tp"]


@pytest.mark.parametrize("kind", [kind for kind in _FROM_5_16 if kind != "kvm_exit"])
def test_without_btf_the_format_has_to_be_the_very_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel between the versions read, or with a change taken back into it."""
    found = chosen(kind, "5.10", monkeypatch, printed=(*FORMATS["5.10"][kind], "more"))
    assert [one.how for one in found] == ["tp"]


@pytest.mark.parametrize("kind", _FROM_5_16)
def test_members_that_are_not_known_are_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(kind, "6.18", monkeypatch, layout=Layout({}, {}, ""))
    assert attachments._best(found, AMD).how == ("raw" if kind == "kvm_mmu_set_spte" else "tp")


@pytest.mark.parametrize("kernel", ["5.10", "6.18"])
@pytest.mark.parametrize("kind", PLAIN)
def test_arguments_that_are_shown_as_they_are(kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(PLAIN[kind].values()) if kernel == "6.18" else None
    shown = tuple(sorted(PLAIN[kind]))  # a format may have another order than the arguments
    raw = chosen(kind, kernel, monkeypatch, signature=known, printed=shown)
    assert [one.how for one in raw] == ["raw"]
    other = chosen(kind, kernel, monkeypatch, signature=known, printed=(*shown, "more"))
    assert [one.how for one in other] == ["tp"], "the format tells what its fields are, and is not this one"


def test_a_raw_argument_is_cut_to_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen("kvm_userspace_exit", "5.10", monkeypatch, printed=("reason", "errno"))
    body = program(found, WHOLE).rpartition("int on_kvm_userspace_exit_raw")[2]
    assert "((s32)(((struct bpf_raw_tracepoint_args *)ctx)->args[1]))" in body


def test_from_6_16_on_a_protected_guest_s_rip_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {kernel: program(chosen("kvm_entry", kernel, monkeypatch), WHOLE) for kernel in ("6.12", "6.18")}
    assert ["SHOWN_RIP((" in text.rpartition("int on_kvm_entry_raw")[2] for text in texts.values()] == [False, True]


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (probe,) = (probe for probe in PROBES if probe.kind == "kvm_exit")
    found = chosen("kvm_exit", "6.18", monkeypatch)
    said = attachments._instead(probe, attachments._best(found, INTEL), found)
    assert said == "instead of raw kvm:kvm_exit, which needs an exit's reason in memory (SVM)"
    assert attachments._instead(probe, found[0], found) == ""


@pytest.mark.parametrize(
    ("modules", "flags", "svm"),
    [
        (("kvm_amd",), "fpu svm npt", True),
        (("kvm_amd", "kvm_intel"), "fpu svm npt", True),  # both are built in
        (("kvm_amd", "kvm_intel"), "fpu vmx ept", False),
        (("kvm_intel",), "fpu vmx ept", False),
        (("kvm_pvm",), "fpu", False),
        (("kvm_amd", "kvm_pvm"), "fpu svm npt", False),
        ((), "fpu svm npt", False),
    ],
)
def test_where_kvm_uses_svm(
    modules: tuple[str, ...], flags: str, svm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kvm", *modules):
        (tmp_path / module).mkdir()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(host, "MODULE_DIRECTORY", tmp_path)
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.runs_svm() == svm
