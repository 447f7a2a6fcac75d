# SPDX-License-Identifier: Apache-2.0
"""The root policy by the rows: found in every recording of the TDP MMU, and above what the kernel's types say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.traces.making import KVM_A, event, stream, trace
from traces import kernels
from traces.errors import Problem
from traces.kernels.policies import POLICIES
from traces.kernels.policy_rows import COLUMNS, PolicyRow, Watch
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
SYNC = Path(__file__).parents[1] / "recordings" / "smi-storm-6.1-sync.parquet"
INVALID = 0x800
ROLE = 0x3784


@pytest.mark.corpus
@pytest.mark.parametrize(
    "path", [p for p in sorted(CORPUS.glob("*.parquet")) if not p.stem.endswith(("shadow", "npt0", "ept0"))]
)
def test_rows_of_a_recording_show_its_policy(path: Path) -> None:
    opened = Trace.open(path)
    metadata = opened.metadata
    assert metadata.seen_policy == "", "the rows do not contradict the types"
    other = "sync" if POLICIES[metadata.policy].own_reference else "preserve"
    watch = Watch(other, kernels.recorded(metadata).layout.invalid)
    for batch in opened.batches(COLUMNS):
        watch.see(map(PolicyRow._make, zip(*(column.to_pylist() for column in batch.columns), strict=True)))
    assert watch.other == metadata.policy


def test_a_modified_kernel_is_told_by_its_rows() -> None:
    metadata = Trace.open(SYNC).metadata
    assert metadata.raw["policy"]["name"] == "preserve-inline"
    assert metadata.policy == "sync"
    kernel = kernels.recorded(metadata)
    assert (kernel.policy, kernel.parameters().request) == ("sync", "obsolete")


def storm(inline: bool) -> np.ndarray:
    """A root that is built, put by its only vCPU, and zapped by that or by a worker."""
    vcpu = {"kvm": KVM_A, "tid": 7, "tgid": 5, "vcpu": 0, "role": ROLE, "root": 77}
    zapper = vcpu | {"tid": 7 if inline else 9, "role": ROLE | INVALID}
    return stream([
        event("vm_create", kvm=KVM_A, tid=5, tgid=5),
        event("kvm_mmu_get_page", **vcpu, w1=77, level=4, flags=1),
        event("root_get", **vcpu, n=1),
        event("mmu_load", **vcpu),
        event("root_put", **vcpu, w0=77, n=1),
        event("zap_root_begin", **zapper, n=1, level=3),
    ])  # fmt: skip


@pytest.mark.parametrize(("inline", "expected"), [(True, "sync"), (False, "async")])
def test_compaction_writes_the_policy_of_the_rows(tmp_path: Path, inline: bool, expected: str) -> None:
    manifest = {"host": {"kernel": "6.12.5"}, "policy": {"name": "preserve", "why": "its types"}}
    trace(tmp_path / "a.parquet", storm(inline), manifest)
    metadata = Trace.open(tmp_path / "a.parquet").metadata
    assert metadata.policy == metadata.raw["kernel"]["policy"] == expected
    assert "preserve by the kernel's types" in metadata.raw["policy"]["why"]
    assert kernels.recorded(metadata) == replace(kernels.at("6.12.5"), policy=expected, version=(6, 12, 5))


def test_what_the_rows_bear_out_is_left_as_the_recorder_said(tmp_path: Path) -> None:
    manifest = {"host": {"kernel": "6.0.5"}, "policy": {"name": "async", "why": "its types"}}
    trace(tmp_path / "a.parquet", storm(inline=False), manifest)
    metadata = Trace.open(tmp_path / "a.parquet").metadata
    assert metadata.raw["policy"] == manifest["policy"] | {"by": "rows"}
    assert metadata.policy_text == "async, by its rows"


def test_who_zaps_a_root_decides_where_references_do_not(tmp_path: Path) -> None:
    manifest = {"host": {"kernel": "6.0.5"}, "policy": {"name": "async", "why": "its types"}}
    trace(tmp_path / "a.parquet", storm(inline=True), manifest)
    assert Trace.open(tmp_path / "a.parquet").metadata.policy_text == "sync, by its rows"


def test_without_rows_the_types_decide_and_the_user_above_all(tmp_path: Path) -> None:
    manifest = {"host": {"kernel": "6.12.5"}, "policy": {"name": "preserve", "why": "its types"}}
    trace(tmp_path / "a.parquet", storm(inline=True)[:2], manifest)
    assert Trace.open(tmp_path / "a.parquet").metadata.policy_text == "preserve, by the kernel's types"
    given = Trace.open(tmp_path / "a.parquet", "async").metadata
    assert given.policy_text == "async, by --recorded-policy"
    assert kernels.recorded(given).policy == "async"
    with pytest.raises(Problem, match="--recorded-policy lazy: give one of sync, async, preserve-worker, preserve, "):
        Trace.open(tmp_path / "a.parquet", "lazy")


def test_of_an_old_trace_the_rows_are_asked_at_once() -> None:
    assert Trace.open(SYNC).metadata.policy_text == "sync, by its rows"
    assert Trace.open(CORPUS / "smi-one-6.1.parquet").metadata.policy_text == "preserve, by its rows"
    assert Trace.open(CORPUS / "smi-one-6.1-shadow.parquet").metadata.policy_text == "shadow, by the kernel's types"
