# SPDX-License-Identifier: Apache-2.0
"""Rows that kvmtrace recorded against those that another tool recorded at the same time, field by field."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from traces.schema import BY_NAME

# Not in the preset that kvmtrace records with.
PEERS_ONLY = {"kvm_pio", "kvm_emulate_insn", "other"}
# What no tracepoint has: a root's frame stands in `table`, where it is created or zapped, and in `root`.
NOT_SHOWN = {"root", "role of kvm_page_fault", "table of kvm_mmu_get_page", "table of kvm_mmu_prepare_zap_page"}


def rows_of(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path).sort("seq").with_columns(pl.col("kind").cast(pl.String))


def compare(native: pl.DataFrame, theirs: pl.DataFrame, *, preempted: bool = False) -> None:
    """Every tracepoint's rows are in both, equal and in the same order.

    `preempted` says that a task may be preempted between two tools' probes of one event, as from 7.0 on
    (a46023d5616e): it then goes on to the next tool later, and maybe on another CPU. Its own events keep their order.
    """
    tracepoints = set(theirs["kind"].unique()) - PEERS_ONLY
    counts = [dict(rows.group_by("kind").len().rows()) for rows in (native, theirs)]
    assert {kind: counts[1][kind] for kind in tracepoints} == {kind: counts[0].get(kind) for kind in tracepoints}
    assert {kind for kind in counts[0] if kind.startswith("kvm_")} <= tracepoints  # and none of ours is missing
    # On one CPU all three see events one after the other; between CPUs each takes the time when its turn comes.
    place = ("tid",) if preempted else ("cpu", "tid")
    mine, other = (rows.sort(place[0], maintain_order=True) for rows in (native, theirs))
    for kind in tracepoints:
        of_kind = [each for each in BY_NAME[kind].columns if not {each, f"{each} of {kind}"} & NOT_SHOWN]
        columns = [*place, "vcpu", *of_kind]
        rows, peers = (each.filter(pl.col("kind") == kind).select(columns).rows() for each in (mine, other))
        assert rows == peers, kind
    rows, peers = (
        each.filter(pl.col("kind").is_in(tracepoints)).select(*place, "kind").rows() for each in (mine, other)
    )
    assert rows == peers
