# SPDX-License-Identifier: Apache-2.0
"""Differences between two recordings: those that make times not comparable, and those that a reader must know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from analysis.reading.sources import Recording
from analysis.report_model.trust import left_out
from traces.untrusted import object_at

_PARAMETERS_SHOWN: Final = 4


def unlike(base: Recording | None, new: Recording | None) -> Iterator[str]:
    """Yield differences between the machines, each of which makes times not comparable."""
    if base is None or new is None:
        which = " and ".join(name for name, side in (("base", base), ("new", new)) if side is None)
        yield f"the machine of the {which} is not known: the recording is not at hand"
        return
    for name, title in (("vendor", "CPUs"), ("model", "CPUs"), ("cpus", "number of CPUs"), ("machine", "machines")):
        mine, theirs = (object_at(side.metadata.raw, "host").get(name) for side in (base, new))
        if mine != theirs:
            yield f"other {title}: {mine or 'unknown'} against {theirs or 'unknown'}"
            if name == "vendor":
                return
    kinds = [_kind(side) for side in (base, new)]
    if kinds[0] != kinds[1]:
        yield f"{kinds[0]} against {kinds[1]}"


def changed(base: Recording | None, new: Recording | None) -> Iterator[tuple[str, str]]:
    """Yield differences that may be what is compared: kernel, policy, module parameters, kinds watched, losses."""
    if base is None or new is None:
        return
    one, two = base.metadata, new.metadata
    builds = [str(object_at(meta.raw, "host").get("build", "")) for meta in (one, two)]
    if one.kernel != two.kernel or builds[0] != builds[1]:
        yield "kernel", f"{one.kernel or 'unknown'} {builds[0]} against {two.kernel or 'unknown'} {builds[1]}"
    if one.policy != two.policy:
        yield "policy", f"{one.policy or 'unknown'} against {two.policy or 'unknown'}"
    parameters = list(_parameters(object_at(one.raw, "modules"), object_at(two.raw, "modules")))
    if parameters:
        more = len(parameters) - _PARAMETERS_SHOWN
        yield "modules", ", ".join(parameters[:_PARAMETERS_SHOWN]) + (f", and {more} more" if more > 0 else "")
    if base.kinds != new.kinds:
        yield (
            "watched",
            f"{len(base.kinds)} kinds against {len(new.kinds)}: {', '.join(sorted(base.kinds ^ new.kinds))}",
        )
    for name, meta in (("base", one), ("new", two)):
        if meta.lost or not meta.complete:
            yield "lost", f"{meta.lost:,} events of the {name}{'' if meta.complete else ', which is not complete'}"
        if said := left_out(meta):
            yield "left out", f"of the {name}, {said}"


def _parameters(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    for module in sorted({*one, *two}):
        mine, theirs = object_at(one, module), object_at(two, module)
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                yield f"{module}.{name} {mine.get(name, 'not there')} against {theirs.get(name, 'not there')}"


def _kind(recording: Recording) -> str:
    raw = recording.metadata.raw
    if raw.get("origin") == "synthetic":
        return "a synthetic trace"
    if raw.get("origin") == "imported":
        return "an imported trace"
    return "the lab's emulation" if raw.get("lab") else "a host"
