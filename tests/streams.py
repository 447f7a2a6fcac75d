# SPDX-License-Identifier: Apache-2.0
"""Raw record streams that look like recordings: what the format is measured and tested with where no KVM can make them.

Kinds, order and volume follow the traces of real kernels: a fault is exit, page fault, requested SPTE, a page and an
SPTE change per missing table, the leaf's change, the installed SPTE, entry; an SMI and its RSM each empty the root
(before v6.4), and the old tree's tables are zapped 512 SPTEs at a time by a worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.columns import kind_name
from traces.record import RECORD
from traces.schema import BY_NAME, OWN_KINDS

Records = NDArray[np.void]

ROLE, SMM_ROLE = 0x3784, 0x01003784
START = 3_600_000_000_000  # ns after boot
FROZEN = 0x5A0


def rows(count: int, kind: str, key: Any, **fields: Any) -> tuple[Records, NDArray[np.float64]]:
    """`count` records of one kind with the given fields, and the sort keys that place them in the stream."""
    records = np.zeros(count, RECORD)
    records["kind"] = BY_NAME[kind].code
    for name, value in fields.items():
        records[name] = value
    return records, np.broadcast_to(np.asarray(key, np.float64), count)


def merge(parts: list[tuple[Records, NDArray[np.float64]]]) -> Records:
    records = np.concatenate([part[0] for part in parts])
    return records[np.argsort(np.concatenate([part[1] for part in parts]), kind="stable")]


def smi_storm(faults: int, seed: int = 0, vm: int = 1, vcpus: int = 2) -> Records:
    """About 9 records a fault: a guest in an SMI storm on a 6.1 kernel without preserved roots."""
    rng = np.random.default_rng([seed, vm])
    fault = np.arange(faults)
    life = fault // 48  # faults until the next SMI or RSM
    lives = int(life[-1]) + 1
    smm = life % 2 == 1
    vcpu = rng.integers(0, vcpus, lives)[life]

    # The guest touches runs of pages in a few hot 2 MiB regions, some twice: that is spurious.
    regions = rng.integers(0, 1 << 11, 40)
    region = regions[np.minimum(rng.zipf(1.4, faults) - 1, 39)]
    gfn = region * 512 + (fault * rng.integers(1, 3, faults) + region) % 512
    host = rng.permutation(1 << 12)[region % (1 << 12)] * 512 + gfn % 512 + 0x100000
    leaf = (host.astype(np.uint64) << np.uint64(12)) | np.uint64(0x0600000000000F77)
    code = rng.choice([0x181, 0x182, 0x184, 0x783], faults, p=[0.3, 0.4, 0.2, 0.1])
    rips = np.uint64(0xFFFFFFFF81000000) + rng.integers(0, 1 << 20, 600).astype(np.uint64)
    rip = rips[np.minimum(rng.zipf(1.3, faults) - 1, 599)]
    roots = 0x180000 + rng.permutation(lives * 7)[:lives]
    root = roots[life]
    role = np.where(smm, SMM_ROLE, ROLE)

    # A table is missing the first time its life touches its range.
    frames = iter(0x200000 + rng.permutation(4 * faults + 64))
    missing, parent_frame = {}, {}
    leaf_table = np.zeros(faults, np.int64)
    for level, shift in ((3, 27), (2, 18), (1, 9)):
        place = life * (1 << 40) + (gfn >> shift)
        _, first, inverse = np.unique(place, return_index=True, return_inverse=True)
        tables = np.fromiter(frames, np.int64, len(first))
        missing[level] = (np.sort(first), tables[np.argsort(first)])
        parent_frame[level] = leaf_table = tables[inverse]

    common = {"kvm": 0xFFFF888100000000 + vm * 0x10000, "tgid": 1000 * vm}

    def here(at: NDArray[np.intp]) -> dict[str, Any]:
        return common | {
            "root": root[at], "role": role[at], "vcpu": vcpu[at], "tid": 1000 * vm + 10 + vcpu[at],
            "cpu": (vcpu[at] + vm) % 16, "as_id": smm[at].astype(np.uint8),
        }  # fmt: skip

    at = fault.astype(np.float64)
    every = here(fault)
    parts = [
        rows(faults, "kvm_exit", at, w0=48, w1=rip, w2=code, w3=gfn << 12, **every),
        rows(faults, "kvm_page_fault", at + 0.05, w0=(gfn << 12) + rng.integers(0, 512, faults) * 8, w1=code, w2=rip,
             **every),
        rows(faults, "kvm_mmu_spte_requested", at + 0.10, w0=gfn, w1=host, level=1, **every),
        rows(faults, "kvm_tdp_mmu_spte_changed", at + 0.50, w0=gfn, w2=leaf, level=1, **every),
        rows(faults, "kvm_mmu_set_spte", at + 0.55, w0=gfn, w1=leaf, w2=leaf_table, level=1, **every),
        rows(faults, "kvm_entry", at + 0.60, w0=rip, **every),
    ]  # fmt: skip
    for level, (first, tables) in missing.items():
        table_gfn = gfn[first] >> (9 * level) << (9 * level)
        place = here(first) | {"role": (role[first] & ~0xF) | level}
        spte = (tables.astype(np.uint64) << np.uint64(12)) | np.uint64(0x907)
        parts += [
            rows(len(first), "kvm_mmu_get_page", first + 0.2 + 0.05 * (3 - level), w0=table_gfn, w1=tables, flags=1,
                 level=level, **place),
            rows(len(first), "kvm_tdp_mmu_spte_changed", first + 0.22 + 0.05 * (3 - level), w0=table_gfn, w2=spte,
                 level=level + 1, **place),
        ]  # fmt: skip

    first = np.flatnonzero(np.diff(life, prepend=-1))
    start = here(first)
    parts += [
        rows(len(first), "kvm_smm_transition", first - 0.30, w0=0x30000, flags=smm[first], **start),
        rows(len(first), "mmu_unload", first - 0.25, **start),
        rows(len(first), "kvm_mmu_get_page", first - 0.20, w0=0, w1=root[first], flags=1, level=4, **start),
        rows(len(first), "mmu_load", first - 0.10, **start),
    ]
    parts += _zaps(missing[1], life, gfn, leaf, leaf_table, common)
    records = merge(parts)
    return _timed(records, rng)


def _zaps(tables: Any, life: Any, gfn: Any, leaf: Any, leaf_table: Any, common: dict[str, Any]) -> list[Any]:
    """A worker empties one leaf table of each dead root, in the shared mode: an event for all 512 entries."""
    first, frames = tables
    chosen = np.flatnonzero(np.diff(life[first], prepend=-1))
    first, frames = first[chosen], frames[chosen]
    old = np.zeros((len(first), 512), np.uint64)
    slot = {int(frame): index for index, frame in enumerate(frames)}
    for index in np.flatnonzero(np.isin(leaf_table, frames)).tolist():
        old[slot[int(leaf_table[index])], gfn[index] & 511] = leaf[index]
    base = (gfn[first] >> 9 << 9)[:, None] + np.arange(512)
    key = (first[:, None] + 60.3 + np.arange(512) * 1e-4).ravel()
    worker = common | {"tgid": 77, "tid": 77, "vcpu": -1, "cpu": 5}
    return [
        rows(len(first), "kvm_mmu_prepare_zap_page", first + 60.29, w0=base[:, 0], w1=frames, level=1,
             role=ROLE & ~0xF | 1, **worker),
        rows(len(key), "kvm_tdp_mmu_spte_changed", key, w0=base.ravel(), w1=old.ravel(), w2=FROZEN, level=1, **worker),
    ]  # fmt: skip


def emulator_storm(loops: int, seed: int = 0, vm: int = 1) -> Records:
    """About 14 records a loop: a guest of the shadow MMU that writes MMIO and switches CR3, as on a software KVM."""
    rng = np.random.default_rng([seed, vm])
    at = np.arange(loops, dtype=np.float64)
    index = np.arange(loops)
    rip = 0x100000 + 3 * (index % 5)
    roots = 0x140000 + rng.permutation(64)
    root = roots[index // 37 % 64]
    every = {
        "kvm": 0xFFFF888100000000 + vm * 0x10000, "tgid": 1000 * vm, "tid": 1000 * vm + 10, "cpu": vm % 2,
        "root": root, "role": 0x784,
    }  # fmt: skip
    parts = [
        rows(loops, "kvm_exit", at, w0=48, w1=rip, w3=0xD0000000 + 8 * (index % 16), **every),
        rows(loops, "kvm_emulate_insn", at + 0.3, w0=rip, **every),
        rows(loops, "kvm_mmio", at + 0.6, w0=0xD0000000 + 8 * (index % 16), w1=index, w2=8, flags=1, **every),
        rows(loops, "kvm_userspace_exit", at + 0.7, w0=6, n=0, **every),
        rows(loops, "kvm_entry", at + 0.8, w0=rip + 3, **every),
    ]
    for walk in (0, 1):
        parts.append(rows(loops, "kvm_mmu_pagetable_walk", at + 0.1 + 0.2 * walk, w0=rip + 0x1000 * walk, **every))
        for level in (4, 3, 2, 1):
            entry = 0x200023 + 0x1000 * level + 0x8000 * walk
            key = at + 0.1 + 0.2 * walk + 0.01 * (5 - level)
            parts.append(rows(loops, "kvm_mmu_paging_element", key, w0=entry, level=level, **every))
    switch = np.flatnonzero(index % 37 == 0)
    place = {name: value[switch] if isinstance(value, np.ndarray) else value for name, value in every.items()}
    parts += [
        rows(len(switch), "kvm_mmu_get_page", switch - 0.1, w0=rng.integers(0, 64, len(switch)), w1=root[switch],
             level=4, flags=switch // 37 < 64, **place),
        rows(len(switch), "kvm_mmu_prepare_zap_page", switch - 0.05, w0=rng.integers(0, 64, len(switch)),
             w1=rng.integers(0x140000, 0x150000, len(switch)), level=1, **place),
    ]  # fmt: skip
    return _timed(merge(parts), rng)


def _timed(records: Records, rng: np.random.Generator) -> Records:
    """Times in ns: tight within a fault, with the long tail of a real machine between them."""
    gaps = rng.gamma(2.0, 180.0, len(records)) + 60
    gaps[records["kind"] == BY_NAME["kvm_exit"].code] += rng.pareto(1.5, int((records["kind"] == 21).sum())) * 3000
    zap = (records["kind"] == BY_NAME["kvm_tdp_mmu_spte_changed"].code) & (records["vcpu"] < 0)
    gaps[zap] = rng.integers(25, 60, int(zap.sum()))
    records["time"] = START + np.cumsum(gaps.astype(np.int64))
    return records


def interleave(streams: list[Records]) -> Records:
    """Several VMs' streams as one ring would deliver them."""
    records = np.concatenate(streams)
    return records[np.argsort(records["time"], kind="stable")]


def loss_table(records: Records) -> dict[str, dict[str, dict[str, int]]]:
    """What a recorder that lost nothing would report."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    cells = records["kind"].astype(np.int64) << 16 | records["cpu"]
    for cell, count in zip(*np.unique(cells, return_counts=True), strict=True):
        code, cpu = int(cell) >> 16, str(int(cell) & 0xFFFF)
        if kind_name(code) not in OWN_KINDS:  # those are not emitted by probes
            emitted = table.setdefault(kind_name(code), {"emitted": {}, "lost": {}})["emitted"]
            emitted[cpu] = emitted.get(cpu, 0) + int(count)
    return table
