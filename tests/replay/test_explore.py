# SPDX-License-Identifier: Apache-2.0
"""The search through interleavings: known races with lengths known by hand, and what a scenario must not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replay.explore import Model, Mutex, Rcu, RwLock, Steps, Thing, free, freed, require, until
from replay.explore.ready_model import ReadyModel
from replay.explore.scenario import HOLDS, VIOLATION, Scenario, Variant, run
from replay.explore.schedule import replay
from replay.explore.search import Exploration, explore
from traces.errors import Problem

Build = Callable[[Model], None]


def searched(build: Build, **settings: bool) -> Exploration:
    model = Model()
    build(model)
    return explore(model, **settings)  # type: ignore[arg-type]


def broken(build: Build) -> tuple[str, int]:
    """The invariant and the number of steps to it, the same with and without reduction, and when run again."""
    found = searched(build).found
    assert found is not None
    plain = searched(build, reduced=False).found
    assert plain is not None
    assert (plain.path, plain.cycle) == (found.path, found.cycle)
    scenario = Scenario("s", "", (Variant("v", VIOLATION),), lambda model, *_: build(model))
    made = run(scenario, "v", {})
    assert made.schedule is not None
    assert made.exploration.shortest
    model = scenario.model("v", {})
    again = replay(ReadyModel(model), made.schedule, "here")
    assert again is not None
    assert again.invariant == found.violation.invariant
    return found.violation.invariant, len(found.path)


def holds(build: Build) -> int:
    """That nothing is broken, with and without reduction; the states with it."""
    plain, reduced = searched(build, reduced=False), searched(build)
    assert plain.found is None
    assert reduced.found is None
    assert reduced.states <= plain.states
    return reduced.states


def adding(count: int, lock: bool = False, atomic: bool = False) -> Build:
    def build(model: Model) -> None:
        counter = model.thing("counter", value=0)
        mutex = Mutex(model, "mutex")

        def add() -> Steps:
            if lock:
                yield from mutex.lock()
            yield "reads"
            seen = counter.value
            if not atomic:
                yield "writes"
            counter.value = seen + 1
            if lock:
                mutex.unlock()

        for n in range(count):
            model.actor(f"adder{n}", add)
        model.at_end("nothing is lost", lambda: counter.value == count)

    return build


@pytest.mark.parametrize("count", [2, 3, 4])
def test_lost_update(count: int) -> None:
    assert broken(adding(count)) == ("nothing is lost", 2 * count)
    holds(adding(count, lock=True))
    holds(adding(count, atomic=True))


def test_states_of_two_adders_by_hand() -> None:
    assert searched(adding(2, atomic=True), reduced=False).states == 4
    # Steps taken by each: none; one of them 1; 1 and 1, 2 and 0, 0 and 2; 2 and 1 or 1 and 2, where the other has read
    # 0 or 1; both 2, with 1 or 2 in the counter.
    assert searched(adding(2), reduced=False).states == 1 + 2 + 3 + 4 + 2


def test_deadlock_of_two_locks() -> None:
    def build(model: Model) -> None:
        first, second = Mutex(model, "first"), Mutex(model, "second")

        def take(one: Mutex, other: Mutex) -> Steps:
            yield from one.lock()
            yield from other.lock()
            one.unlock()
            other.unlock()

        model.actor("a", take, first, second)
        model.actor("b", take, second, first)

    assert broken(build) == ("no deadlock", 2)
    found = searched(build).found
    assert found is not None
    assert found.violation.detail == "waiting for ever: a: locks second; b: locks first"


def test_aba() -> None:
    def build(model: Model) -> None:
        nodes = tuple(model.thing(name, next=None, taken=False) for name in "ab")
        nodes[0].next = nodes[1]
        top = model.thing("top", node=nodes[0])

        def pop() -> Steps:
            yield "reads top"
            node = top.node
            if node is None:
                return
            yield "reads its next"
            following = node.next
            yield "compares and exchanges top"
            if top.node is node:
                top.node = following

        def others() -> Steps:
            yield "pops a"
            if top.node is not nodes[0]:
                return
            top.node = nodes[1]
            yield "pops b, keeps it"
            if top.node is not nodes[1]:
                return  # it was popped by the other
            top.node = None
            nodes[1].taken = True
            yield "pushes a again"
            nodes[0].next, top.node = top.node, nodes[0]

        model.actor("pop", pop)
        model.actor("others", others)
        model.always("top is not what another has taken", lambda: top.node is None or not top.node.taken)

    # Read top and next, the three steps of the other, compare and exchange.
    assert broken(build) == ("top is not what another has taken", 6)


def test_use_after_free_and_what_rcu_does_about_it() -> None:
    def building(in_rcu: bool) -> Build:
        def build(model: Model) -> None:
            item = model.thing("item", "item", value=1)
            shelf = model.thing("shelf", item=item)
            rcu = Rcu(model)

            def read() -> Steps:
                yield "looks"
                if in_rcu:
                    rcu.read_lock()
                found = shelf.item
                if found is not None:
                    yield "uses"
                    require(found.value == 1, "the item is as it was")
                if in_rcu:
                    rcu.read_unlock()

            def remove() -> Steps:
                yield "removes"
                shelf.item = None
                yield "call_rcu()"
                rcu.call_free(item)
                yield rcu.barrier()
                require(freed(item), "the barrier waits until it is freed")

            for n in range(2):
                model.actor(f"reader{n}", read)
            model.actor("remover", remove)

        return build

    assert broken(building(False)) == ("no access to a freed item", 4)
    assert holds(building(True)) > 10


def test_free_twice() -> None:
    def build(model: Model) -> None:
        item = model.thing("item", "item", value=1)

        def drop() -> Steps:
            yield "frees"
            free(item)

        model.actor("a", drop)
        model.actor("b", drop)

    assert broken(build) == ("no item is freed twice", 2)


def spinning(ends: bool) -> Build:
    def build(model: Model) -> None:
        flag = model.thing("flag", up=False)

        def wait() -> Steps:
            while True:
                yield "looks"
                if flag.up:
                    return

        def raise_it() -> Steps:
            yield "thinks"
            yield "raises the flag" if ends else "forgets the flag"
            flag.up = ends

        model.actor("waiter", wait)
        model.actor("raiser", raise_it)

    return build


def test_a_retry_that_can_end_is_no_livelock() -> None:
    holds(spinning(True))
    assert broken(spinning(False))[0] == "no livelock"
    found = searched(spinning(False)).found
    assert found is not None
    assert len(found.cycle) == 1
    assert "waiter goes round" in found.violation.detail


def test_a_livelock_of_two() -> None:
    def build(model: Model) -> None:
        ball = model.thing("ball", at=0)

        def play(me: int) -> Steps:
            while True:
                yield until("throws it back", lambda: ball.at == me)
                ball.at = 1 - me

        for n in range(2):
            model.actor(f"player{n}", play, n)

    found = searched(build).found
    assert found is not None
    assert found.violation.invariant == "no livelock"
    assert sorted(found.cycle) == [0, 1]
    broken(build)


def test_daemons_need_not_end() -> None:
    def building(daemon: bool) -> Build:
        def build(model: Model) -> None:
            queue = model.thing("queue", items=0, done=0)

            def work() -> Steps:
                while True:
                    yield until("takes", lambda: queue.items)
                    queue.items -= 1
                    queue.done += 1

            def order() -> Steps:
                yield "orders"
                queue.items += 1

            model.actor("worker", work, daemon=daemon)
            model.actor("client", order)
            model.at_end("the work is done", lambda: queue.done == 1)

        return build

    holds(building(True))
    assert broken(building(False)) == ("no deadlock", 2)


def test_many_readers_or_one_writer() -> None:
    def build(model: Model) -> None:
        lock = RwLock(model, "lock")
        inside = model.thing("inside", readers=0, writers=0, most=0)

        def read() -> Steps:
            yield from lock.read()
            inside.readers += 1
            inside.most = max(inside.most, inside.readers)
            yield "leaves"
            inside.readers -= 1
            lock.read_unlock()

        def write() -> Steps:
            yield from lock.write()
            inside.writers += 1
            yield "leaves"
            inside.writers -= 1
            lock.write_unlock()

        for n in range(2):
            model.actor(f"reader{n}", read)
            model.actor(f"writer{n}", write)
        model.always("a writer is alone", lambda: inside.writers + (inside.readers > 0) <= 1)
        model.at_end("readers never meet", lambda: inside.most == 1)

    assert broken(build)[0] == "readers never meet"  # the shortest of what is broken; a writer is always alone


def test_actors_that_share_nothing_are_not_interleaved() -> None:
    def build(model: Model) -> None:
        def count(own: Thing) -> Steps:
            for n in range(10):
                yield f"counts {n}"
                own.value += 1

        for n in range(4):
            model.actor(f"counter{n}", count, model.thing(f"own{n}", value=0))

    assert searched(build, reduced=False).states == 11**4
    assert holds(build) == 41


def test_a_for_loop_is_remembered() -> None:
    """Its position is on no variable: two places with the same variables are still two."""

    def build(model: Model) -> None:
        counter = model.thing("counter", value=0)

        def count() -> Steps:
            for _same in (1, 1, 1):
                yield "counts"
                counter.value = 1

        model.actor("a", count)
        model.at_end("it ends", lambda: counter.value == 1)

    assert searched(build, reduced=False).states == 4


def test_the_shortest_is_not_promised_beyond_the_limit() -> None:
    def build(model: Model) -> None:
        end = model.thing("end", value=0)

        def count(own: Thing) -> Steps:
            for n in range(6):
                yield f"counts {n}"
                own.value += 1

        def fail() -> Steps:
            for n in range(6):
                yield f"{n}"
            yield "fails"
            require(end.value, "the end has come")

        for n in range(4):
            model.actor(f"counter{n}", count, model.thing(f"own{n}", value=0))
        model.actor("failing", fail)

    model = Model()
    build(model)
    limited = explore(model, limit=200)
    assert limited.found is not None
    assert not limited.shortest
    assert searched(build).shortest


def test_too_many_states() -> None:
    model = Model()
    adding(4, lock=True)(model)
    with pytest.raises(Problem, match="more than 10 states"):
        explore(model, limit=10)


def actor_of(steps: Callable[[Model, Thing], Steps]) -> Build:
    def build(model: Model) -> None:
        thing = model.thing("thing", value=0)
        model.actor("a", steps, model, thing)
        model.actor("b", steps, model, thing)

    return build


def keeps_a_list(model: Model, thing: Thing) -> Steps:
    kept = [1]
    yield "appends"
    kept.append(2)
    yield "ends"


def reads_too_soon(model: Model, thing: Thing) -> Steps:
    seen = thing.value
    yield f"saw {seen}"


def writes_a_list(model: Model, thing: Thing) -> Steps:
    yield "writes"
    thing.value = [1]


def misspells(model: Model, thing: Thing) -> Steps:
    yield "writes"
    thing.valeu = 1


def divides(model: Model, thing: Thing) -> Steps:
    yield "divides"
    thing.value = 1 // thing.value


def yields_a_number(model: Model, thing: Thing) -> Steps:
    yield "goes on"
    yield 7  # type: ignore[misc]


def frees_what_cannot_be(model: Model, thing: Thing) -> Steps:
    yield "frees"
    free(thing)


def remembers_elsewhere() -> Callable[[Model, Thing], Steps]:
    calls = iter(range(1000))

    def steps(model: Model, thing: Thing) -> Steps:
        yield "counts"
        thing.value += next(calls)
        yield "counts again"
        thing.value += 1

    return steps


def draws() -> Callable[[Model, Thing], Steps]:
    class Draw:
        number = 0

    def steps(model: Model, thing: Thing) -> Steps:
        yield "draws"
        thing.value += 1
        Draw.number += 1
        yield f"has drawn {Draw.number}"
        thing.value += 1

    return steps


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (keeps_a_list, r"actor a, before 'appends': keeps a list \(kept\) across a yield"),
        (reads_too_soon, "a: reads thing.value where it did not before; actors may touch shared memory only after"),
        (writes_a_list, "thing.value is given a list; fields hold what cannot change"),
        (misspells, "actor a, 'writes': AttributeError: thing has no field valeu"),
        (divides, "actor a, 'divides': ZeroDivisionError"),
        (yields_a_number, "actor a, after 'goes on': yields 7, which is neither"),
        (frees_what_cannot_be, "thing was made without a kind"),
        (remembers_elsewhere(), "does another thing on the same memory|keeps a"),
        (draws(), "does another thing on the same memory"),
        (lambda model, thing: None, "actor a: its function is no generator"),
    ],
)
def test_what_actors_must_not_do(steps: Callable[[Model, Thing], Steps], said: str) -> None:
    with pytest.raises(Problem, match=said) as problem:
        searched(actor_of(steps))
    assert "\n" not in str(problem.value)


def test_what_scenarios_must_not_be() -> None:
    for build, said in (
        (lambda model: None, "no actors"),
        (lambda model: 1 / 0, "does not build: ZeroDivisionError"),
        (lambda model: [model.actor("a", keeps_a_list, model, None) for _ in "12"], "two actors of one name|keeps"),
    ):
        scenario = Scenario("s", "", (Variant("v", HOLDS),), lambda model, *_, build=build: build(model))
        with pytest.raises(Problem, match=said):
            run(scenario, "v", {})
    with pytest.raises(Problem, match="has no variants"):
        Scenario("s", "", (), lambda *_: None)
    with pytest.raises(Problem, match="expects 'fails'"):
        Scenario("s", "", (Variant("v", "fails"),), lambda *_: None)


def test_an_invariant_that_raises() -> None:
    def build(model: Model) -> None:
        adding(2)(model)
        model.always("nonsense", lambda: 1 / 0)

    with pytest.raises(Problem, match="invariant 'nonsense': ZeroDivisionError"):
        searched(build)


def test_the_documented_example_is_the_one_in_the_document() -> None:
    root = Path(__file__).parents[2]
    example = (root / "replay/examples/last_reference.py").read_text()
    assert example[example.index("def build") :].strip() in (root / "docs/explore.md").read_text()
