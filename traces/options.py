"""Options and arguments that several verbs have: one type each, so that they say the same in every help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from traces.selection import Selection

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
Vms = Annotated[list[int] | None, typer.Option("--vm", help="Only this VM, by its id in the trace; repeatable.", min=1)]
Vcpus = Annotated[list[int] | None, typer.Option("--vcpu", help="Only this vCPU of each VM; repeatable.", min=0)]
Since = Annotated[
    str,
    typer.Option(
        "--from", help="Count from then on: a time since the first row, such as 1.5s, or a wall-clock time in UTC.",
        show_default=False,
    ),
]  # fmt: skip
Until = Annotated[
    str,
    typer.Option(
        "--to", help="Count up to then: a time since the first row, such as 1.5s, or a wall-clock time in UTC.",
        show_default=False,
    ),
]  # fmt: skip


def selection(
    vm: Sequence[int] | None, vcpu: Sequence[int] | None = None, since: str = "", until: str = ""
) -> Selection:
    """What `--vm`, `--vcpu`, `--from` and `--to` select."""
    from traces.selection import Selection

    return Selection(tuple(vm or ()), tuple(vcpu or ()), since, until)
