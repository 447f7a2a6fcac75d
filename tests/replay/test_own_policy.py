# SPDX-License-Identifier: Apache-2.0
"""A replay under the recording's own policy equals its rows everywhere, and no longer once a row is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from replay import own_policy, plan, run
from replay.decode.capabilities import Capabilities
from replay.decode.row_counts import RowCount, RowCounts
from replay.decode.vm_inputs import VmInputs, vcpu_ids
from replay.own_policy import Agreement, OwnPolicyCheck
from tests.corpus import CORPUS, REPLAYED, each
from tests.replay.altered import Mutation, Rows, mutations, tells, with_rows
from tests.replay.plain import plain
from traces.kernels.policies import POLICIES
from traces.reader import Trace

HERE = Path(__file__).parents[1] / "recordings"
# Mutations of all recordings together; `make mutations` asks for 10,000, of every recording of a TDP MMU.
COUNT = int(os.environ.get("MUTATIONS", "300"))
FEW = (
    "smi-one-5.10", "dirty-log-5.10", "smi-one-6.1", "smi-one-6.1-async", "dirty-log-6.1", "huge-6.1-async", "huge-7.x",
    "wp-toggle-6.12", "roots-6.12", "dirty-log-huge-7.x", "smi-one-6.1-ept", "mmio-6.1-ept", "dirty-log-huge-6.1-ept",
    "slot-move-6.1-async-ept", "dirty-log-6.1-pml", "notifier-6.1-eptad0", "smi-one-7.x-ept",
)  # fmt: skip
TDP = tuple(path.stem for path in REPLAYED if not path.stem.endswith("-shadow"))
MUTATED = TDP if COUNT >= 10_000 else FEW


def checks(capabilities: Capabilities) -> list[OwnPolicyCheck]:
    """Of each VM, under its own policy alone."""
    return run.replay(plan.make(capabilities, [capabilities.own.name])).checks


@pytest.mark.parametrize("path", each([*REPLAYED, *HERE.glob("*.parquet")]))
def test_every_recording_agrees_with_itself(path: Path) -> None:
    capabilities = Capabilities(Trace.open(path))
    found = checks(capabilities)
    assert [check.text for check in found if check.text] == []
    for check in found:
        names = {reading.count for reading in check.readings}
        assert names >= {"roots created", "roots found", "roots freed", "tables built"}
        assert names & {"leaf installs", "leaf installs and permission faults"}
        shows = capabilities.kernel.spte_changed and not capabilities.shadow
        assert ({"tables removed", "leaf SPTEs zapped", "permission faults"} <= names) == shows
        assert {name for name, _ in check.unseen}.isdisjoint(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATED)
def test_each_mutation_that_changes_a_count_is_found(name: str) -> None:
    rows = Rows(CORPUS / f"{name}.parquet")
    assert not checks(with_rows(rows.trace, rows.table))[0].text
    telling = (mutation for mutation in mutations(rows, Random(f"{name} {COUNT}")) if tells(rows, mutation))
    for mutation in islice(telling, COUNT // len(MUTATED)):
        (check,) = checks(with_rows(rows.trace, mutation.table(rows.table)))
        assert check.agreement is Agreement.DIFFERS, f"{mutation} was not found"
        assert check.row is not None


def test_the_row_is_the_one_from_which_they_differ() -> None:
    rows = Rows(CORPUS / "smi-one-6.1.parquet")
    installs = [at for at in rows.places()["kvm_tdp_mmu_spte_changed"] if rows.listed[at]["level"] == 1]
    for at in (installs[0], installs[100], installs[300]):
        (check,) = checks(with_rows(rows.trace, Mutation(at, "", None).table(rows.table)))
        # The replay is ahead from the kvm_mmu_set_spte on, whose change of an SPTE is not there.
        installed = next(reading for reading in check.readings if reading.count == "leaf installs")
        assert installed.row == rows.listed[at + 1]["seq"]
        assert (installed.replayed, installed.low) == (installed.low + 1, installed.low)
        assert f"from row {installed.row:,} on" in check.text


@pytest.mark.parametrize(("name", "policy"), [
    ("smi-storm-6.1", "async"), ("smi-storm-6.1", "sync"), ("smi-storm-6.1-async", "preserve"),
    ("smi-storm-5.10", "preserve"), ("smi-storm-6.1-shadow", "async"),
])  # fmt: skip
def test_another_policy_than_the_recorded_one_is_not_what_the_rows_show(name: str, policy: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    capabilities = Capabilities(trace)
    capabilities.own = capabilities.kernel.parameters(policy)
    capabilities.shadow = POLICIES[policy].mmu == "shadow"
    (check,) = checks(capabilities)
    assert check.agreement is Agreement.DIFFERS
    assert any(reading.count.startswith("roots") for reading in check.differences)
    told = own_policy.untrusted([check])
    assert len(told) == 1
    assert told[0].startswith("UNTRUSTED: the replay under the recording's own policy is not what its rows show: VM 1")


def lost(path: Path, since: int, kind: str = "kvm_mmu_set_spte", count: int = 3) -> Trace:
    """The recording as if it had lost some events from a time on."""
    trace = Trace.open(path)
    loss = {kind: {"emitted": {}, "stored": {}, "lost": {"0": count}}}
    gap = {"cpu": 0, "lost": count, "kinds": [kind], "since": since, "until": since + 10}
    trace.metadata = replace(trace.metadata, loss=loss, gaps=(gap,), gap_count=1)
    return trace


def test_what_begins_after_a_loss_is_not_decided() -> None:
    rows = Rows(CORPUS / "smi-one-6.1.parquet")
    at = rows.places()["kvm_tdp_mmu_spte_changed"][100]
    table = type(rows.table).from_batches(
        [*rows.table.slice(0, at).to_batches(), *rows.table.slice(at + 1).to_batches()]
    )
    since = rows.listed[at]["time"]
    path = CORPUS / "smi-one-6.1.parquet"
    (before,) = checks(with_rows(lost(path, since - 1000), table))
    assert before.agreement is Agreement.OPEN
    assert "3 events were lost" in before.why
    (after,) = checks(with_rows(lost(path, rows.listed[-1]["time"]), table))
    assert after.agreement is Agreement.DIFFERS
    # As many as that may have been lost of what is lacking: then they are not apart.
    (within,) = checks(with_rows(lost(path, since - 1000, "kvm_tdp_mmu_spte_changed"), table))
    installed = next(reading for reading in within.readings if reading.count == "leaf installs")
    assert installed.agrees
    assert installed.high == installed.low + 3


def test_a_vm_that_ran_before_is_not_compared() -> None:
    trace = Trace.open(CORPUS / "smi-one-6.1.parquet")
    trace.metadata = replace(trace.metadata, vms=tuple({**vm, "origin": "snapshot"} for vm in trace.metadata.vms))
    (check,) = checks(Capabilities(trace))
    assert check.agreement is Agreement.OPEN
    assert check.text == "VM 1: not compared with its rows: it was running before the recording began"
    assert own_policy.to_dict([check])["agrees"] is None


def test_what_no_row_shows_is_not_observable() -> None:
    rows = Rows(CORPUS / "smi-one-6.1.parquet")
    kinds = rows.trace.metadata.kinds
    few = {kind: count for kind, count in kinds.items() if kind not in ("kvm_tdp_mmu_spte_changed", "root_put")}
    rows.trace.metadata = replace(rows.trace.metadata, kinds=few)
    keep = [at for at, kind in enumerate(rows.kinds) if kind in few]
    (check,) = checks(with_rows(rows.trace, rows.table.take(keep)))
    assert check.agreement is Agreement.AGREES
    assert {name for name, _ in check.unseen} == {
        "tables removed", "leaf SPTEs zapped", "leaf installs", "permission faults"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["smi-one-5.10", "mmio-6.1-async", "dirty-log-huge-7.x", "smi-one-6.1-shadow"])
def test_compiled_and_plain_count_the_same(name: str) -> None:
    capabilities = Capabilities(Trace.open(CORPUS / f"{name}.parquet"))
    (vm,) = capabilities.trace.metadata.vms
    found: list[Any] = []
    for counter in (RowCounts, plain("replay.decode.row_counts").RowCounts):
        rows = counter(capabilities, len(vcpu_ids(vm)), True)
        logs = [rows.log.copy() for _ in VmInputs(capabilities, vm, size=500, row_counts=rows)]
        found.append((rows.counts.tolist(), rows.late_sets, rows.late_tables, rows.mmio, np.concatenate(logs).tolist()))
    assert found[0] == found[1]
    assert found[0][0][RowCount.CREATED] > 0
