# SPDX-License-Identifier: Apache-2.0
"""A leak, a double free and a missing flush, put into the model on purpose: a user sees which invariant breaks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay import plan, run
from replay.decode.capabilities import Capabilities
from replay.simulate import page_table
from replay.simulate.dispatch import begin, feed
from replay.simulate.model_state import Root, Vcpu, Violation
from replay.simulate.operations import Block, Cause, Op, Ranges, Word, pack
from replay.simulate.page_table import Table
from replay.simulate.reference import Vm
from traces.errors import VERDICT_FAILED, Problem
from traces.kernels.policies import PRESERVE, SYNC, PolicyParameters
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
FRESH = """
from traces.kernels.policies import PRESERVE
from replay.simulate.policy_api import Policy
class Own(Policy):
    name = "own"
    parameters = PRESERVE
"""


def replayed(tmp_path: Path, recording: str, policy: str = FRESH) -> None:
    path = tmp_path / "own.py"
    path.write_text(policy)
    run.replay(plan.make(Capabilities(Trace.open(CORPUS / f"{recording}.parquet")), [str(path)]))


def broken(tmp_path: Path, recording: str, policy: str = FRESH) -> str:
    """What the user sees: one line, the verdict's exit code, and a root with what happened to it before."""
    with pytest.raises(Problem) as raised:
        replayed(tmp_path, recording, policy)
    told = str(raised.value)
    assert raised.value.code == VERDICT_FAILED
    assert "\n" not in told
    named = re.search(r"root (\d+)", told)
    assert named
    history = told.split("; before: ")[1]
    assert f"root {named[1]} created" in history
    assert set(re.findall(r"root (\d+)", history)) == {named[1]}, "the history is that root's"
    assert re.match(r"own: VM \d+, row [\d,]+, [A-Z_]+: ", told), told
    return told


@pytest.mark.parametrize("recording", ["smi-storm-6.1", "notifier-6.1", "dirty-log-huge-6.1", "slot-delete-6.1-async"])
def test_nothing_is_broken_without_a_fault(tmp_path: Path, recording: str) -> None:
    replayed(tmp_path, recording)


def test_a_leaked_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are removed one short: tdp_mmu_pages would not be 0 at the end."""
    unlink = Vm._unlink
    monkeypatch.setattr(Vm, "_unlink", lambda vm, root, gone: unlink(vm, root, list(gone)[1:]))
    told = broken(tmp_path, "slot-delete-6.1-async")
    assert re.search(r"root \d+ is freed with 1 of its tables left, the first of level \d at gfn 0x", told)


def test_a_leaked_root(tmp_path: Path) -> None:
    keeps = FRESH.replace("PRESERVE", "ASYNC") + "    def on_put_to_zero(self, vm, root, cause, vcpu): pass\n"
    forgets = "    def on_load(self, vm, word): return None\n"
    ends = "    def on_vm_end(self, vm): vm.roots[:0] = [self.kept]\n"
    keeps += "    kept = None\n" + forgets + ends
    keeps = keeps.replace("cause, vcpu): pass", "cause, vcpu): self.kept = root; vm.free(root, cause, vcpu)")
    told = broken(tmp_path, "smi-storm-6.1", keeps)
    assert re.search(r"END: VM end: 1 roots and 0 tables are left, root \d+ among them", told)


def test_a_root_freed_twice(tmp_path: Path) -> None:
    twice = FRESH.replace("PRESERVE", "ASYNC")
    twice += "    def on_put_to_zero(self, vm, root, cause, vcpu):\n"
    twice += "        vm.free(root, cause, vcpu)\n        vm.free(root, cause, vcpu)\n"
    assert re.search(r"UNLOAD: root \d+ is freed twice; .*freed \(smi\)", broken(tmp_path, "smi-storm-6.1", twice))


def test_a_root_used_after_it_was_freed(tmp_path: Path) -> None:
    stale = FRESH.replace("PRESERVE", "ASYNC") + "    kept = None\n"
    stale += "    def on_put_to_zero(self, vm, root, cause, vcpu):\n"
    stale += "        self.kept = root; vm.free(root, cause, vcpu)\n"
    stale += "    def on_load(self, vm, word): return self.kept\n"
    assert re.search(r"root \d+ is loaded after it was freed", broken(tmp_path, "smi-storm-6.1", stale))


def test_a_table_freed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Vm._zap_tree

    def twice(vm: Vm, root: Root) -> tuple[int, int]:
        top = list(page_table.tables(root.top))
        gone = remove(vm, root)
        vm._unlink(root, top[-1:])
        return gone

    monkeypatch.setattr(Vm, "_zap_tree", twice)
    told = broken(tmp_path, "slot-delete-6.1-async")
    assert re.search(r"the table of level \d at gfn 0x[0-9a-f]+ of root \d+ is freed twice", told)


def test_a_missing_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notifier's unmap that forgets to flush the TLBs before it drops mmu_lock."""
    unlock = Vm._unlock
    monkeypatch.setattr(Vm, "_unlock", lambda vm, flush: unlock(vm, False))
    told = broken(tmp_path, "notifier-6.1")
    assert re.search(r"ZAP: \d+ leaves of root \d+ are removed without a flush: a vCPU that has it loaded", told)


# The same small life for every fault: two pages in a table, a second vCPU, a range zapped, an invalidation, the end.
LIFE = [
    (pack(Op.ENTER, 0), 0), (pack(Op.TOUCH, 0, 1), 8), (pack(Op.TOUCH, 0, 1), 9), (pack(Op.ENTER, 1), 0),
    (pack(Op.ZAP, level=0), 0), (pack(Op.TOUCH, 1, 1), 8), (int(Op.INVALIDATE), 0), (pack(Op.ENTER, 0), 0),
    (pack(Op.ENTER, 1), 0), (int(Op.END), 0),
]  # fmt: skip


def lived(parameters: PolicyParameters) -> Vm:
    op, gfn = (np.array(column) for column in zip(*LIFE, strict=True))
    none = np.zeros(len(LIFE), np.int64)
    vm = begin(parameters, [Word(0x3784)], 2)
    feed(vm, Block(op.astype(np.uint32), gfn.astype(np.int64), none, none), Ranges([(8, 9)]))
    return vm


def test_a_life_without_a_fault() -> None:
    assert lived(PRESERVE).counters.tables == lived(PRESERVE).counters.tables_freed == 3
    assert lived(SYNC).roots == []


@pytest.mark.parametrize(
    ("what", "fault", "at"),
    [
        ("removed without a flush", ("_flush", lambda vm, root: None), 4),
        ("is freed with 3 of its tables left", ("_unlink", lambda vm, root, gone: None), 8),
    ],
)
def test_the_operation_is_the_first_that_can_know(
    monkeypatch: pytest.MonkeyPatch, what: str, fault: tuple[str, Any], at: int
) -> None:
    monkeypatch.setattr(Vm, *fault)
    with pytest.raises(Violation, match=what) as raised:
        lived(PRESERVE)
    assert (raised.value.at, raised.value.root) == (at, 0)


def test_a_reference_put_too_often() -> None:
    vm = begin(SYNC, [Word(0x3784)], 1)
    root = Root(7, 0, Table(4, 0), 0)
    with pytest.raises(Violation, match="root 7 is put more often than it was taken"):
        vm._put(root, Cause.OTHER, Vcpu(0))
