# SPDX-License-Identifier: Apache-2.0
"""Which VM and which root rows belong to, one case a test; every case also with its rows in batches of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.making import KVM_A, KVM_B, event, stream, trace
from traces.reader import Trace
from traces.recording import record_buffer

A = {"kvm": KVM_A, "tgid": 100, "tid": 101, "vcpu": 0}
B = {"kvm": KVM_B, "tgid": 200, "tid": 201, "vcpu": 0}


@pytest.fixture(params=[1, 3, 1000], ids="batches of {}".format)
def identify(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function from events (and VMs at the start) to the trace, with (vm, root) of every row in ring order."""
    monkeypatch.setattr(record_buffer, "BATCH_ROWS", request.param)

    def run(*events: Any, alive: list[dict[str, Any]] | None = None) -> tuple[Trace, list[tuple[int | None, int]]]:
        trace(tmp_path / "t.parquet", stream(events), {"snapshot": {"vms": alive or []}})
        opened = Trace.open(tmp_path / "t.parquet")
        rows = [row for batch in opened.batches(["seq", "vm", "root"]) for row in batch.to_pylist()]
        rows.sort(key=lambda row: row["seq"])
        assert [row["seq"] for row in rows] == list(range(len(events)))
        return opened, [(row["vm"], row["root"]) for row in rows]

    return run


def vms_of(rows: list[tuple[int | None, int]]) -> list[int | None]:
    return [vm for vm, _ in rows]


def test_a_pointer_used_again_is_another_vm(identify) -> None:  # type: ignore[no-untyped-def]
    opened, rows = identify(
        event("vm_create", **A), event("kvm_entry", **A), event("vm_destroy", **A), event("kvm_mmu_zap_all_fast", **A),
        event("vm_create", **A | {"tgid": 300}), event("kvm_entry", **A | {"tgid": 300}),
    )  # fmt: skip
    assert vms_of(rows) == [1, 1, 1, 1, 2, 2]
    assert [(vm["pid"], vm["origin"], vm["since"], vm["until"]) for vm in opened.metadata.vms] == [
        (100, "created", 1000, 3000), (300, "created", 5000, None),
    ]  # fmt: skip


def test_a_creation_ends_a_life_whose_destruction_was_not_seen(identify) -> None:  # type: ignore[no-untyped-def]
    opened, rows = identify(event("vm_create", **A), event("vm_create", **A), event("kvm_pio", tgid=100))
    assert vms_of(rows) == [1, 2, 2]
    assert opened.metadata.vms[0]["until"] == 2000


def test_a_vm_of_the_snapshot_keeps_its_id(identify) -> None:  # type: ignore[no-untyped-def]
    alive = [
        {"kvm": KVM_B, "tgid": 200, "comm": "qemu", "vcpus": [{"id": 0, "tid": 201}, {"id": 1, "tid": 202}]},
        {"kvm": KVM_A, "tgid": 100},
    ]
    opened, rows = identify(event("kvm_entry", **A), event("kvm_entry", **B), event("kvm_pio", tgid=200), alive=alive)
    assert vms_of(rows) == [2, 1, 1]
    assert opened.metadata.vms[0]["vcpus"] == [{"id": 0, "tid": 201}, {"id": 1, "tid": 202}]
    assert opened.metadata.vms[0]["comm"] == "qemu"
    assert opened.metadata.vms[0]["since"] is None
    assert "kvm" not in opened.metadata.vms[0]


def test_without_a_pointer_the_process_says_which_vm(identify) -> None:  # type: ignore[no-untyped-def]
    _, rows = identify(
        event("kvm_pio", tgid=100), event("vm_create", **A), event("kvm_pio", tgid=100), event("kvm_pio", tgid=999),
        event("vm_destroy", **A), event("kvm_pio", tgid=100),
    )  # fmt: skip
    assert vms_of(rows) == [None, 1, 1, None, 1, None]


def test_two_vms_in_one_process_leave_a_row_without_pointer_unknown(identify) -> None:  # type: ignore[no-untyped-def]
    two = B | {"tgid": 100}
    _, rows = identify(
        event("vm_create", **A), event("kvm_pio", tgid=100), event("vm_create", **two), event("kvm_pio", tgid=100),
        event("vm_destroy", **A), event("kvm_pio", tgid=100), event("kvm_entry", **two),
    )  # fmt: skip
    assert vms_of(rows) == [1, 1, 2, None, 1, 2, 2]


def test_a_vm_met_by_first_use_learns_its_process_from_a_vcpu(identify) -> None:  # type: ignore[no-untyped-def]
    worker = {"kvm": KVM_A, "tgid": 2, "tid": 77, "vcpu": -1}
    opened, rows = identify(
        event("zap_root_begin", **worker), event("kvm_pio", tgid=100), event("kvm_pio", tgid=2),
        event("kvm_entry", **A), event("kvm_pio", tgid=100), event("kvm_pio", tgid=2),
    )  # fmt: skip
    assert vms_of(rows) == [1, None, None, 1, 1, None]
    assert opened.metadata.vms[0]["pid"] == 100
    assert opened.metadata.vms[0]["origin"] == "first use"


def test_a_gap_is_of_no_vm(identify) -> None:  # type: ignore[no-untyped-def]
    opened, rows = identify(
        event("vm_create", **A), event("gap", **A | {"cpu": 3, "w0": 5, "w1": 1 << 20 | 1 << 21, "w2": 900})
    )
    assert vms_of(rows) == [1, None]
    assert opened.metadata.gaps == (
        {"cpu": 3, "lost": 5, "kinds": ["kvm_entry", "kvm_exit"], "since": 900, "until": 2000},
    )


def created(frame: int, **fields: Any) -> np.ndarray[Any, Any]:
    return event("kvm_mmu_get_page", **{"root": frame, "w1": frame, "flags": 1, "level": 4, "role": 0x3784} | fields)


def freed(frame: int, **fields: Any) -> np.ndarray[Any, Any]:
    return event("table_free", **{"root": frame, "w1": frame} | fields)


def test_a_root_lives_from_creation_to_free(identify) -> None:  # type: ignore[no-untyped-def]
    opened, rows = identify(
        created(50, **A), event("kvm_entry", root=50, **A), freed(50, **A), event("kvm_entry", **A),
        created(50, **A), event("kvm_entry", root=50, **A), created(51, **A),
    )  # fmt: skip
    assert [root for _, root in rows] == [1, 1, 1, 0, 2, 2, 3]
    roots = opened.roots().to_dicts()
    assert [(root["root"], root["table"], root["role"], root["first_seq"], root["created"]) for root in roots] == [
        (1, 50, 0x3784, 0, True), (2, 50, 0x3784, 4, True), (3, 51, 0x3784, 6, True),
    ]  # fmt: skip


def test_a_root_is_found_by_first_use_or_in_the_snapshot(identify) -> None:  # type: ignore[no-untyped-def]
    alive = [{"kvm": KVM_A, "tgid": 100, "roots": [{"table": 60, "role": 1}, {"table": 61, "role": 2}]}]
    opened, rows = identify(
        event("kvm_entry", root=61, **A), event("mmu_load", root=70, role=9, **A), freed(70, **A),
        event("kvm_entry", root=70, **A), alive=alive,
    )  # fmt: skip
    assert [root for _, root in rows] == [2, 3, 3, 4]
    roots = opened.roots().to_dicts()
    assert [(root["table"], root["role"], root["first_seq"], root["created"]) for root in roots] == [
        (60, 1, None, False), (61, 2, 0, False), (70, 9, 1, False), (70, 0, 3, False),
    ]  # fmt: skip


def test_one_frame_in_two_vms_is_two_roots(identify) -> None:  # type: ignore[no-untyped-def]
    _, rows = identify(event("kvm_entry", root=50, **A), event("kvm_entry", root=50, **B))
    assert rows == [(1, 1), (2, 2)]


def test_a_child_table_is_no_birth_and_no_death_of_its_root(identify) -> None:  # type: ignore[no-untyped-def]
    child = {"root": 50, "w1": 99, "level": 3}
    _, rows = identify(
        created(50, **A), event("kvm_mmu_get_page", flags=1, **child, **A), event("table_free", **child, **A),
        event("kvm_entry", root=50, **A),
    )  # fmt: skip
    assert [root for _, root in rows] == [1, 1, 1, 1]


def test_a_free_by_rcu_belongs_to_the_vm_that_used_the_frame(identify) -> None:  # type: ignore[no-untyped-def]
    callback = {"tgid": 200, "tid": 201}  # interrupts whoever runs
    _, rows = identify(
        event("vm_create", **A), event("vm_create", **B), created(50, **A), freed(50, **callback),
        created(50, **B), freed(50, **callback),
    )  # fmt: skip
    assert rows[2:] == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_a_removed_table_belongs_to_the_vm_that_got_it(identify) -> None:  # type: ignore[no-untyped-def]
    """The process of both VMs exits: its thread served B last when the notifier removes A's pages."""
    page, stray = {"root": 0, "w1": 50}, {"root": 0, "w1": 51}
    _, rows = identify(
        event("vm_create", **A), event("vm_create", **B), created(50, **A),
        event("kvm_mmu_prepare_zap_page", **page, **B), event("kvm_mmu_prepare_zap_page", **stray, **B),
    )  # fmt: skip
    assert [vm for vm, _ in rows[3:]] == [1, 2]


def slot_call(slot: int, pages: int, ret: int | None = 0, command: int = 0x4020AE46, **at: Any) -> list[Any]:
    caller = {"kvm": KVM_A, "tgid": 100, "tid": 100} | at
    call = [event("memslot", w0=256 * slot, w1=0x7F0000000000, w2=pages, w3=1, n=slot, **caller)]
    return call if ret is None else [*call, event("ioctl_end", w0=command, n=ret, **caller)]


def test_slots_have_times_and_failed_calls_do_nothing(identify) -> None:  # type: ignore[no-untyped-def]
    alive = [{"kvm": KVM_A, "tgid": 100, "slots": [
        {"slot": 0, "as_id": 0, "gfn": 0, "pages": 8, "hva": 1, "flags": 0},
        {"slot": 9, "as_id": 0, "gfn": 99, "pages": 8, "hva": 1, "flags": 0},
    ]}]  # fmt: skip
    opened, _ = identify(
        *slot_call(1, 512), *slot_call(2, 512, ret=-17), *slot_call(1, 0), *slot_call(0, 16, command=0x40A0AE49),
        *slot_call(3, 32, ret=None), alive=alive,
    )  # fmt: skip
    slots = [
        (slot["slot"], slot["pages"], slot["since"], slot["until"], slot.get("assumed", False))
        for slot in opened.metadata.vms[0]["slots"]
    ]
    assert slots == [
        (0, 8, None, 7000, False), (9, 8, None, None, False), (1, 512, 1000, 5000, False), (0, 16, 7000, None, False),
        (3, 32, 9000, None, True),
    ]  # fmt: skip


def test_the_slots_of_smm_are_their_own(identify) -> None:  # type: ignore[no-untyped-def]
    opened, _ = identify(
        event("vm_create", **A), *slot_call(1, 512), *slot_call(1, 256, as_id=1), *slot_call(1, 0, as_id=1)
    )
    slots = [(slot["as_id"], slot["pages"], slot["until"]) for slot in opened.metadata.vms[0]["slots"]]
    assert slots == [(0, 512, None), (1, 256, 6000)]
