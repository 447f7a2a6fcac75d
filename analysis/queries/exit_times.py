# SPDX-License-Identifier: Apache-2.0
"""Queries of a recording: exits by reason, returns to userspace, ioctls, guest RIPs by faults, the host's changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.grouped import KEY, OTHER, KindsBy, kind_names
from analysis.reading.latencies import Latencies, summed
from analysis.reading.rows import KIND, Tally
from analysis.reading.sources import Recording
from traces.kernels.exit_names import exit_name
from traces.kernels.vendors import Vendor, vendor_of
from traces.kvm_names import ioctl_name, user_exit_name
from traces.schema import BY_NAME
from traces.untrusted import object_at, text_at
from traces.vm_names import VmNames

_LASTED: Final = ("p50_ns", "p99_ns", "longest_ns")
EXITS: Final = Latencies("kvm_exit", ("kvm_entry",))
USER_EXITS: Final = Latencies("kvm_userspace_exit", ("kvm_entry", "kvm_userspace_exit"), failing=True)
IOCTLS: Final = Latencies("ioctl", ("ioctl_end",), calls=True)
# What the host and other tasks did to a VM's memory and roots.
CHANGES: Final = (
    "memslot", "kvm_mmu_zap_all_fast", "roots_invalidate", "zap_all", "zap_leafs", "zap_root_begin",
    "zap_invalidated_begin", "kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva", "kvm_test_age_hva",
    "kvm_mmu_get_page", "kvm_mmu_prepare_zap_page", "kvm_mmu_split_huge_page", "kvm_apicv_inhibit_changed",
    "host_suspend",
)  # fmt: skip


@query(Recording, needs=("kvm_exit",), asks=lambda _: [EXITS])
def exits(recording: Recording) -> pl.LazyFrame:
    """Exits by reason: how many, and the time until the guest is entered again; the most time first.

    `ns` is the sum, `share` of all the time of the VM's vCPUs; `p50_ns` and `p99_ns` are right to 1 %, `longest_ns` is
    exact. Time is null where entries were not recorded. What userspace did with an exit, and idle time, is in it.
    """
    (counted,) = recording.ask(EXITS)
    vendor = _vendor(recording)
    reason = pl.col("code").map_elements(lambda code: exit_name(vendor, code), pl.String)
    return _shared(recording, summed(counted.lazy(), ("vm", "code"))).select(
        "vm", "code", reason.alias("reason"), pl.col("begun").alias("exits"), "ns", "share", *_LASTED
    )  # fmt: skip


@query(Recording, needs=("kvm_userspace_exit",), asks=lambda _: [USER_EXITS])
def user_exits(recording: Recording) -> pl.LazyFrame:
    """Returns of KVM_RUN to userspace by reason or error, and the time until the vCPU runs again; the most time first.

    That time ends with the vCPU's next entry, or with KVM_RUN's next return if no entry was seen: without entries it
    includes the guest's own time.
    """
    (counted,) = recording.ask(USER_EXITS)
    # The exit reason of a KVM_RUN that failed is left over from the one before.
    said = counted.lazy().with_columns(pl.when(pl.col("ret") >= 0).then("code"))
    rows = _shared(recording, summed(said, ("vm", "code", "ret")))
    reason = pl.struct("code", "ret").map_elements(lambda row: user_exit_name(row["code"] or 0, row["ret"]), pl.String)
    return rows.select(
        "vm", "code", "ret", reason.alias("reason"), pl.col("begun").alias("returns"), "ns", "share", *_LASTED
    )  # fmt: skip


@query(Recording, needs=("ioctl",), asks=lambda _: [IOCTLS])
def ioctls(recording: Recording) -> pl.LazyFrame:
    """KVM's ioctls by name (KVM_RUN is not among them): how many, and how long they took; the most time first.

    `vm` is null for ioctls of /dev/kvm itself.
    """
    (counted,) = recording.ask(IOCTLS)
    name = pl.col("code").map_elements(ioctl_name, pl.String)
    rows = summed(counted.lazy().with_columns(pl.when(pl.col("vm") > 0).then("vm")), ("vm", "code"))
    return rows.select("vm", "code", name.alias("ioctl"), pl.col("begun").alias("calls"), "ns", *_LASTED).sort(
        "ns", "calls", "vm", "code", descending=[True, True, False, False]
    )  # fmt: skip


def faulting_rips() -> KindsBy:
    """Return the question that counts faults by the guest's RIP."""
    return KindsBy(
        "faults by RIP", ("kvm_page_fault",), (KIND, "time", "rip", KIND), {"rip": KEY.reinterpret(signed=False)}
    )


@query(Recording, needs=("kvm_page_fault",), asks=lambda _: [faulting_rips()])
def rips(recording: Recording) -> pl.LazyFrame:
    """Where the guest was when it faulted: RIPs by faults, the most first; `symbol` where `--symbols` has a name."""
    (counted,) = recording.ask(faulting_rips())
    total = pl.col("rows").sum().over("vm")
    name = pl.col("rip").map_elements(recording.symbol or (lambda _: ""), pl.String)
    return (
        counted.lazy()
        .sort("rows", "vm", "rip", descending=[True, False, False])
        .select("vm", "rip", name.alias("symbol"), faults="rows", share=pl.col("rows") / total,
                first_time="first_time", last_time="last_time")
    )  # fmt: skip


def halts(recording: Recording) -> list[int]:
    """Return the RIPs of HLT exits: where the guest's kernel idles."""
    vendor = _vendor(recording)
    halted = pl.any_horizontal(pl.col("code") == code for code in vendor.hlt)
    where = (pl.col("kind") == "kvm_exit") & halted
    (found,) = recording.ask(Tally("HLT exits by RIP", where=where, by={"rip": pl.col("rip")}))
    return found["rip"].unique().to_list()


def changed_by() -> KindsBy:
    """Return the question that counts what the host did to a VM's memory and roots, by kind and thread."""
    return KindsBy(
        "changes", CHANGES, (KIND, "time", "tid", KIND), {"kind": kind_names(OTHER), "tid": KEY.cast(pl.Int32)}
    )


@query(Recording, asks=lambda _: [changed_by()])
def changes(recording: Recording) -> pl.LazyFrame:
    """What was done to a VM's memory and roots, by kind of event and task: memslots, notifiers, tables, zaps."""
    (counted,) = recording.ask(changed_by())
    names = VmNames(recording.metadata)
    kind = pl.col("kind").cast(pl.String)
    return (
        counted.lazy()
        .select(
            "vm", kind, kind.replace_strict({name: BY_NAME[name].meaning for name in CHANGES}).alias("meaning"),
            "tid", pl.col("tid").map_elements(names.task, pl.String).alias("task"), events="rows",
            first_time="first_time", last_time="last_time",
        )
        .sort("events", "vm", "kind", "tid", descending=[True, False, False, False])
    )  # fmt: skip


def _vendor(recording: Recording) -> Vendor:
    return vendor_of(text_at(object_at(recording.metadata.raw, "host"), "vendor"))


def _shared(recording: Recording, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Add `share`, of the time of all the VM's vCPUs; make unknown times null; sort by time, the most first."""
    lengths = list(_lengths(recording))
    of_vms = pl.LazyFrame(lengths, schema={"vm": pl.Int32, "whole": pl.Int64}, orient="row")
    known = pl.col("spans") > 0
    return (
        rows.join(of_vms, on="vm", how="left")
        .with_columns(ns=pl.when(known).then("ns"))
        .with_columns(share=pl.when(pl.col("whole") > 0).then(pl.col("ns") / pl.col("whole")))
        .sort("ns", "begun", "vm", "code", descending=[True, True, False, False], nulls_last=True)
    )


def _lengths(recording: Recording) -> Iterator[tuple[int, int]]:
    spans = recording.spans
    for vm in recording.metadata.vms:
        number = int(vm["id"])
        if number in spans and number < 1 << 31:
            first, last = spans[number]
            yield number, (last - first) * len({each["id"] for each in vm["vcpus"]})
