# SPDX-License-Identifier: Apache-2.0
"""Virtual time: what the clock keeps to, and that the compiled one says the same to the ns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.simulate import dispatch
from replay.simulate import timed_operations as columns
from replay.simulate.compiled import core, timer
from replay.simulate.operations import Cause, Op, Ranges, Word, pack
from replay.simulate.timed_operations import FOUND, LAST, MORE
from replay.timing import reference_clock as clocks
from replay.timing import timed_engine as timing
from replay.timing.costs import Costs
from replay.timing.reference_clock import Clock, TimeCategory
from replay.timing.timed_engine import TimedEngine
from tests.profiles import examples
from tests.replay.plain import plain
from tests.replay.test_engine import PLAIN, assert_same, members
from tests.replay.timed_streams import TimedStream, timed_of, timed_streams
from tests.thinned import thinned
from traces.errors import Problem
from traces.kernels.policies import ASYNC, POLICIES, PRESERVE, PolicyParameters

BENEATH = tuple(f"replay.simulate.compiled.{name}" for name in ("timed_queues", "turns", "vcpu_programs"))
PLAIN_TIMER: Any = plain("replay.simulate.compiled.timer", *BENEATH)
PLAIN_TURNS: Any = plain(BENEATH[1], *BENEATH[:1])
PLAIN_TIME: Any = plain(BENEATH[2], *BENEATH[:2])
TIMERS = {core: timer.Timer, PLAIN: PLAIN_TIMER.Timer}
WHOLE = [1 << 30]
SIZES = st.lists(st.sampled_from([1, 2, 3, 17, 64, 100]), min_size=1, max_size=3)


def weights_of(stream: TimedStream) -> list[int]:
    return [1 + 3 * vcpu for vcpu in range(stream.vcpus)]


def by_reference(stream: TimedStream, sizes: Sequence[int] = WHOLE) -> Clock:
    clock = Clock(dispatch.begin(stream.parameters, stream.words, stream.vcpus), stream.costs, weights_of(stream))
    for at, block in stream.blocks(sizes):
        clock.feed(block, stream.ranges, at)
    clock.finish()
    return clock


def by_engine(stream: TimedStream, sizes: Sequence[int] = WHOLE, module: Any = core) -> TimedEngine:
    made = TimedEngine(
        stream.parameters, stream.words, stream.vcpus, stream.costs, core=module.Core, timer=TIMERS[module],
        rows=(1, 1), weights=weights_of(stream),
    )  # fmt: skip
    for at, block in stream.blocks(sizes):
        made.feed(block, stream.ranges, at)
    made.finish()
    return made


def times(clock: Clock) -> list[Any]:
    paces = [(p.clock, p.spent, p.sampled, p.inside, p.samples) for p in clock.paces]
    return [paces, clock.worker, clock.locked, clock.shared, clock.worked, clock.jobs]


def assert_on_time(made: TimedEngine, clock: Clock) -> None:
    assert made.clock.tolist() == [pace.clock for pace in clock.paces]
    assert made.spent.tolist() == [pace.spent for pace in clock.paces]
    assert [samples.tolist() for samples in made.samples] == [
        [list(sample) for sample in pace.samples] for pace in clock.paces
    ]
    found = [made.worker, made.locked, made.shared, made.worked, made.jobs]
    assert found == [clock.worker, clock.locked, clock.shared, clock.worked, clock.jobs]
    assert_same(made.engine, clock.vm)


@given(stream=timed_streams(), sizes=SIZES)
@examples(300)
def test_compiled_is_the_reference_to_the_ns(stream: TimedStream, sizes: list[int]) -> None:
    assert_on_time(by_engine(stream, sizes), by_reference(stream))


@given(stream=timed_streams(), sizes=SIZES)
@examples(40)
def test_as_plain_python_is_the_reference_to_the_ns(stream: TimedStream, sizes: list[int]) -> None:
    assert_on_time(by_engine(stream, sizes, PLAIN), by_reference(stream))


@given(stream=timed_streams(), sizes=SIZES)
@examples(100)
def test_blocks_may_be_cut_anywhere(stream: TimedStream, sizes: list[int]) -> None:
    assert times(by_reference(stream, sizes)) == times(by_reference(stream))


@pytest.mark.slow
@given(stream=timed_streams())
@examples(100)
def test_every_ns_is_spent_on_something(stream: TimedStream) -> None:
    for pace in by_reference(stream).paces:
        assert sum(pace.spent) == pace.clock
        assert min(pace.spent) >= 0
        assert pace.samples == sorted(pace.samples)


BIG = st.integers(0, 1 << 40)


@given(leads=st.lists(st.tuples(BIG, st.integers(0, 100), BIG, st.integers(1, 201)), min_size=1, max_size=50))
@examples(50)
def test_what_no_policy_changes_is_kept(leads: list[tuple[int, int, int, int]]) -> None:
    """Where nothing hits, the time between operations passes as recorded; the guest and the switch get their part."""
    rows = [
        (pack(Op.TOUCH, level=1), page, 0, lead, lead * part // 100, cost, was, MORE)
        for page, (lead, part, cost, was) in enumerate(leads)
    ]
    pace = by_reference(TimedStream(ASYNC, [Word(0)], 1, Costs(), timed_of(rows), Ranges())).paces[0]
    guest = sum(row[4] for row in rows)
    assert pace.spent[TimeCategory.GUEST] + pace.spent[TimeCategory.SWITCH] == guest
    assert pace.spent[TimeCategory.OTHER] == sum(row[3] for row in rows) - guest


PAGES, STEPS, SMIS = 200, 1000, 100
SET_UP = 2_000_000  # ns: more than the pages take


def smi_storm(parameters: PolicyParameters, period: int) -> TimedStream:
    """A working set of PAGES, built before the first SMI; then STEPS of 10 us each, which only FIX counts."""
    rows = [(pack(Op.TOUCH, level=1), page, 0, 2000, 2000, 2500, 1, MORE) for page in range(PAGES)]
    rows += [(pack(Op.FIX, level=1), step % PAGES, 0, 9_000, 9_000, 1_000, 1, MORE) for step in range(STEPS)]
    for number in range(SMIS):
        walls = [SET_UP + number * period, *[MORE] * 5, LAST]
        inside = [(Op.UNLOAD, Cause.SMI), (Op.ROLE, 1), (Op.ENTER, 0), (Op.TOUCH, 5000)]
        inside += [(Op.UNLOAD, Cause.RSM), (Op.ROLE, 0), (Op.ENTER, 0)]
        rows += [
            (pack(op, level=int(op == Op.TOUCH)), int(gfn), 1, 1000, 0, 0, 0, wall)
            for (op, gfn), wall in zip(inside, walls, strict=True)
        ]
    return TimedStream(parameters, [Word(0), Word(1, as_id=1)], 1, Costs(), timed_of(rows), Ranges())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("parameters", "period", "goes_on"),
    [
        (replace(ASYNC, assume_refault=True), 500_000, False),  # refilling 200 pages takes 700 us
        (replace(ASYNC, assume_refault=True), 1_000_000, True),
        (replace(PRESERVE, assume_refault=True), 500_000, True),
    ],
)
def test_no_progress_where_smis_come_faster_than_the_refill(
    parameters: PolicyParameters, period: int, goes_on: bool, compiled: bool
) -> None:
    stream = smi_storm(parameters, period)
    over = SET_UP + SMIS * period
    fixes, clock = [], []
    made = TimedEngine(parameters, stream.words, 1, stream.costs)
    model = Clock(dispatch.begin(parameters, stream.words, 1), stream.costs)
    feed, finish = (made.feed, made.finish) if compiled else (model.feed, model.finish)
    feed(replace(stream.timed, until=over), stream.ranges)
    for _ in range(2):
        fixes.append(int(made.vcpus.fixes[0]) if compiled else model.vm.vcpus[0].fixes)
        clock.append(int(made.clock[0]) if compiled else model.paces[0].clock)
        finish()
    built = PAGES * 4500 + Costs().created + 3 * Costs().table
    before = (SET_UP - built) // 10_000  # steps done when the first SMI came
    assert fixes == [STEPS if goes_on else before, STEPS]
    if not goes_on:
        assert clock[1] > SET_UP + SMIS * 700_000 + (STEPS - before) * 10_000 > over


@pytest.mark.parametrize("module", [core, PLAIN])
def test_an_smi_under_way_is_waited_for(module: Any) -> None:
    """A block may end within an SMI: another vCPU's later load finds the root that the SMI's load has yet to build."""
    rows = [(pack(Op.TOUCH, v, 1), v, v, 1000, 0, 0, 0, MORE) for v in range(2)]
    rows[1:1] = [(pack(Op.ENTER, 1), 0, 1, 20, 0, 0, 0, MORE), (pack(Op.UNLOAD), Cause.SMI, 2, 0, 0, 0, 0, 10)]
    rows += [(pack(Op.ENTER), 0, 2, 5, 0, 0, 0, LAST)]
    stream = TimedStream(ASYNC, [Word(0)], 2, Costs(unload=1), timed_of(rows), Ranges())
    made, clock = by_engine(stream, [4], module), by_reference(stream, [4])
    assert_on_time(made, clock)
    assert made.vcpus.creations.tolist() == [1, 0]


def crowd(parameters: PolicyParameters, costs: Costs, seed: int, count: int = 400) -> TimedStream:
    """Three vCPUs in one role or another, close together, whose last puts of roots make others wait."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, int, int, int, int, int]] = []
    for _ in range(count):
        v = int(rng.integers(3))
        dice = rng.integers(100)
        steps = [(pack(Op.TOUCH, v, 1), int(rng.integers(40) * 300))]
        if dice < 15:
            steps = [(pack(Op.UNLOAD, v), Cause.SMI), (pack(Op.ROLE, v), int(rng.integers(2))), (pack(Op.ENTER, v), 0)]
        for op, gfn in steps:
            lead, cost, was = (int(value) for value in rng.integers(0, (12, 9, 3)))
            rows.append((op, int(gfn), v, lead, lead // 2, cost, was, MORE))
    return TimedStream(parameters, [Word(0), Word(1, as_id=1)], 3, costs, timed_of(rows), Ranges())


@pytest.mark.parametrize("module", thinned(2, [core, PLAIN]))
@pytest.mark.parametrize(("chunk", "cpus"), [(0, 0), (5, 1), (0, 3), (50, 4)])
@pytest.mark.parametrize("teardown", ["inline", "worker"])
@pytest.mark.parametrize("assume_refault", [False, True])
def test_vcpus_that_wait_for_each_other(
    module: Any, chunk: int, cpus: int, teardown: Any, assume_refault: bool
) -> None:
    parameters = replace(ASYNC, teardown=teardown, loads_share=cpus == 3, assume_refault=assume_refault)
    costs = Costs(3, 5, 2, 4, 9, 3, zap_leaf=2, zap_table=7, job=6, chunk=chunk, cpus=cpus)
    stream = crowd(parameters, costs, cpus)
    clock = by_reference(stream)
    assert_on_time(by_engine(stream, [150], module), clock)
    assert sum(pace.spent[TimeCategory.WAIT] for pace in clock.paces) > 0 or (teardown, cpus) == ("worker", 3)


@pytest.mark.parametrize("vcpus", [1, 2, 8])
@pytest.mark.parametrize(("share", "hold"), [(True, 50), (False, 50), (False, 20)])
def test_faults_that_exclude_each_other_queue(vcpus: int, share: bool, hold: int) -> None:
    """Faults of 50 ns, back to back: side by side where they share mmu_lock, else no more than one per `hold`."""
    count = 400
    rows = [(pack(Op.TOUCH, v, 1), page, v, 0, 0, 50, 1, MORE) for page in range(count) for v in range(vcpus)]
    # Each vCPU has pages of its own.
    rows = [(op, gfn * vcpus + v, v, *rest) for op, gfn, v, *rest in rows]  # type: ignore[misc]
    costs = Costs(switch=0, fault=50, table=0, found=0, created=0, hold=hold)
    stream = TimedStream(replace(PRESERVE, faults_share=share), [Word(0)], vcpus, costs, timed_of(rows), Ranges())
    made, clock = by_engine(stream, [64]), by_reference(stream)
    assert_on_time(made, clock)
    alone = count * 50
    assert made.clock.max() - made.spent[:, TimeCategory.WAIT].max() == alone
    limit = alone if share or vcpus == 1 else max(alone, vcpus * count * hold)
    assert limit <= made.clock.max() <= limit + 50 * vcpus


@pytest.mark.slow
@pytest.mark.parametrize("module", [core, PLAIN])
@pytest.mark.parametrize("queue", [0, 1, 2])
def test_split_of_a_gigabyte_takes_up_where_memory_ended(module: Any, queue: int) -> None:
    """An operation that is begun twice passes its time once."""
    walls = {0: [MORE, MORE, MORE], 1: [70, MORE, LAST], 2: [70, 71, 72]}[queue]
    rows = [(pack(Op.TOUCH, level=3), 5, 0, 60, 30, 7, 1, MORE)]
    rows += [
        (pack(op), at, queue, 50, 20, 7, 0, wall)
        for (op, at), wall in zip([(Op.ZAP, 1), (Op.SPLIT, 0), (Op.ZAP, 1)], walls, strict=True)
    ]
    rows += [(pack(Op.TOUCH, level=1), 7, 0, 900, 400, 7, 1, MORE)]
    stream = TimedStream(PRESERVE, [Word(0)], 1, Costs(), timed_of(rows), Ranges([(0, 1 << 18), (1 << 20, 1 << 21)]))
    made, clock = by_engine(stream, module=module), by_reference(stream)
    assert times(clock)[1:] == [made.worker, made.locked, made.shared, made.worked, made.jobs]
    assert made.spent.tolist() == [clock.paces[0].spent]
    assert made.counters == clock.vm.counters
    assert made.counters.tables > 500


def test_each_block_may_have_ranges_of_its_own() -> None:
    """A range zap that waits for the other vCPU goes on to mean the ranges that it came with."""
    touch = pack(Op.TOUCH, level=1)
    first = timed_of([
        (touch, 3, 0, 10, 0, 5, 1, MORE),
        (pack(Op.ZAP), 0, 0, 10, 0, 5, 0, MORE),
        (touch, 3, 0, 10, 0, 5, 1, MORE),
    ])  # fmt: skip
    second = timed_of([
        (pack(Op.ZAP), 1, 0, 10, 0, 5, 0, MORE),
        (touch, 9, 0, 10, 0, 5, 1, MORE),
        (pack(Op.TOUCH, 1, 1), 9, 1, 1000, 0, 5, 1, MORE),
    ])  # fmt: skip
    blocks = [(first, Ranges([(3, 4)])), (second, Ranges([(500, 600), (9, 10)])), (first, Ranges([(0, 1)]))]
    made = TimedEngine(PRESERVE, [Word(0)], 2, Costs())
    clock = Clock(dispatch.begin(PRESERVE, [Word(0)], 2), Costs())
    for number, (block, ranges) in enumerate(blocks):
        made.feed(block, ranges, number * 3)
        clock.feed(block, ranges, number * 3)
    made.finish()
    clock.finish()
    assert_on_time(made, clock)
    assert made.vcpus.faults.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((pack(Op.TOUCH, level=1), 0, 1, 5, 5, 0, 0, MORE), "operation 7 of vCPU 0: queue 1 of 5"),
        ((pack(Op.TOUCH, 1, 1), 0, 2, 5, 5, 0, 0, 0), "queue 2 of 5"),
        ((pack(Op.ENTER), 0, 4, 5, 5, 0, 0, 0), "queue 4 of 5"),
        ((pack(Op.INVALIDATE), 0, 5, 5, 5, 0, 0, 0), "queue 5 of 5"),
        ((pack(Op.INVALIDATE), 0, -1, 5, 5, 0, 0, 0), "queue -1 of 5"),
        ((pack(Op.ENTER), 0, 0, 5, 6, 0, 0, MORE), "5 ns until it, 6 of them in the guest, 0 halted"),
        ((pack(Op.ENTER), 0, 0, 5, -1, 0, 0, MORE), "-1 of them in the guest"),
        ((pack(Op.ENTER), 0, 0, 5, 5, -3, 0, MORE), "-3 for it"),
        ((pack(Op.ENTER, 2), 0, 0, 5, 5, 0, 0, MORE), "vCPU 2 of a VM that has 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(row: tuple[int, ...], says: str) -> None:
    made = TimedEngine(PRESERVE, [Word(0)], 2, Costs())
    good = [(pack(Op.TOUCH, v, 1), 0, v, 9, 0, 0, 0, MORE) for v in range(2)]
    with pytest.raises(Problem) as caught:
        made.feed(timed_of([*good, row]), Ranges(), 5)  # type: ignore[list-item]
    assert says in str(caught.value)
    made.finish()
    assert made.clock.tolist() == [0, 0]


def test_memory_follows_what_waits_not_the_stream() -> None:
    rows = [(pack(Op.TOUCH, v, 1), page, v, 1000, 0, 5, 1, MORE) for page in range(500) for v in range(2)]
    block = timed_of(rows)
    made = TimedEngine(PRESERVE, [Word(0)], 2, Costs())
    for number in range(50):
        made.feed(block, Ranges(), number * len(block))
    assert len(made._todo) <= 4 * len(block)


@pytest.mark.parametrize("name", POLICIES)
def test_a_worker_and_a_lock_that_loads_wait_for(name: str) -> None:
    """What zaps a root that dies is the policy's, and so is who waits."""
    stream = replace(smi_storm(POLICIES[name], 1_000_000), costs=Costs(job=500))  # the load comes 2 us after the unload
    made, clock = by_engine(stream), by_reference(stream)
    assert_on_time(made, clock)
    assert (made.jobs > 0) == (name == "async")
    assert (made.locked > 0) == (name == "sync")
    assert (made.spent[0, TimeCategory.WAIT] > 0) == (name == "async")


def test_numbers_are_those_of_the_clock() -> None:
    for spent in TimeCategory:
        if spent <= TimeCategory.IDLE:  # the others are of no clock
            assert getattr(PLAIN_TIME, f"ON_{spent.name}") == spent
    assert (PLAIN_TIME.WAS_FOUND, PLAIN_TIME.WAS_CREATED, PLAIN_TIMER.LAST) == (FOUND, columns.CREATED, LAST)
    assert (PLAIN_TURNS.NEVER, PLAIN_TIME.SAMPLE) == (columns.NEVER, clocks.SAMPLE)
    made = TimedEngine(PRESERVE, [Word(0)], 1, Costs())._timer
    assert [getattr(made, field.name) for field in fields(Costs)] == [getattr(Costs(), f.name) for f in fields(Costs)]


def test_structures_are_those_of_the_pools() -> None:
    """The compiled clock reads numpy's memory as C structures."""
    pairs = [
        ("Todo", timing.TODO),
        ("Pace", timing.PACE),
        ("Queue", timing.QUEUE),
        ("Turn", timing.TURN),
        ("Sample", timing.SAMPLED),
        ("Zapped", timing.ZAPPED),
    ]
    for name, dtype in pairs:
        assert members(name) == list(dtype.names or ()), name
    assert timing.TODO.itemsize == 72
    assert timing.PACE["spent"].shape == (len(TimeCategory),)
    assert np.dtype(np.int64).itemsize * (8 + len(TimeCategory)) == timing.PACE.itemsize
