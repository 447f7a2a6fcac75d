# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several verbs have: one type each, so that they say the same in every help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, cast, get_type_hints

import typer

if TYPE_CHECKING:
    from traces.selection import Selection

Verb = TypeVar("Verb", bound=Callable[..., None])
Recording = Annotated[Path, typer.Argument(help="A recording.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (with its schema version) instead of text.")]
TextFile = Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file, not to stdout.")]
Force = Annotated[
    bool, typer.Option("--force", help="Let -o replace a file of another kind; never an input or a recording.")
]
Modules = Annotated[Path | None, typer.Option(help="Modules of a kernel given by path (a tree or flat).")]
RecordedPolicy = Annotated[
    str,
    typer.Option(
        help="The root policy that the recorded kernel had, whatever its types and rows say: sync, async, "
        "preserve-worker, preserve or shadow.",
        show_default=False,
    ),
]
# Options for a part of a recording. Several verbs have them, each those that make sense for it.
_PARTS: Final[dict[str, tuple[Any, Any]]] = {
    "vm": (
        Annotated[
            list[int] | None, typer.Option("--vm", help="Only this VM, by its id in the trace; repeatable.", min=1)
        ],
        None,
    ),
    "vcpu": (
        Annotated[list[int] | None, typer.Option("--vcpu", help="Only this vCPU of each VM; repeatable.", min=0)],
        None,
    ),
    "since": (
        Annotated[
            str,
            typer.Option(
                "--from",
                help="Count from then on: a time since the first row, such as 1.5s, or a wall-clock time in UTC.",
                show_default=False,
            ),
        ],
        "",
    ),
    "until": (
        Annotated[
            str,
            typer.Option(
                "--to",
                help="Count up to then: a time since the first row, such as 1.5s, or a wall-clock time in UTC.",
                show_default=False,
            ),
        ],
        "",
    ),
}


@dataclass(frozen=True)
class OptionGroup:
    """Options that make up one argument of a verb: types and defaults, and the function that makes the argument."""

    options: Mapping[str, tuple[Any, Any]]
    make: Callable[..., object]


def part_of(*names: str) -> OptionGroup:
    """Return a group of these of the options `vm`, `vcpu`, `since` and `until`, which make a Selection."""
    return OptionGroup({name: _PARTS[name] for name in names}, _selection)


def taking(**groups: OptionGroup) -> Callable[[Verb], Verb]:
    """Return a decorator for a verb whose arguments of these names are made of groups of options.

    typer reads a verb's options off its signature: there the options of a group take the place of their argument.
    """

    def decorate(verb: Verb) -> Verb:
        # The types of these arguments are of modules that nothing needs before the verb runs.
        others = {name: each for name, each in verb.__annotations__.items() if name not in groups}
        types = get_type_hints(SimpleNamespace(__annotations__=others), verb.__globals__, include_extras=True)
        found: list[Parameter] = []
        for each in signature(verb).parameters.values():
            options = groups[each.name].options if each.name in groups else {}
            found += [Parameter(name, each.kind, default=d, annotation=t) for name, (t, d) in options.items()]
            found += [each.replace(annotation=types[each.name])] if not options else []

        def called(**given: Any) -> None:
            made = {
                name: group.make(**{option: given.pop(option) for option in group.options})
                for name, group in groups.items()
            }
            verb(**made, **given)

        called.__name__, called.__doc__, called.__module__ = verb.__name__, verb.__doc__, verb.__module__
        called.__signature__ = Signature(found)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in found}
        return cast("Verb", called)

    return decorate


def _selection(
    vm: Sequence[int] | None = None, vcpu: Sequence[int] | None = None, since: str = "", until: str = ""
) -> Selection:
    from traces.selection import Selection

    return Selection(tuple(vm or ()), tuple(vcpu or ()), since, until)
