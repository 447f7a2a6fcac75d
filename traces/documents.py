"""Documents for machines: what `--json` prints of any verb."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

SCHEMA = 1

Force = Annotated[
    bool, typer.Option("--force", help="Let -o replace a file of another kind; never an input or a recording.")
]
RecordedPolicy = Annotated[
    str,
    typer.Option(
        help="The root policy that the recorded kernel had, whatever its types and rows say: sync, async, "
        "preserve-worker, preserve or shadow.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (with its schema version) instead of text.")]
Vms = Annotated[list[int] | None, typer.Option("--vm", help="Only this VM, by its id in the trace; repeatable.", min=1)]
Vcpus = Annotated[list[int] | None, typer.Option("--vcpu", help="Only this vCPU of each VM; repeatable.", min=0)]
Since = Annotated[
    str,
    typer.Option(
        "--from", help="Count from then on: a time since the first row, such as 1.5s, or a wall-clock time in UTC.",
        show_default=False,
    ),
]  # fmt: skip
Until = Annotated[str, typer.Option("--to", help="Count up to then; as --from.", show_default=False)]


def print_json(document: dict[str, Any], schema: int = SCHEMA) -> None:
    """Print a document with its schema version first: `schema` where a verb's document has left version 1."""
    print(json.dumps({"schema": schema, **document}, indent=2))
