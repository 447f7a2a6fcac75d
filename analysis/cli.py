# SPDX-License-Identifier: Apache-2.0
"""The verbs of analysis: `kvmtrace report`, `diff` and `export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from traces import outputs
from traces.command_line.help_text import examples
from traces.errors import VERDICT_FAILED, Problem
from traces.options import Force, OptionGroup, RecordedPolicy, TextFile, part_of, taking
from traces.text import printable

if TYPE_CHECKING:
    from analysis.reading.guest_files import GuestFile
    from analysis.reading.symbols import Naming
    from traces.selection import Selection

    PairedSelection: TypeAlias = tuple[Selection, ...]

app = typer.Typer()

_SOURCES = "Traces, or results of `kvmtrace replay -o`."


def _naming(symbols: Path | None, kaslr_offset: str) -> Naming:
    from analysis.reading.symbols import Naming

    try:
        offset = int(kaslr_offset, 16 if kaslr_offset.startswith("0x") else 10) if kaslr_offset else None
    except ValueError:
        raise Problem(f"--kaslr-offset {kaslr_offset}: give a number, such as 0x1a000000") from None
    return Naming(symbols, offset)


_NAMING = OptionGroup(
    {
        "symbols": (
            Annotated[
                Path | None,
                typer.Option(
                    "--symbols", help="Name guest RIPs by this vmlinux, System.map or copy of /proc/kallsyms."
                ),
            ],
            None,
        ),
        "kaslr_offset": (
            Annotated[
                str,
                typer.Option(
                    help="The guest kernel's KASLR offset, such as 0x1a000000. [default: found from HLT exits, "
                    "if there are any]",
                    show_default=False,
                ),
            ],
            "",
        ),
    },
    _naming,
)


def _guest(guest: str, guest_offset: str) -> GuestFile | None:
    from analysis.reading.guest_files import guest_file

    return guest_file(guest, guest_offset)


_GUEST = OptionGroup(
    {
        "guest": (
            Annotated[
                str,
                typer.Option(
                    "--guest",
                    help="What trace-cmd or ftrace recorded inside the guest, with sched_switch: FILE, or VM=FILE.",
                    metavar="[VM=]FILE",
                    show_default=False,
                ),
            ],
            "",
        ),
        "guest_offset": (
            Annotated[
                str,
                typer.Option(
                    help="Seconds to add to the guest's times. [default: trace-cmd's offsets]",
                    metavar="SECONDS",
                    show_default=False,
                ),
            ],
            "",
        ),
    },
    _guest,
)


def _of_both(vm: list[str] | None, vcpu: list[int] | None, until: str) -> PairedSelection:
    from traces.selection import Selection

    sides: tuple[list[int], list[int]] = ([], [])
    for text in vm or ():
        ids = text.split("=")
        if len(ids) > 2 or not all(each.isascii() and each.isdigit() and int(each) for each in ids):
            raise Problem(f"--vm {printable(text)}: give a VM's id in the traces, such as 4, or two, such as 4=2")
        sides[0].append(int(ids[0]))
        sides[1].append(int(ids[-1]))
    for side in sides:
        if len(set(side)) < len(side):
            raise Problem("--vm: a VM can be compared with one other only")
    return tuple(Selection(tuple(side), tuple(vcpu or ()), "", until) for side in sides)


_OF_BOTH = OptionGroup(
    {
        "vm": (
            Annotated[
                list[str] | None,
                typer.Option(
                    "--vm", help="Only this VM, by its id in both; 4=2: VM 4 of the first, 2 of the second; repeatable."
                ),
            ],
            None,
        ),
        **part_of("vcpu", "until").options,
    },
    _of_both,
)


@app.command(
    short_help="Report on recordings and replays: verdict, causes, times.",
    epilog=examples(
        "kvmtrace report stall.parquet",
        "kvmtrace report stall.parquet --format html -o stall.html",
        "kvmtrace report result.parquet --format md -o $GITHUB_STEP_SUMMARY",
        "kvmtrace report stall.parquet --guest guest.dat",
        "kvmtrace report new.parquet --fail-on 'preserve.refaults > 0'",
        "kvmtrace report new.parquet --fail-on 'roots_created > baseline' \\\n  --baseline old.json",
    ),
)
@taking(selected=part_of("vm", "vcpu", "since", "until"), naming=_NAMING, guest=_GUEST)
def report(
    files: Annotated[list[Path], typer.Argument(help=_SOURCES)],
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Replay a trace under this one; repeatable. [default: the recorded one, preserve, async]"),
    ] = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay", help="Replay traces. With --no-replay, only what was recorded is reported."
        ),
    ] = True,
    recorded_policy: RecordedPolicy = "",
    validate: Annotated[
        bool, typer.Option("--validate", help="Compare the recording with the model as well: 100,000 rows a second.")
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", help="text, md, mail, html, json or junit. [default: text]", show_default=False)
    ] = "text",
    out: TextFile = None,
    *,
    selected: Selection,
    naming: Naming,
    guest: GuestFile | None,
    force: Force = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit 1 where this holds: [POLICY.]COLUMN OPERATOR NUMBER, or `baseline` for the number; repeatable. "
            "Without POLICY the recorded one is meant, or each one if none was recorded. A condition that an interval "
            "does not decide fails. Times cannot be gated. `own_policy_mismatch > 0` (the replay under the recording's "
            "own policy differs from its rows) is part of JUnit output even if it is not given, and fails there."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A result, or a report in JSON, that gates are compared with.")
    ] = None,
) -> None:
    """Summarize a recording or a replay: verdict, what it rests on, policies, causes, worst windows, gfns."""
    import os
    from contextlib import ExitStack

    # Queries take rows in batches of a quarter of a million: a second thread of polars would mostly wait, and cost
    # a tenth of the CPU time and 20 MiB. polars reads this when it is imported, which nothing has done yet.
    os.environ.setdefault("POLARS_MAX_THREADS", "1")

    from analysis import gates
    from analysis.formats import drawn, kind, renderer
    from analysis.report_model import figures
    from analysis.reporting import Wanted, exit_code, reported
    from traces.command_line.progress import Progress

    render = renderer(format_)
    inputs = [*files, *map(Path, policy or ()), *([baseline] if baseline else [])]
    if out is not None:
        outputs.check(out, kind(format_), inputs, force=force)
    asked = tuple(map(gates.parse, fail_on or ()))
    if format_ == "junit" and not any(gate.column == figures.OWN_POLICY for gate in asked):
        asked += gates.BY_DEFAULT
    wanted = Wanted(
        policies=tuple(policy or ()),
        recorded_policy=recorded_policy,
        replay=replay,
        validate=validate,
        gates=asked,
        baseline=figures.load_baseline(baseline) if baseline else None,
        drawn=drawn(format_),
        parts=bool(drawn(format_)),
        selection=selected,
        naming=naming,
        guest=guest,
    )
    with ExitStack() as stack:
        with Progress("reading") as progress:
            reports = [stack.enter_context(reported(path, wanted, progress.say)) for path in files]
            progress.say(f"writing {format_}")
            text = render(*reports)
        _write(text, out, kind(format_), inputs, force)
        for one in reports:
            if one.failed and (out or format_ in ("json", "junit")):
                print(f"kvmtrace: {one.title}: {one.headline}", file=sys.stderr)
        if exit_code(reports):
            raise typer.Exit(VERDICT_FAILED)


@app.command(
    short_help="Compare two recordings or results, vCPU by vCPU.",
    epilog=examples(
        "kvmtrace diff before.parquet after.parquet",
        "kvmtrace diff before.parquet after.parquet --format mail",
        "kvmtrace diff result.parquet result.parquet --policy async \\\n  --policy preserve",
        "kvmtrace diff before.parquet after.parquet --vm 4=2 --to 10s",
    ),
)
@taking(selected=_OF_BOTH)
def diff(
    base: Annotated[Path, typer.Argument(help="A trace or a result.")],
    new: Annotated[Path, typer.Argument(help="The one to compare with the first.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare under this policy; given twice: base, then new. [default: the recorded one of each]"
        ),
    ] = None,
    recorded_policy: RecordedPolicy = "",
    unlike: Annotated[
        bool,
        typer.Option(
            "--unlike", help="Compare recordings of different machines, too, and mark their times as not comparable."
        ),
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", help="text, md, mail or json. [default: text]", show_default=False)
    ] = "text",
    out: TextFile = None,
    *,
    selected: PairedSelection,
    force: Force = False,
) -> None:
    """Compare two recordings or results: vCPU by vCPU, what each difference costs, largest cost first."""
    from tempfile import TemporaryDirectory

    from analysis.diff import compare, opened
    from analysis.formats import kind, renderer
    from traces.command_line.progress import Progress

    policies = list(policy or [""])
    if len(policies) > 2:
        raise Problem("diff: give --policy once, or twice: base, then new")
    if format_ == "html":
        raise Problem("diff --format html: a page is of one report: give text, md, mail or json")
    if format_ == "junit":
        raise Problem("diff: there is no gate in it, so that JUnit would always be green: gate with `kvmtrace report`")
    render = renderer(format_)
    if out is not None:
        outputs.check(out, kind(format_), [base, new], force=force)
    remarks = [part.remark for part in selected if part]
    if len(set(remarks)) > 1:
        remarks = [f"of {path} {remark}" for path, remark in zip((base, new), remarks, strict=True)]
    remarks = list(dict.fromkeys(remarks))
    with TemporaryDirectory(prefix="kvmtrace-") as scratch, Progress("reading") as progress:
        sides = [
            opened(
                path,
                policies[min(number, len(policies) - 1)],
                Path(scratch) / f"{number}.parquet",
                remarks,
                recorded_policy,
                part,
            )
            for number, (path, part) in enumerate(zip((base, new), selected, strict=True))
        ]
        progress.say("comparing")
        text = render(compare(*sides, mark=unlike, remarks=remarks))
    _write(text, out, kind(format_), [base, new], force)


@app.command(
    short_help="Write a report's rows, or a recording's time line, for other tools.",
    epilog=examples(
        "kvmtrace export stall.parquet --list",
        "kvmtrace export stall.parquet --csv windows >windows.csv",
        "kvmtrace export result.parquet --csv roots -o roots.csv",
        "kvmtrace export stall.parquet --perfetto -o stall.pftrace",
        "kvmtrace export stall.parquet --ftrace-text -o stall.txt",
        "kvmtrace export stall.parquet --trace-dat -o stall.dat",
    ),
)
@taking(selected=part_of("vm", "vcpu", "since", "until"), naming=_NAMING, guest=_GUEST)
def export(
    file: Annotated[Path, typer.Argument(help="A trace, or a result of `kvmtrace replay -o`.")],
    csv: Annotated[str, typer.Option(help="Mode: write all rows of this query as CSV.", show_default=False)] = "",
    list_: Annotated[bool, typer.Option("--list", help="Mode: list the queries that this file can answer.")] = False,
    perfetto: Annotated[
        bool,
        typer.Option("--perfetto", help="Mode: write what each vCPU did, and when, for ui.perfetto.dev; needs -o."),
    ] = False,
    ftrace_text: Annotated[
        bool, typer.Option("--ftrace-text", help="Write the events as ftrace's trace prints them.")
    ] = False,
    perf_script: Annotated[
        bool, typer.Option("--perf-script", help="Write the events as perf script prints them.")
    ] = False,
    trace_dat: Annotated[
        bool, typer.Option("--trace-dat", help="Write the events as a trace.dat, for trace-cmd; needs -o.")
    ] = False,
    recorded_policy: RecordedPolicy = "",
    out: TextFile = None,
    *,
    selected: Selection,
    naming: Naming,
    guest: GuestFile | None,
    force: Force = False,
) -> None:
    """Write the rows behind a report's tables, or a recording's time line, for other tools."""
    from analysis import exporting

    if bool(csv) + list_ + perfetto + ftrace_text + perf_script + trace_dat != 1:
        raise Problem(
            "export: give one of --csv QUERY, --list, --perfetto, --ftrace-text, --perf-script and --trace-dat"
        )
    if ftrace_text or perf_script or trace_dat:
        if selected.vcpus or selected.since:
            raise Problem("export: all events of a VM from the beginning are written: --vcpu and --from are for --csv")
        if trace_dat and out is None:
            raise Problem("export --trace-dat: say with -o which file to write")
    if trace_dat and out is not None:
        exporting.trace_dat(file, out, selected, force=force)
    elif ftrace_text or perf_script:
        exporting.text(file, out, selected, perf=perf_script, force=force)
    elif perfetto:
        if selected.vcpus or selected.since:
            raise Problem("export --perfetto: --vcpu and --from are for --csv: a course begins with its recording")
        if out is None:
            raise Problem("export --perfetto: say with -o which file to write")
        exporting.perfetto(file, out, selected, guest, force=force, recorded_policy=recorded_policy)
    elif list_:
        _write(exporting.listing(file, recorded_policy), out, outputs.QUERIES, [file], force)
    else:
        exporting.csv(file, csv, out, selected, naming, guest, force=force, recorded_policy=recorded_policy)


def _write(text: str, out: Path | None, kind: outputs.FileKind, inputs: Sequence[Path], force: bool) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    with outputs.Output(out, kind, inputs, force=force) as output:
        output.write(text.encode(errors="backslashreplace"))
