# SPDX-License-Identifier: Apache-2.0
"""The engine does what the reference does, bit for bit: compiled, and the same file as plain Python."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.rows import vcpu_rows
from replay.decode.spans.vcpu_states import VcpuState
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import VmInputs
from replay.simulate import dispatch, engine
from replay.simulate.compiled import core
from replay.simulate.engine import Engine, RootState, Vcpus
from replay.simulate.model_state import Violation
from replay.simulate.operations import Block, Cause, Op, Ranges, Word, pack
from replay.simulate.page_table import Table
from replay.simulate.reference import Vm
from tests.corpus import REPLAYED, each
from tests.profiles import examples
from tests.replay.plain import COMPILED, ROOT, plain
from tests.replay.streams import Stream, block_of, streams
from tests.thinned import thinned
from traces.errors import Problem
from traces.kernels.policies import ASYNC, POLICIES, PRESERVE, SYNC, PolicyParameters
from traces.reader import Trace

TINY = (16, 16, 32)  # tables, nodes and log rows at first: pools grow all the time


BENEATH = tuple(f"replay.simulate.compiled.{name}" for name in ("vm_pools", "trees", "root_slots", "vm_operations"))
PLAIN: Any = plain("replay.simulate.compiled.core", *BENEATH)


def mapped(vm: Vm, word: int) -> list[tuple[int, int]]:
    """(gfn, level) of the leaves of the valid root with this word."""
    found: list[tuple[int, int]] = []

    def below(table: Table) -> None:
        for at, entry in table.entries.items():
            if isinstance(entry, Table):
                below(entry)
            else:
                found.append((table.gfn_of(at), table.level))

    root = vm.find(word)
    if root is not None:
        below(root.top)
    return sorted(found)


def run(stream: Stream, core: Any, sizes: list[int]) -> tuple[Engine, Vm]:
    """Both implementations after the whole stream, which the engine gets in blocks of `sizes`, taken in turn."""
    vm = dispatch.begin(stream.parameters, stream.words, stream.vcpus)
    dispatch.feed(vm, stream.block, stream.ranges)
    made = Engine(stream.parameters, stream.words, stream.vcpus, core=core, rows=TINY)
    at = turn = 0
    while at < len(stream.block):
        size = sizes[turn % len(sizes)]
        made.feed(stream.cut(at, at + size), stream.ranges, at)
        at, turn = at + size, turn + 1
    return made, vm


def assert_same(made: Engine, vm: Vm) -> None:
    counted = made.vcpus
    for field in fields(Vcpus):
        assert getattr(counted, field.name).tolist() == [getattr(v, field.name) for v in vm.vcpus], field.name
    assert made.counters == vm.counters
    log = made.take_log()
    columns = [getattr(log, field.name).tolist() for field in fields(log)]
    expected = [tuple(int(value) for value in asdict(row).values()) for row in vm.log]
    assert list(zip(*columns, strict=True)) == expected
    roots = [RootState(r.id, r.word, r.refs, r.valid, r.leaves, r.tables) for r in vm.roots]
    assert made.roots == roots
    held = [[-1 if root is None else root.id for root in v.slots] for v in vm.vcpus]
    assert made.slots.tolist() == held
    for word in range(len(vm.words)):
        levels, gfns = made.mapped(word)
        assert list(zip(gfns.tolist(), levels.tolist(), strict=True)) == mapped(vm, word)


SIZES = st.lists(st.sampled_from([1, 3, 63, 64, 65, 200]), min_size=1, max_size=3)


@given(stream=streams(), sizes=SIZES)
@examples(300)
def test_compiled_is_the_reference(stream: Stream, sizes: list[int]) -> None:
    assert_same(*run(stream, core.Core, sizes))


@given(stream=streams(), sizes=SIZES)
@examples(40)
def test_as_plain_python_is_the_reference(stream: Stream, sizes: list[int]) -> None:
    assert_same(*run(stream, PLAIN.Core, sizes))


@given(stream=streams())
@examples(60)
def test_what_each_operation_changes_is_what_the_reference_changes(stream: Stream) -> None:
    made = Engine(stream.parameters, stream.words, stream.vcpus, rows=TINY)
    changes = made.feed_each(stream.block, stream.ranges)
    vm = dispatch.begin(stream.parameters, stream.words, stream.vcpus)
    before = told(vm)
    for at, change in enumerate(changes.tolist()):
        dispatch.feed(vm, stream.cut(at, at + 1), stream.ranges, at)
        after = told(vm)
        assert change == [now - was for was, now in zip(before, after, strict=True)]
        before = after
    assert_same(made, vm)


def told(vm: Vm) -> list[int]:
    """The reference's counts, in the order of `engine.CHANGES`."""
    counters, vcpus = vm.counters, vm.vcpus
    sums = {name: sum(getattr(v, name) for v in vcpus) for name in ("creations", "reuses", "faults", "fixes")}
    counts = {**asdict(counters), **sums, "installs": sums["faults"] + counters.prefetched}
    return [counts[name] for name in engine.CHANGES]


def storm(parameters: PolicyParameters, seed: int = 0, count: int = 6000) -> Stream:
    """Two vCPUs over some hundred tables, with roles, SMIs and memslot changes between: long enough to reuse tables."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        vcpu = int(rng.integers(2))
        dice = rng.integers(100)
        if dice < 92:
            gfn = int(rng.integers(1 << 16)) * 64 + int(rng.integers(4))
            rows.append((pack(Op.TOUCH, vcpu, 2 if dice < 2 else 1, 0, 7), gfn))
        elif dice < 98:
            rows += [
                (pack(Op.UNLOAD, vcpu), int(rng.integers(2)) + 1),
                (pack(Op.ROLE, vcpu), int(rng.integers(2))),
                (pack(Op.ENTER, vcpu), 0),
            ]
        else:
            rows.append([(pack(Op.INVALIDATE), 0), (pack(Op.ZAP, level=0), 0)][int(rng.integers(2))])
    return Stream(parameters, [Word(1), Word(2, as_id=1)], 2, block_of(rows), Ranges([(4096, 1 << 20)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(2, POLICIES))
@pytest.mark.parametrize("assume_refault", [False, True])
def test_named_policies_on_a_longer_stream(name: str, assume_refault: bool) -> None:
    assert_same(*run(storm(replace(POLICIES[name], assume_refault=assume_refault)), core.Core, [1000, 77]))


@pytest.mark.parametrize("path", each(REPLAYED))
def test_every_shipped_recording_under_every_policy(path: Path) -> None:
    capabilities = Capabilities(Trace.open(path))
    named = [
        replace(parameters, assume_refault=assume_refault)
        for parameters in POLICIES.values()
        for assume_refault in (False, True)
    ]
    for vm in capabilities.trace.metadata.vms:
        inputs = VmInputs(capabilities, vm)
        if not inputs.vcpus:
            continue
        specialized = Specialization(capabilities.kernel, Case(), False, len(inputs.vcpus))
        size, words, at = len(inputs.vcpus), specialized.words, 0
        pairs = [
            (Engine(parameters, words, size, rows=TINY), dispatch.begin(parameters, words, size))
            for parameters in named
        ]
        for part in inputs:
            block = specialized.block(part)
            for made, model in pairs:
                made.feed(block, part.ranges, at)
                dispatch.feed(model, block, part.ranges, at)
            at += len(block)
        for pair in pairs:
            assert_same(*pair)


@pytest.mark.parametrize("core", [core.Core, PLAIN.Core])
def test_a_stuck_vcpu_stays_stuck_whatever_happens_to_its_root(core: Any) -> None:
    page, reset = pack(Op.TOUCH, 1, 1), pack(Op.TOUCH, level=1, resets=True)
    later = (pack(Op.TOUCH, level=1), 0)
    rows = [(reset, 0), (page, 1), (pack(Op.ZAP_ALL), 0), (page, 1), later, (pack(Op.INVALIDATE), 0), (page, 1), later]
    made, vm = run(Stream(ASYNC, [Word(0)], 2, block_of([*rows, (pack(Op.END), 0), later]), Ranges()), core, [64])
    assert_same(made, vm)
    assert made.vcpus.stuck.tolist() == [0, -1]
    assert made.vcpus.hits.tolist() == [0, 0]


@pytest.mark.parametrize("core", [core.Core, PLAIN.Core])
@pytest.mark.parametrize("parameters", [ASYNC, PRESERVE])
def test_a_switch_evicts_the_eldest_of_four(core: Any, parameters: PolicyParameters) -> None:
    rows = [(pack(Op.ENTER), 0)]
    for word in (1, 2, 3, 4, 2, 0, 1):
        rows += [(pack(Op.SWITCH), word), (pack(Op.ENTER), 0), (pack(Op.TOUCH, level=1), word)]
    words = [Word(number) for number in range(5)]
    made, vm = run(Stream(parameters, words, 1, block_of(rows), Ranges()), core, [64])
    assert_same(made, vm)
    assert made.counters.frees == (0 if parameters is PRESERVE else 3)


@pytest.mark.parametrize("core", [core.Core, PLAIN.Core])
def test_a_switch_with_an_empty_slot_moves_later_ones_up(core: Any) -> None:
    """cached_root_find_without_current: the last of the previous slots is empty then, and nothing is evicted next."""
    rows = [(pack(Op.ENTER), 0)]
    for word in (1, 2, 3):
        rows += [(pack(Op.SWITCH), word), (pack(Op.ENTER), 0)]
    rows += [(pack(Op.SWITCH), 4), (pack(Op.SWITCH), 2), (pack(Op.SWITCH), 4), (pack(Op.ENTER), 0)]
    words = [Word(number) for number in range(5)]
    made, vm = run(Stream(ASYNC, words, 1, block_of(rows), Ranges()), core, [64])
    assert_same(made, vm)
    assert made.counters.frees == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [core.Core, PLAIN.Core])
def test_split_of_a_gigabyte_takes_up_where_memory_ended(kind: Any) -> None:
    rows = [
        (pack(Op.TOUCH, level=3), 5),
        (pack(Op.SPLIT), 0),
        (pack(Op.TOUCH, level=1), 7),
        (pack(Op.COLLAPSE, level=3), 9),
    ]
    for stop in (3, 4):
        stream = Stream(PRESERVE, [Word(0)], 1, block_of(rows[:stop]), Ranges([(0, 1 << 18)]))
        made, vm = run(stream, kind, [10])
        assert made.counters == vm.counters
        assert made.counters.tables == 1 + 513
        if kind is not PLAIN.Core:
            assert_same(made, vm)


@pytest.mark.parametrize("core", [core.Core, PLAIN.Core])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(pack(Op.TOUCH, level=1), 1 << 40)], "operation 7 (TOUCH): frame 0x10000000000"),
        ([(pack(Op.TOUCH, level=1), -1)], "operation 7 (TOUCH): frame -0x1"),
        ([(pack(Op.FIX, level=1), 1 << 62)], "FIX"),
        ([(pack(Op.COLLAPSE, level=2), 1 << 41)], "COLLAPSE"),
        ([(pack(Op.TOUCH, level=4), 0)], "level 4"),
        ([(pack(Op.TOUCH, level=0), 0)], "level 0"),
        ([(pack(Op.TOUCH, vcpu=2, level=1), 0)], "vCPU 2 of a VM that has 2"),
        ([(pack(Op.ENTER, vcpu=65535), 0)], "vCPU 65535"),
        ([(pack(Op.ROLE), 1)], "word 1 of a VM that has 1"),
        ([(pack(Op.SWITCH), -1)], "word -1"),
        ([(pack(Op.UNLOAD), 14)], "cause 14"),
        ([(pack(Op.ZAP), 1)], "range 1 of 1"),
        ([(pack(Op.SPLIT), -1)], "range -1 of 1"),
        ([(pack(Op.TOUCH, level=1), 0)] * 300 + [(pack(Op.TOUCH, 2, 1), 0)], "operation 307 (TOUCH): vCPU 2"),
        (
            [(pack(Op.TOUCH, level=1), 0)] * 65 + [(pack(Op.TOUCH, level=5), 0)],
            "operation 72 (TOUCH): a leaf of level 5",
        ),
        ([(pack(Op.TOUCH, level=1), 0)] * 63 + [(pack(Op.TOUCH), 0), (pack(Op.ENTER), 0)], "operation 70"),
        ([(pack(Op.ENTER), 0)] * 100 + [(12, 0)], "operation 107: there is no operation 12"),
    ],
)
def test_bad_operations_are_refused_before_any_is_done(core: Any, rows: list[tuple[int, int]], words: str) -> None:
    made = Engine(PRESERVE, [Word(0)], 2, core=core)
    block = block_of([(pack(Op.TOUCH, level=1), 0), *rows])
    with pytest.raises(Problem) as caught:
        made.feed(block, Ranges([(0, 8)]), 6)
    assert words in str(caught.value)
    assert made.vcpus.faults.tolist() == [0, 0]
    assert made.roots == []


def test_a_range_zap_without_ranges_is_refused() -> None:
    made = Engine(PRESERVE, [Word(0)], 1)
    with pytest.raises(Problem, match="range 0 of 0"):
        made.feed(block_of([(pack(Op.ZAP), 0)]), Ranges())


def test_ranges_may_be_added_between_blocks() -> None:
    ranges = Ranges([(0, 1)])
    made, vm = Engine(PRESERVE, [Word(0)], 1), dispatch.begin(PRESERVE, [Word(0)], 1)
    for end in (1, 600, 9):
        block = block_of(
            [(pack(Op.TOUCH, level=1), 0), (pack(Op.TOUCH, level=1), 513), (pack(Op.ZAP), ranges.add(0, end))]
        )
        made.feed(block, ranges)
        dispatch.feed(vm, block, ranges)
    made.feed(block_of([(pack(Op.ZAP), 0)]), Ranges([(512, 514)]))
    dispatch.feed(vm, block_of([(pack(Op.ZAP), 0)]), Ranges([(512, 514)]))
    assert_same(made, vm)


@pytest.mark.parametrize(
    ("parameters", "words", "vcpus", "says"),
    [
        (PRESERVE, [Word(0)], 0, "vCPUs"),
        (PRESERVE, [], 1, "role word"),
        (PRESERVE, [Word(0, level=3)], 1, "level 4 or 5"),
        (replace(PRESERVE, prefetch=4), [Word(0)], 1, "prefetch"),
    ],
)
def test_a_vm_that_cannot_be_is_refused(parameters: PolicyParameters, words: list[Word], vcpus: int, says: str) -> None:
    with pytest.raises(Problem, match=says):
        Engine(parameters, words, vcpus)


def test_columns_of_other_types_are_refused() -> None:
    block = block_of([(pack(Op.ENTER), 0)])
    with pytest.raises(Problem, match="uint32 and int64"):
        Engine(PRESERVE, [Word(0)], 1).feed(replace(block, gfn=block.gfn.astype(np.int32)), Ranges())


def test_read_only_and_strided_columns_will_do() -> None:
    block = block_of([(pack(Op.TOUCH, level=1), gfn) for gfn in range(40)])
    block.op.flags.writeable = block.gfn.flags.writeable = False
    made = Engine(PRESERVE, [Word(0)], 1)
    made.feed(block, Ranges())
    made.feed(Block(block.op[::2], block.gfn[::2], block.time[::2], block.seq[::2]), Ranges())
    assert made.vcpus.faults.tolist() == [40]
    assert made.vcpus.hits.tolist() == [20]


@pytest.mark.parametrize("core", [core.Core, PLAIN.Core])
def test_broken_reference_counts_are_violations(core: Any) -> None:
    """No stream breaks the invariants, so the state is broken by hand."""
    load, unload, end = (block_of([(pack(op), 0)]) for op in (Op.ENTER, Op.UNLOAD, Op.END))
    made = Engine(PRESERVE, [Word(0)], 1, core=core)
    made.feed(load, Ranges())
    made._root["refs"][1] = 1
    with pytest.raises(Violation, match="final put of the valid root 0"):
        made.feed(unload, Ranges())
    made = Engine(ASYNC, [Word(0)], 1, core=core)
    made.feed(load, Ranges())
    made._root["refs"][1] = 5
    with pytest.raises(Violation, match="VM end: 1 roots and 0 tables are left"):
        made.feed(end, Ranges())


def test_without_a_log_all_else_is_the_same() -> None:
    stream = storm(SYNC)
    with_log, without = (Engine(stream.parameters, stream.words, stream.vcpus, log=log) for log in (True, False))
    for made in (with_log, without):
        made.feed(stream.block, stream.ranges)
    assert len(with_log.take_log()) > 100
    assert len(with_log.take_log()) == 0
    assert len(without.take_log()) == 0
    assert with_log.counters == without.counters
    assert with_log.roots == without.roots


def test_memory_follows_the_state_not_the_stream() -> None:
    made = Engine(ASYNC, [Word(0)], 1, log=False)
    pages = 1 << 18
    gfns = np.arange(pages, dtype=np.int64)
    touch = Block(np.full(pages, pack(Op.TOUCH, level=1), np.uint32), gfns, gfns, gfns)
    made.feed(touch, Ranges())
    once = made.bytes_used
    assert once < pages
    for _ in range(3):
        made.feed(block_of([(pack(Op.UNLOAD), Cause.SMI)]), Ranges())
        made.feed(touch, Ranges())
    assert made.bytes_used == once
    assert made.vcpus.refaults.tolist() == [3 * pages]


def members(name: str, package: str = "replay/simulate/compiled") -> list[str]:
    """The fields of a C structure, in order."""
    text = (ROOT / package / "structures.pxd").read_text()
    body = re.search(rf"^cdef struct {name}:.*\n((?:    .*\n)+)", text, re.MULTILINE)
    assert body is not None, name
    return re.findall(r"^    (?:long long|unsigned int)(?:\[\d+\])? (\w+)", body[1], re.MULTILINE)


def test_structures_are_those_of_the_pools() -> None:
    """The compiled engine reads numpy's memory as C structures: fields, in order, all of 8 bytes."""
    pairs = [
        ("Vcpu", engine._VCPU),
        ("Word", engine._WORD),
        ("Root", engine._ROOT),
        ("Row", engine._LOG),
        ("Slots", engine._SLOTS),
    ]
    for name, dtype in pairs:
        assert members(name) == list(dtype.names or ()), name
    assert engine._VCPU.itemsize == 64


@pytest.mark.skipif(not os.environ.get("CI") and not core.COMPILED, reason="the engine is not compiled: scripts/setup")
@pytest.mark.parametrize("name", COMPILED)
def test_what_runs_is_compiled(name: str) -> None:
    """Never a silent fallback in CI."""
    built = Path(str(importlib.import_module(name).__file__))
    assert built.suffix == ".so"
    sources = list(built.parent.glob(f"{name.rpartition('.')[2]}.p[yx]*"))
    newest = max(source.stat().st_mtime for source in sources)
    assert built.stat().st_mtime >= newest, "older than its source: scripts/setup"


@pytest.mark.parametrize(("module", "structure", "layout"), [
    ("replay.decode.spans.timeline", "Thread", "THREAD"),
    ("replay.decode.same_rip", "RipRun", "RIP_RUN"),
    ("replay.decode.spans.timeline", "Moment", "MOMENT"),
    ("replay.decode.specialize", "Program", "PROGRAM"),
])  # fmt: skip
def test_structures_of_decoding_are_those_of_their_pools(module: str, structure: str, layout: str) -> None:
    as_python = plain(module)
    assert list(getattr(as_python, structure)._members) == [name for name, *_ in getattr(as_python, layout)]
    dtype = np.dtype(getattr(as_python, layout))
    assert dtype.itemsize % 8 == 0
    assert all(each.base.itemsize == 8 for each, *_ in (dtype.fields or {}).values())


def test_the_decoders_vcpu_is_the_row_of_its_pool() -> None:
    assert members("Vcpu", "replay/decode/rows") == [name for name, *_ in vcpu_rows.VCPU]
    assert np.dtype(vcpu_rows.VCPU).itemsize == 8 * (len(vcpu_rows.VCPU) - 1 + len(VcpuState))
    structures = (ROOT / "replay/decode/rows/structures.pxd").read_text()
    assert f"long long[{len(VcpuState)}] ns" in structures


def test_running_as_plain_python_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "COMPILED", False)
    monkeypatch.setattr(engine, "Core", PLAIN.Core)
    monkeypatch.setattr(Engine, "said", False)
    for _ in range(2):
        Engine(PRESERVE, [Word(0)], 1, core=PLAIN.Core)
    assert capsys.readouterr().err.count("uncompiled") == 1
