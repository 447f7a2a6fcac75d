# SPDX-License-Identifier: Apache-2.0
"""A lookup against the last put: why what is found on a list is taken with refcount_inc_not_zero().

    kvmtrace explore replay/examples/last_reference.py

An example of a scenario of one's own; docs/explore.md goes through it.
"""

from replay.explore import HOLDS, VIOLATION, Bounds, Model, Rcu, Scenario, Steps, Variant


def build(model: Model, variant: str, bounds: Bounds) -> None:
    root = model.thing("root", "root", refs=1)  # with a kind: can be freed
    roots = model.thing("roots", first=root)
    rcu = Rcu(model)

    def put() -> Steps:
        yield "puts its reference"
        root.refs -= 1
        if root.refs == 0:
            yield "takes the root off the list"
            roots.first = None
            yield "call_rcu(root)"
            rcu.call_free(root)

    def look_up() -> Steps:
        yield "rcu_read_lock(), looks at the list"
        rcu.read_lock()
        found = roots.first
        if found is not None:
            yield "takes a reference"
            if variant == "inc" or found.refs > 0:
                found.refs += 1
            else:
                found = None
        yield "rcu_read_unlock()"
        rcu.read_unlock()
        if found is not None:
            yield from put()

    model.actor("owner", put)
    for n in range(bounds["lookups"]):
        model.actor(f"lookup{n}", look_up)
    model.at_end("the root is off the list", lambda: roots.first is None)


SCENARIO = Scenario(
    name="last-reference",
    title="A lookup against the last put",
    variants=(
        Variant("inc", VIOLATION, "a plain increment brings a dead root back"),
        Variant("inc-not-zero", HOLDS, "a root without references is not taken"),
    ),
    build=build,
    bounds={"lookups": 2},
)
