# SPDX-License-Identifier: Apache-2.0
"""The verbs on a fleet's results: `kvmtrace fleet report` and `diff`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from traces import outputs
from traces.command_line.help_text import examples
from traces.errors import VERDICT_FAILED, Problem
from traces.options import Force, TextFile

app = typer.Typer()

_RESULTS = "What `kvmtrace fleet replay -o` made: a folder, or a place in a store."
By = Annotated[
    str,
    typer.Option(
        help="Compare groups by these: some of host, kernel, vendor, preset, recorded_policy, own_policy, day, "
        "with commas between."
    ),
]
_FORMATS = ("text", "md", "html", "json")


@app.command(
    short_help="Report on a fleet: who hangs, who would gain, and by how much.",
    epilog=examples(
        "kvmtrace fleet report results/",
        "kvmtrace fleet report results/ --by kernel,vendor",
        "kvmtrace fleet report results/ --format html -o fleet.html",
        "kvmtrace fleet report results/ --fail-on 'soft_hang > 0' \\\n  --fail-on 'failed > 0'",
    ),
)
def report(
    results: Annotated[str, typer.Argument(help=_RESULTS)],
    by: By = "kernel,vendor",
    format_: Annotated[
        str, typer.Option("--format", help="text, md, html or json. [default: text]", show_default=False)
    ] = "text",
    out: TextFile = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit 1 where this holds: FIGURE OPERATOR NUMBER, such as 'soft_hang > 0'; repeatable. Figures: "
            "soft_hang (VMs with one as recorded), failed (tasks), own_policy_mismatch, undecided, lost (events), "
            "out_of_line (hosts), vms, hosts. A condition that an interval does not decide fails."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Report on a fleet's results: soft-hangs as recorded, what other policies would change, hosts out of line."""
    from dataclasses import replace

    from analysis.fleet import fleet_gates
    from analysis.fleet.fleet_report import best_policy, fleet_report
    from analysis.fleet.fleet_tables import every_host
    from analysis.fleet.judged import COLUMNS, dimensions
    from analysis.fleet.outcome import outcome
    from analysis.formats import renderer
    from replay.fleet.results import open_results
    from traces.command_line.progress import Progress

    if format_ not in _FORMATS:
        raise Problem(f"--format {format_}: give {', '.join(_FORMATS)}")
    render = renderer(format_)
    _check(out, format_, [results], force)
    gates = tuple(map(fleet_gates.parse, fail_on or ()))
    with Progress("reading") as progress:
        found = outcome(open_results(results).batches(COLUMNS), dimensions(by), results)
        one = fleet_report(found, results, gates)
        progress.say(f"writing {format_}")
        if format_ == "html":
            from analysis.fleet.fleet_charts import pictures

            best = best_policy(found)
            one = replace(one, drawn=pictures(found, best), listed=every_host(found, best))
        text = render(one)
    _write(text, out, format_, [results], force)
    if one.failed:
        if out or format_ == "json":
            print(f"kvmtrace: {one.title}: {one.headline}", file=sys.stderr)
        raise typer.Exit(VERDICT_FAILED)


@app.command(
    short_help="Compare two sets of a fleet's results.",
    epilog=examples(
        "kvmtrace fleet diff last-week/ this-week/",
        "kvmtrace fleet diff last-week/ this-week/ --by kernel,vendor",
        "kvmtrace fleet diff old/ new/ --format json -o diff.json",
    ),
)
def diff(
    old: Annotated[str, typer.Argument(help=_RESULTS)],
    new: Annotated[str, typer.Argument(help="The one to compare with the first.")],
    by: By = "kernel",
    format_: Annotated[
        str, typer.Option("--format", help="text, md or json. [default: text]", show_default=False)
    ] = "text",
    out: TextFile = None,
    force: Force = False,
) -> None:
    """Compare two sets of results: by kernel and host, VMs whose results differ, and VMs that only one has."""
    from analysis.fleet.fleet_diff import compare, side
    from analysis.fleet.judged import COLUMNS, dimensions
    from analysis.formats import renderer
    from replay.fleet.results import open_results
    from traces.command_line.progress import Progress

    if format_ not in ("text", "md", "json"):
        raise Problem(f"--format {format_}: give text, md or json")
    render = renderer(format_)
    _check(out, format_, [old, new], force)
    keys = dimensions(by)
    with Progress("reading") as progress:
        sides = []
        for where in (old, new):
            progress.say(f"reading {where}")
            sides.append(side(open_results(where).batches(COLUMNS), keys, where))
        progress.say("comparing")
        text = render(compare(*sides))
    _write(text, out, format_, [old, new], force)


def _check(out: Path | None, format_: str, results: Sequence[str], force: bool) -> None:
    """Raise Problem where the report must not be written to `out`; inside the results it never may be."""
    from analysis.formats import kind

    if out is None:
        return
    for where in results:
        if "://" not in where and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(where)):
            raise Problem(f"{out}: is in what is read ({where}): choose another name")
    outputs.check(out, kind(format_), [Path(where) for where in results if "://" not in where], force=force)


def _write(text: str, out: Path | None, format_: str, results: Sequence[str], force: bool) -> None:
    from analysis.formats import kind

    if out is None:
        sys.stdout.write(text)
        return
    inputs = [Path(where) for where in results if "://" not in where]
    with outputs.Output(out, kind(format_), inputs, force=force) as output:
        output.write(text.encode(errors="backslashreplace"))
