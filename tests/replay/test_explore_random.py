# SPDX-License-Identifier: Apache-2.0
"""Random small programs: the search, with and without reduction, against enumeration by other means."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from replay.explore import Model, Steps, Thing, require, until
from replay.explore.ready_model import NO_DEADLOCK, ReadyModel
from replay.explore.search import LIMIT, NO_LIVELOCK, _Search, explore
from tests.profiles import examples

FAILS, NEVER, AT_END = "a value that fails", "a pair that never is", "a value at the end"


class Op(NamedTuple):
    """load: the register; store: it and a number; spin: step until equal; await: wait until equal; swap: if equal."""

    kind: str
    word: int
    number: int


Program = tuple[Op, ...]


class Case(NamedTuple):
    programs: tuple[Program, ...]
    never: tuple[int, int]
    at_end: int


ops = st.builds(
    Op,
    st.sampled_from(["load", "load", "store", "store", "store", "spin", "await", "swap", "fails", "think"]),
    st.integers(0, 2),
    st.integers(0, 2),
)
cases = st.builds(
    Case,
    st.lists(st.lists(ops, min_size=1, max_size=4).map(tuple), min_size=2, max_size=3).map(tuple),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 5),
)


def model(case: Case) -> Model:
    made = Model()
    words = tuple(made.thing(f"w{n}", value=0) for n in range(3))
    for n, program in enumerate(case.programs):
        made.actor(f"a{n}", actor, words, program)
    made.always(NEVER, lambda: (words[0].value, words[1].value) != case.never)
    made.at_end(AT_END, lambda: words[2].value != case.at_end)
    return made


def actor(words: tuple[Thing, ...], program: Program) -> Steps:
    register = 0
    for kind, at, number in program:
        word = words[at]
        if kind == "await":
            yield until("waits", lambda word=word, number=number: word.value == number)
            continue
        while True:
            yield kind
            if kind != "spin" or word.value == number:
                break
        if kind == "load":
            register = word.value
        elif kind == "store":
            word.value = (register + number) % 3
        elif kind == "swap" and word.value == number:
            word.value = register
        elif kind == "fails":
            require(word.value != number, FAILS)


State = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]  # words; each actor's next operation and register


def stepped(state: State, case: Case, n: int) -> State | str | None:
    """The state after a step of actor n; what it breaks; or None if it cannot step."""
    words, actors = state
    at, register = actors[n]
    if at == len(case.programs[n]):
        return None
    kind, word, number = case.programs[n][at]
    values, following = list(words), at + 1
    if kind == "await" and words[word] != number:
        return None
    if kind == "load":
        register = words[word]
    elif kind == "store":
        values[word] = (register + number) % 3
    elif kind == "spin" and words[word] != number:
        following = at
    elif kind == "swap" and words[word] == number:
        values[word] = register
    elif kind == "fails" and words[word] == number:
        return FAILS
    if following == len(case.programs[n]):
        register = 0  # who has ended remembers nothing
    return tuple(values), (*actors[:n], (following, register), *actors[n + 1 :])


def enumerated(case: Case) -> tuple[int | None, set[str], bool, int]:
    """Fewest steps to what is broken, what is broken at that length, whether there is a livelock, and the states."""
    first: State = ((0, 0, 0), tuple((0, 0) for _ in case.programs))
    if first[0][:2] == case.never:
        return 0, {NEVER}, False, 1
    depth = {first: 0}
    todo: list[State] = [first]
    before: dict[State, list[State]] = {first: []}
    failures: list[tuple[int, str]] = []
    ends = []
    for state in todo:  # grows
        results = [stepped(state, case, n) for n in range(len(case.programs))]
        if all(at == len(case.programs[n]) for n, (at, _) in enumerate(state[1])):
            ends.append(state)
            if state[0][2] == case.at_end:
                failures.append((depth[state], AT_END))
        elif not any(results):
            failures.append((depth[state], NO_DEADLOCK))
        for result in results:
            if isinstance(result, str):
                failures.append((depth[state] + 1, result))
            elif result is not None:
                if result[0][:2] == case.never:
                    failures.append((depth[state] + 1, NEVER))
                if result not in depth:
                    depth[result] = depth[state] + 1
                    before[result] = []
                    todo.append(result)
                before[result].append(state)
    live = set(ends)
    while ends:
        for state in before[ends.pop()]:
            if state not in live:
                live.add(state)
                ends.append(state)
    shortest = min((length for length, _ in failures), default=None)
    return shortest, {what for length, what in failures if length == shortest}, len(live) < len(depth), len(depth)


@examples(400)
@given(cases)
def test_as_enumerated(case: Case) -> None:
    shortest, names, livelock, states = enumerated(case)
    for reduced in (False, True):
        exploration = explore(model(case), reduced=reduced)
        found = exploration.found
        if shortest is not None:
            assert found is not None
            assert (len(found.path), found.violation.invariant in names) == (shortest, True), (reduced, found)
        elif livelock:
            assert found is not None
            assert found.violation.invariant == NO_LIVELOCK
            assert found.cycle
        else:
            assert found is None
            assert exploration.states <= states
    alone = _Search(ReadyModel(model(case)), LIMIT, True).run().found  # what reduction by itself says
    assert (alone is not None) == (shortest is not None or livelock)


@examples(100)
@given(cases)
def test_the_states_are_those_enumerated(case: Case) -> None:
    """Where nothing is broken, each state of the enumeration is one of the search, and none else."""
    shortest, _, livelock, states = enumerated(case)
    if shortest is None and not livelock:
        assert explore(model(case), reduced=False).states == states
