# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace dump`: ask a running flight recorder for what it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from traces.command_line.documents import print_json
from traces.command_line.help_text import examples
from traces.options import Json

app = typer.Typer()


@app.command(
    short_help="Make a running flight recorder write a dump.",
    epilog=examples(
        "sudo kvmtrace dump /var/lib/kvmtrace", 'sudo kvmtrace dump /var/lib/kvmtrace --reason "web1 did not answer"'
    ),
)
def dump(
    directory: Annotated[Path, typer.Argument(help="Where the recorder keeps its dumps: the -o of record --flight.")],
    reason: Annotated[str, typer.Option(help="The reason for the dump, kept in the trace's metadata.")] = "",
    as_json: Json = False,
) -> None:
    """Make a running flight recorder write the last seconds as a trace, and print its path once it is complete."""
    from tracer.flight.control import ask

    path = ask(directory, reason)
    if as_json:
        print_json({"path": str(path)})
    else:
        print(f"{path}: dumped", file=sys.stderr)
