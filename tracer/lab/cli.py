# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace lab`: boot real kernels under emulation and record their own KVM."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from traces.command_line.documents import print_json
from traces.command_line.help_text import examples
from traces.errors import BAD_INPUT, ENVIRONMENT, Problem
from traces.options import Json, Modules
from traces.outputs import RECORDING, check

if TYPE_CHECKING:
    from tracer.lab.matrix import Cell

app = typer.Typer(
    no_args_is_help=True,
    short_help="Boot real kernels under emulation and record their own KVM.",
    help="Boot a real kernel under emulation and record its own KVM: no hardware support, root or network needed.",
)

Jobs = Annotated[int, typer.Option(help="Boots at a time; each keeps one CPU busy.", min=1)]
Cpus = Annotated[
    list[str] | None, typer.Option("--cpu", help="amd or intel; repeatable. [default: amd; both for the corpus]")
]


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _stop_cleanly() -> None:
    """Let SIGTERM unwind as ^C does, so that the guest and temporary files are removed before this process ends."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command(
    "list",
    short_help="List the kernels (known, and which are here) and scenarios.",
    epilog=examples("kvmtrace lab list", "kvmtrace lab list --json"),
)
def list_(as_json: Json = False) -> None:
    """Kernels (known, and which are here) and scenarios."""
    from tracer import vmm
    from tracer.lab.fetch import present
    from tracer.lab.lab_cpus import CPUS
    from tracer.lab.lab_kernels import TABLE_DATE, cached, known
    from tracer.lab.modules import Directory
    from traces.command_line.screen import Page
    from traces.kernels.policies import MEANINGS

    kernels: list[dict[str, Any]] = []
    for kernel in map(known, cached()):
        here = present(kernel.name)
        kernels.append(
            {
                "name": kernel.name,
                "here": here is not None,
                "release": here.release if here else None,
                "package": here.package if here else None,
                "policy": kernel.policy,
                "meaning": MEANINGS[kernel.policy],
                "reason": kernel.reason,
                "parameters": list(kernel.parameters),
                "cpus": [cpu.name for cpu in CPUS.values() if here and cpu.runs(Directory(*here.modules))],
            }
        )
    scenarios: list[dict[str, Any]] | None = None
    lacking = ""
    try:
        scenarios = [one._asdict() for one in vmm.scenarios()]
    except Problem as problem:  # what is known of kernels does not depend on a compiler
        lacking = str(problem)
    if as_json:
        print_json({"table_date": TABLE_DATE, "kernels": kernels, "scenarios": scenarios, "lacking": lacking or None})
        return
    page = Page()
    page.say(f"kernels (root policies as of {TABLE_DATE}):")
    for row in kernels:
        state = row["package"] or row["release"] or f"kvmtrace lab fetch {row['name']}"
        runs_on = f"; runs on {', '.join(row['cpus'])}" if row["cpus"] else ""
        page.facts([(f"  {row['name']:10} {row['policy']}", f"{state}{runs_on}"), ("", row["reason"])], at=23)
    for title, facts in (
        ("CPUs (--cpu)", [(cpu.name, cpu.shows) for cpu in CPUS.values()]),
        ("root policies", list(MEANINGS.items())),
        ("scenarios", [(scenario["name"], scenario["shows"]) for scenario in scenarios or ()]),
    ):
        page.blank()
        page.say(f"{title}:")
        page.facts([(f"  {name}", text) for name, text in facts])
    if lacking:
        page.say(f"  not known: {lacking}")
    print(page.text, end="")


@app.command(
    short_help="Get a kernel, from $KVMTRACE_KERNELS or from Debian.",
    epilog=examples("kvmtrace lab fetch 6.1", "kvmtrace lab fetch 7.x --update"),
)
def fetch(
    kernel: Annotated[str, typer.Argument(help="A kernel's name in `kvmtrace lab list`, or a series: 6.18.")],
    update: Annotated[bool, typer.Option("--update", help="Look for a newer one even if one is here.")] = False,
) -> None:
    """Get a kernel: from $KVMTRACE_KERNELS, else from Debian through this machine's own apt sources."""
    from tracer.lab.fetch import fetch as get

    _stop_cleanly()
    got = get(kernel, _say, update=update)
    print(f"{got.name}: {got.package or got.release} in {got.image.parent}")


@app.command(
    short_help="Boot a kernel, run a guest in it, hand back the trace.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "kvmtrace lab run --kernel 6.1 --scenario smi-storm -o smi-6.1.parquet",
        "kvmtrace lab run --kernel 6.12 --scenario churn --loops 50 -o churn.parquet",
        "kvmtrace lab run --kernel ~/linux/arch/x86/boot/bzImage \\\n"
        "  --modules ~/modules --scenario smi-storm -o mine.parquet",
        "kvmtrace lab run --kernel 6.1 --scenario smi-storm --bare",
        note="Options that are none of these are the scenario's own: --loops, --pages, --vcpus ...",
    ),
)
def run(
    context: typer.Context,
    kernel: Annotated[str, typer.Option("--kernel", help="A name in `kvmtrace lab list`, or the path of a bzImage.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The trace to write (.parquet).")] = None,
    cpu: Annotated[str, typer.Option(help="amd, amd-icount, intel or intel-pml; see `kvmtrace lab list`.")] = "amd",
    scenario: Annotated[str, typer.Option(help="A scenario of the project's own VMM.")] = "",
    workload: Annotated[str, typer.Option(help="A command of this machine's to run in the guest instead.")] = "",
    modules: Modules = None,
    kvm_modules: Annotated[Path | None, typer.Option(help="Other kvm.ko and kvm-amd.ko or kvm-intel.ko.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="A module parameter, such as kvm.tdp_mmu=0.")] = None,
    events: Annotated[str, typer.Option(help="What to record, as `kvmtrace record --events`.")] = "mmu",
    bare: Annotated[bool, typer.Option("--bare", help="Do not record; say how long the command took.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Limit for the boot in seconds. [default: 600; 1200 for Intel]", min=1)
    ] = None,
    memory: Annotated[int, typer.Option(help="The guest's memory in MiB.", min=256)] = 2048,
) -> None:
    """Boot a kernel, run a scenario or a command of this machine's in it, and hand back the recorded trace."""
    from tracer.lab import prebuilt, session
    from tracer.lab.fetch import choose
    from tracer.lab.lab_cpus import lab_cpu

    if bare == bool(output):
        raise Problem("lab run: give -o OUT.parquet to record, or --bare to only run")
    if output:
        check(output, RECORDING)
    command = _command(scenario, workload, context.args)
    booted = choose(kernel, modules, kvm_modules)
    _stop_cleanly()
    _say(f"kernel {booted.name} ({booted.release}): {' '.join(command)}")
    on_amd, run = not lab_cpu(cpu).model, command
    give: dict[str, str] = {}
    if not bare and on_amd:
        run = session.recorder(command, events)
    elif not bare:
        name = session.TRACE.removesuffix(".parquet")
        run, give = session.several({name: command}, events, segments=True, shown=True)
    try:
        done = session.boot(
            booted,
            run,
            cpu=cpu,
            give=give,
            probes=None if bare else prebuilt.have(booted) if on_amd else session.compiled_probes(booted),
            trace=output,
            parameters=param or (),
            memory=memory,
            timeout=timeout or (session.DEFAULT_TIMEOUT if on_amd else session.DEFAULT_TIMEOUT_INTEL),
            follow=True,
        )
    except session.GuestFailed as failure:
        print("\n".join(failure.tail), file=sys.stderr)
        raise
    for warning in done.warnings:
        print(f"kvmtrace: the guest's kernel: {warning}", file=sys.stderr)
    if done.signalled or done.code:
        how = f"was killed by signal {done.code}" if done.signalled else f"ended with {done.code}"
        known = not bare and not done.signalled and done.code <= 3
        raise Problem(f"lab run: {command[0]} {how} in the guest", done.code if known else BAD_INPUT)
    if output and not on_amd:
        _compact(output)
    if output and not output.is_file():
        raise Problem(f"{output}: nothing was recorded")
    if bare:
        print(f"{done.seconds:.3f} s")


@app.command(
    short_help="Record every scenario on every kernel that is here.",
    epilog=examples(
        "kvmtrace lab matrix -o recordings --jobs 2",
        "kvmtrace lab matrix --kernel 6.1 --scenario smi-storm --scenario churn",
    ),
)
def matrix(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Directory to keep the recordings in.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; repeatable. [default: all here]")] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; repeatable.")] = None,
    cpu: Cpus = None,
    shadow: Annotated[bool, typer.Option(help="Record with other MMUs than the TDP MMU as well.")] = True,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Record every scenario on every kernel that is here, with a table; what is in the directory already is kept."""
    import tempfile
    from contextlib import ExitStack

    from tracer.lab.fetch import present
    from tracer.lab.lab_kernels import cached, known
    from tracer.lab.matrix import EPT, TDP, cells, worth

    names = [known(name).name for name in kernel] if kernel else [name for name in cached() if present(name)]
    if not names:
        raise Problem("no kernel is here: kvmtrace lab fetch 6.1", ENVIRONMENT)
    mmus = {name: worth(known(name), cpu or ("amd",)) for name in names}
    if not shadow:
        mmus = {name: tuple(mmu for mmu in several if mmu in (TDP, EPT)) for name, several in mmus.items()}
    wanted = cells(mmus, scenario or ())
    with ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmtrace-matrix-")))
        elif not output.is_dir():
            raise Problem(f"{output}: no such directory")
        _fill(wanted, output, jobs, as_json)


@app.command(short_help="Record the corpus that is shipped.", epilog=examples("kvmtrace lab corpus --jobs 2"))
def corpus(
    directory: Annotated[Path | None, typer.Argument(help="[default: the checkout's traces/corpus]")] = None,
    cpu: Cpus = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Fetch every kernel and record the corpus that is shipped; what is there already is kept."""
    from tracer.lab.bochs import emulator
    from tracer.lab.fetch import fetch as get
    from tracer.lab.fetch import present
    from tracer.lab.lab_cpus import CPUS
    from tracer.lab.lab_kernels import KERNELS, known, missing
    from tracer.lab.matrix import cells, worth
    from tracer.lab.modules import Directory

    cpus = cpu or ["amd", "intel"]
    if not cpu:
        try:
            emulator()
        except Problem as problem:
            print(f"kvmtrace: {problem}; Intel's recordings are left as they are", file=sys.stderr)
            cpus = ["amd"]
    directory = directory or Path(__file__).resolve().parents[2] / "traces" / "corpus"
    directory.mkdir(parents=True, exist_ok=True)
    names = [name for name, kernel in KERNELS.items() if kernel.suites or present(name)]
    for name in KERNELS:
        if name not in names:
            print(f"kvmtrace: {missing(name)}; its recordings are left as they are", file=sys.stderr)
    for name in names:
        here = present(name)
        # One that was fetched before there was Intel in the lab has no kvm-intel.ko.
        lacking = here and not all(CPUS[each].runs(Directory(*here.modules)) for each in cpus if each in CPUS)
        get(name, _say, update=bool(lacking))
    _fill(cells({name: worth(known(name), cpus) for name in names}), directory, jobs, as_json)


def _fill(wanted: list[Cell], directory: Path, jobs: int, as_json: bool) -> None:
    """Record what is wanted and not there yet, print the table, and leave with 2 or 3 if something failed."""
    from dataclasses import asdict

    from tracer.lab.matrix import fill, render

    _stop_cleanly()
    rows, problems = fill(wanted, directory, _say, jobs)
    if as_json:
        print_json({"recordings": [asdict(row) for row in rows], "failed": [str(one) for one in problems]})
    else:
        print(render(rows), end="")
    for problem in problems:
        print(f"kvmtrace: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(max(problem.code for problem in problems))


def _compact(output: Path) -> None:
    """Make the trace of a recording from a guest that has neither the time nor the libraries to do that."""
    import shutil

    from traces.recording.compact import compact

    if (recording := output.with_suffix(".kvmt")).is_dir():
        summary = compact(recording, output)
        shutil.rmtree(recording)
        print(f"{output}: {summary.events:,} events, {summary.lost:,} lost, {summary.size:,} bytes", file=sys.stderr)


def _command(scenario: str, workload: str, rest: list[str]) -> list[str]:
    """Return the argv to run in the guest: a VMM scenario or any command, with the remaining words of the line."""
    import shlex

    from tracer import vmm

    if bool(scenario) == bool(workload):
        raise Problem("lab run: give either --scenario NAME or --workload COMMAND")
    if workload:
        return [*shlex.split(workload), *rest]
    names = [one.name for one in vmm.scenarios()]
    if scenario not in names:
        raise Problem(f"{scenario}: no such scenario; there are {', '.join(names)}")
    return [str(vmm.binary()), scenario, *rest]
