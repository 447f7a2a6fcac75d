# SPDX-License-Identifier: Apache-2.0
"""The table of probes against the table of kinds, and the C that comes out of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tracer.probing import attachments
from tracer.probing.btf import Btf
from tracer.probing.offsets import _NEEDED, Layout
from tracer.probing.points import FUTURE, OLDEST, Hook
from tracer.probing.probes import HOOKS, IOCTL_KINDS, PRESETS, PROBES, SCHED_KINDS, preset_kinds
from tracer.probing.program import Chosen, program
from tracer.probing.tracefs import Field
from traces.kernels import at
from traces.schema import BY_NAME, KINDS, OWN_KINDS, RECORD_FIELDS, RECORD_SIZE

FIXED = {"root", "role", "level", "as_id", "flags"}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_points_fill_what_their_kind_has(probe) -> None:  # type: ignore[no-untyped-def]
    columns = set(BY_NAME[probe.kind].columns) | {"kvm", "vcpu"}
    for point in probe.points:
        assert set(point.fill) <= columns, (probe.kind, set(point.fill) - columns)
        assert point.how == "raw" or not (point.printed or point.needs)
        assert point.since < point.until
        assert point.how in ("tp", "raw", "entry", "return")
    promised = set(BY_NAME[probe.kind].columns) - {"flags"}
    filled = {name for point in probe.points for name in point.fill}
    assert promised <= filled, (probe.kind, promised - filled)


def test_every_kind_has_a_source() -> None:
    sources = {probe.kind for probe in PROBES} | set(IOCTL_KINDS) | set(SCHED_KINDS) | set(OWN_KINDS)
    assert {kind.name for kind in KINDS} == sources


def test_presets_grow() -> None:
    kinds = [preset_kinds(preset) for preset in PRESETS]
    assert kinds[0] < kinds[1] < kinds[2]
    assert {"kvm_mmu_get_page", "mmu_load", "root_put", "memslot"} <= kinds[0]
    assert "kvm_page_fault" in kinds[1] - kinds[0]


def test_kinds_fit_the_record() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert kind.code < 64, "the gap record names lost kinds in one 64-bit mask"
        assert len(kind.words) <= 4
        assert set(kind.fixed) <= FIXED
    widths = {"u8": 8, "u4": 4, "i4": 4, "u2": 2, "i2": 2, "u1": 1}
    assert sum(widths[ctype] for _, ctype in RECORD_FIELDS) == RECORD_SIZE


def test_the_dated_layout_knows_what_the_probes_read() -> None:
    kernel = at("5.10")
    assert {"SP_ROLE", "SP_GFN", "SP_SPT", "SP_REFS", "SP_TDP", "SP_UNSYNC"} == dict(kernel.page_struct).keys()
    assert sum(kernel.layout.mask(name) for name, _, _ in kernel.layout.fields) < 1 << 32
    assert not at("5.11").page_struct


@pytest.mark.parametrize("version", ["5.10", "5.12", "5.13", "5.15", "5.17", "5.18", "6.1", "6.9", "6.14", "7.3"])
def test_points_are_in_the_kernels_that_the_description_says(version: str) -> None:
    """Every point of the table that its versions allow exists there, and no other of the points that have versions."""
    kernel = at(version)
    for point in (point for probe in PROBES for point in probe.points):
        allowed = point.since <= kernel.version[:2] < point.until
        there = point.where in kernel.points
        if point.how in ("entry", "return") and (point.since > OLDEST or point.until < FUTURE):
            assert there or not allowed, (point, version)
    known = {point.where for probe in PROBES for point in probe.points}
    known |= {where for where, _ in attachments.IOCTL_PROGRAMS}
    known |= {f"sched:{name}" for name, _ in attachments.SCHED_PROGRAMS}
    assert kernel.points - {"tdp_mmu_zap_root_work"} <= known


def test_expressions_become_c() -> None:
    for probe in PROBES:
        for point in probe.points:
            how = {"entry": "kprobe", "return": "kretprobe"}.get(point.how, point.how)
            names = {name for text in point.fill.values() for name in re.findall(r"[$#]\??(\w+)", text)}
            fields = {name: Field(8 + 8 * i, 8, False) for i, name in enumerate(sorted(names))}
            text = program([Chosen(probe, point, how, fields)], Layout({}, {}, ""))
            body = text.rpartition("int on_")[2]
            assert not re.search(r"[@$#]", body), body
            assert "return 0;" not in body, "a 0 would take the event away from everybody else's perf"
            assert f"reserve(self, {BY_NAME[probe.kind].code}, kvm)" in body


def test_an_optional_field_that_is_lacking_reads_zero() -> None:
    probe = next(probe for probe in PROBES if probe.kind == "kvm_page_fault")
    fields = {"fault_address": Field(8, 8, False), "error_code": Field(16, 4, False)}
    text = program([Chosen(probe, probe.points[-1], "tp", fields)], Layout({}, {}, ""))
    body = text.rpartition("int on_")[2]
    assert "*(u32 *)((u8 *)ctx + 16)" in body
    assert "e->w2 = 0;" in body, "5.10 prints no RIP"


@pytest.mark.parametrize(("offsets", "raw"), [({}, False), ({"KVM_USED_PAGES": 8, "KVM_GENERATION": 16}, True)])
def test_a_member_that_is_gone_is_taken_from_the_tracepoint(offsets: dict[str, int], raw: bool) -> None:
    """7.3 has no arch.n_used_mmu_pages: the raw probe would store 0 for what the tracepoint still tells."""
    (probe,) = (probe for probe in PROBES if probe.kind == "kvm_mmu_zap_all_fast")
    assert [point.how for point in probe.points] == ["raw", "tp"]
    btf = SimpleNamespace(signature=lambda _: None)
    assert attachments._raw_matches(probe.points[0], {}, cast("Btf", btf), Layout(offsets, {}, "")) == raw


def test_what_a_preempted_probe_would_skip_is_taken_classic() -> None:
    """Where raw arguments show more, such as a page's address, they are taken all the same."""
    points = {probe.kind: probe for probe in PROBES}
    for kind, shown in (("kvm_page_fault", True), ("kvm_userspace_exit", True), ("kvm_mmu_get_page", False)):
        raw = points[kind].points[0]
        assert raw.how == "raw"
        assert attachments._classic_shows_it(points[kind], raw) == shown, kind


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.points[0].how}-{hook.points[0].where}")
def test_hooks_write_no_row_and_serve_known_kinds(hook: Hook) -> None:
    assert set(hook.serves) <= BY_NAME.keys()
    (point,) = hook.points
    text = program([Chosen(hook, point, "kprobe", {})], Layout({}, {}, ""))
    body = text.rpartition("int on_hook_")[2]
    assert "self->" in body
    assert not re.search(r"[@$]", body), body
    assert "reserve(" not in body


def test_every_notifier_that_begins_ends() -> None:
    """Or the thread's next events would still be about the notified VM."""
    begun = {point.where for hook in HOOKS for point in hook.points if "NOTIFIED" in point.before}
    ended = {point.where for hook in HOOKS for point in hook.points if point.before == "self->notified = 0;"}
    assert begun == ended
    assert len(begun) >= 6


def test_a_layout_that_is_not_known_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.probing.offsets.BTF_DIRECTORY", tmp_path)
    whole = dict.fromkeys(_NEEDED, 8)
    assert Layout(whole, {}, "BTF of vmlinux and kvm").unknown() == ""
    without = {name: at for name, at in whole.items() if not name.startswith("SP_")}
    said = Layout(without, {}, "BTF of vmlinux").unknown()
    assert said.startswith("the layout of struct kvm_mmu_page is not known: the kvm module loaded here has no BTF")
    (tmp_path / "kvm").touch()
    assert "has no SP_ROLE" in Layout(without, {}, "BTF of vmlinux and kvm").unknown()
