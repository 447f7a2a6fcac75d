# SPDX-License-Identifier: Apache-2.0
"""The command line of kvmtrace: each verb is a thin layer over the package that does the work."""

from __future__ import annotations

# First: what ^C does while all else is loaded.
from traces.command_line import interrupts  # noqa: F401

# isort: split
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from analysis.cli import app as analysis
from analysis.fleet.cli import app as fleet_analysis
from replay.cli import app as replay
from replay.fleet.cli import app as fleet_replay
from tracer.cli import app as probes
from tracer.flight.cli import app as flight
from tracer.lab.cli import app as lab
from tracer.top.cli import app as top
from traces.command_line import ending
from traces.command_line.documents import print_json
from traces.command_line.extras import how_to_get, need
from traces.command_line.help_text import examples
from traces.command_line.messages import tell
from traces.command_line.sizes import size_of
from traces.errors import ENVIRONMENT, VERDICT_FAILED, Problem
from traces.options import Force, Json, Recording
from traces.text import count, events_lost

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(replay)
app.add_typer(analysis)
app.add_typer(flight)
app.add_typer(top)
app.add_typer(lab, name="lab")
app.add_typer(probes, name="probes")
fleet = typer.Typer(
    no_args_is_help=True,
    short_help="Recordings of many hosts: catalogue, replay, reports.",
    help="Recordings of many hosts in a folder or an object store: catalogue, replay, reports (docs/fleet.md).",
)
fleet.add_typer(fleet_replay)
fleet.add_typer(fleet_analysis)
app.add_typer(fleet, name="fleet")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvmtrace {version('kvmtrace')}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "kvmtrace doctor",
        "kvmtrace record --duration 10 -o stall.parquet",
        "kvmtrace report stall.parquet",
    )
)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Record, replay and analyse how KVM x86 keeps, frees and rebuilds its MMU roots."""


def _kinds(events: str) -> tuple[str, frozenset[str]]:
    from tracer.probing.probes import PRESETS, preset_kinds
    from traces.schema import BY_NAME, OWN_KINDS

    if events in PRESETS:
        return events, preset_kinds(events)
    names = frozenset(name.strip() for name in events.split(",") if name.strip())
    unknown = sorted(names - (BY_NAME.keys() - set(OWN_KINDS)))
    if unknown or not names:
        what = ", ".join(unknown) or repr(events)
        raise Problem(f"--events {what}: neither a preset ({', '.join(PRESETS)}) nor kinds of event")
    return "list", names


@app.command(
    short_help="Record live KVM events into a Parquet trace.",
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog=examples(
        "kvmtrace record --duration 10 -o stall.parquet",
        "kvmtrace record --vm 4242 --events roots --duration 60",
        "kvmtrace record -o boot.parquet -- qemu-system-x86_64 -accel kvm ...",
        "kvmtrace record --flight 30s -o /var/lib/kvmtrace \\\n  --trigger 'guest-share < 10% for 200ms'",
    ),
)
def record(
    command: Annotated[list[str] | None, typer.Argument(help="Record while this command runs (after --).")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The trace to write, or the directory for a flight's dumps. [default: kvmtrace-DATE.parquet]",
        ),
    ] = None,
    vm: Annotated[str, typer.Option(help="Process that owns the VM to record, or `all`.")] = "all",
    duration: Annotated[float | None, typer.Option(help="Seconds to record.", min=0.001)] = None,
    max_events: Annotated[int | None, typer.Option(help="Stop after this many events.", min=1)] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Stop when this much is on disk, such as 2G; within one batch of 65,536 events.")
    ] = None,
    events: Annotated[
        str,
        typer.Option(
            help="roots (cheap, for production), time (what replay needs), mmu (what validate needs), all, or kinds, "
            "separated by commas."
        ),
    ] = "mmu",
    ring_size: Annotated[
        str | None, typer.Option(help="BPF ring buffer of each CPU, a power of two. [default: 32M, 256M in all]")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when an event was lost, or the kernel skipped a probe.")
    ] = False,
    flight: Annotated[
        str,
        typer.Option(
            help="Keep only the last seconds, such as 30s, and write them to the directory -o on request: by "
            "`kvmtrace dump`, SIGUSR2, or a trigger.",
            show_default=False,
        ),
    ] = "",
    memory: Annotated[str, typer.Option(help="With --flight: the most memory that these seconds may take.")] = "256M",
    after: Annotated[str, typer.Option(help="With --flight: a dump includes this much time after the request.")] = "2s",
    disk: Annotated[
        str, typer.Option(help="With --flight: the most disk space that the dumps of triggers may take.")
    ] = "4G",
    max_overhead: Annotated[
        str,
        typer.Option(
            help="With --flight: record fewer kinds of event while recording uses more than this share of the "
            "host's CPUs, such as 1%.",
            show_default=False,
        ),
    ] = "",
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            help='With --flight: make a dump when this begins, such as "guest-share < 10% for 200ms"; repeatable.'
            " docs/always-on.md lists them all.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        str,
        typer.Option(help="With --flight: members of this group may ask for dumps, not only root.", show_default=False),
    ] = "",
    metrics: Annotated[
        str,
        typer.Option(
            help="With --flight: publish metrics at an address such as :9417 for Prometheus, or in a file "
            "NAME.prom for node_exporter.",
            show_default=False,
        ),
    ] = "",
    upload: Annotated[
        str,
        typer.Option(
            help="Upload the recording, or each dump of a flight, to a folder or store, such as s3://BUCKET; what "
            "cannot be uploaded now waits on disk for the next start.",
            show_default=False,
        ),
    ] = "",
    spool: Annotated[str, typer.Option(help="With --upload: the most that may wait on disk.")] = "4G",
    as_json: Json = False,
) -> None:
    """Record live KVM events into a Parquet trace, every event stored or counted as lost."""
    import time

    from tracer.recorder import record as make_recording
    from tracer.recording_options import Options

    if vm != "all" and not vm.isdigit():
        raise Problem(f"--vm {vm}: give the process id of the VM's owner, or `all`")
    ring = size_of(ring_size) if ring_size else None
    if ring is not None and (ring & (ring - 1) or ring < 4096):
        raise Problem(f"--ring-size {ring_size}: must be a power of two, at least 4096")
    if flight or upload:
        need("pyarrow", "--flight" if flight else "--upload", "flight")
    if upload:
        need("obstore", "--upload", "flight")
    preset, kinds = _kinds(events)
    options = Options(
        out=out or Path(time.strftime("kvmtrace-%Y%m%d-%H%M%S.parquet")),
        kinds=kinds,
        preset=preset,
        vm=None if vm == "all" else int(vm),
        duration=duration,
        max_events=max_events,
        max_size=size_of(max_size) if max_size else None,
        ring_bytes=ring,
        command=tuple(command or ()),
        command_stdout=sys.stderr.fileno() if as_json else None,  # standard output is the document's
    )
    if flight:
        from tracer.flight.verb import fly_and_tell

        kept = (flight, after, size_of(memory), size_of(disk))
        fly_and_tell(
            options,
            out,
            kept,
            max_overhead,
            tuple(trigger or ()),
            group,
            metrics,
            (upload, size_of(spool)),
            strict=strict,
            as_json=as_json,
        )
        return
    from tracer.upload.upload_recording import uploading

    with uploading(upload, options.out, size_of(spool)) as uploaded:
        (outcome,) = make_recording(options)
    summary = outcome.summary
    if as_json:
        print_json({
            "path": str(summary.path), "events": summary.events, "emitted": summary.events + summary.lost,
            "lost": summary.lost, "bytes": summary.size, "complete": summary.complete,
            "discrepancies": list(summary.discrepancies), "stopped": outcome.stopped, "seconds": outcome.seconds,
            "recorder_cpu_seconds": outcome.cpu_seconds, "command_status": outcome.status, "missed": outcome.missed,
            "upload": uploaded.outcome.to_dict() if uploaded.outcome else None,
        })  # fmt: skip
    else:
        each = summary.size / summary.events if summary.events else 0
        tell(
            f"{summary.path}: {summary.events:,} events, {summary.lost:,} lost, "
            f"{summary.size:,} bytes ({each:.2f} each); "
            f"{outcome.stopped}; recorder used {outcome.cpu_seconds:.1f} s CPU in {outcome.seconds:.1f} s"
        )
        if uploaded.outcome:
            tell(f"kvmtrace: {uploaded.outcome.text}")
    for line in summary.discrepancies:
        tell(f"kvmtrace: {summary.path}: {line}")
    if summary.path.suffix == ".kvmt":
        tell(
            f"kvmtrace: {summary.path}: no trace yet, for that needs pyarrow: copy it to where it is installed, or "
            f"{how_to_get('pyarrow')}; then run `kvmtrace recover {summary.path}`"
        )
    for probe, runs in outcome.missed.items():
        tell(
            f"kvmtrace: the kernel skipped {probe} {runs:,} times, as another BPF program was running on that CPU: "
            "these events were never seen"
        )
    if summary.discrepancies or (strict and (summary.lost or outcome.missed)):
        if strict and summary.lost:
            tell(f"kvmtrace: {events_lost(summary.lost)} (--strict): try a larger --ring-size, or fewer --events")
        raise typer.Exit(VERDICT_FAILED)
    if outcome.status:
        tell(f"kvmtrace: the command ended with status {outcome.status}")
        raise typer.Exit(VERDICT_FAILED)
    if uploaded.outcome and (uploaded.outcome.waits or uploaded.outcome.dropped):
        raise typer.Exit(ENVIRONMENT)


@app.command(
    short_help="Say what a kernel's MMU does with roots, or what changed.",
    epilog=examples(
        "kvmtrace kernels", "kvmtrace kernels 6.1.20", "kvmtrace kernels 5.15 6.12", "kvmtrace kernels 7.x --json"
    ),
)
def kernels(
    version: Annotated[str, typer.Argument(help="A kernel version, such as 5.15, 6.1.20 or 7.x.")] = "",
    other: Annotated[str, typer.Argument(metavar="VERSION", help="A second one: what changed from the first.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a kernel's MMU does with roots, or what changed between two versions, with commits."""
    from traces.kernels import describe

    document, text = (
        describe.two(version, other) if other else describe.one(version) if version else describe.every_change()
    )
    if as_json:
        print_json(document)
    else:
        print(text, end="")


@app.command(
    short_help="Make a trace from what a killed recorder left.", epilog=examples("kvmtrace recover stall.kvmt")
)
def recover(
    directory: Annotated[Path, typer.Argument(help="What a killed recorder left: NAME.kvmt.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The trace to write. [default: NAME.parquet]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a trace from what a killed recorder left; repeat it as often as you like."""
    from traces.recording.compact import compact

    summary = compact(directory, out or directory.with_suffix(".parquet"))
    if as_json:
        print_json({
            "path": str(summary.path), "events": summary.events, "lost": summary.lost, "bytes": summary.size,
            "complete": summary.complete, "discrepancies": list(summary.discrepancies),
        })  # fmt: skip
        return
    print(
        f"{summary.path}: {count(summary.events, 'event')} recovered, {summary.lost:,} known lost, "
        f"{count(summary.size, 'byte')}",
        file=sys.stderr,
    )
    for line in summary.discrepancies:
        print(f"kvmtrace: {line}", file=sys.stderr)


@app.command(
    "import",
    short_help="Make a trace of what trace-cmd, perf or ftrace recorded or printed.",
    epilog=examples(
        "kvmtrace import trace.dat -o stall.parquet",
        "kvmtrace import trace_pipe.txt.gz -o stall.parquet --kernel 6.1.20",
        "kvmtrace import report.txt.xz -o stall.parquet --json",
        "kvmtrace import mail.eml -o stall.parquet --vm-of 5120=web1 \\\n  --memslot 0+3G@0x7f1200000000",
    ),
)
def import_(
    file: Annotated[Path, typer.Argument(help="trace.dat, perf.data or a text, also packed; - is standard input.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The trace to write. [default: FILE's name, .parquet]")
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(help="The kernel that it was recorded on, such as 6.1.20: replay needs it.", show_default=False),
    ] = "",
    vm_of: Annotated[
        list[str] | None,
        typer.Option(help="TID=NAME: that thread runs a vCPU of the VM of that name; repeatable."),
    ] = None,
    memslot: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]GPA+SIZE[@HVA]: memory of the VM, such as 0+3G@0x7f1200000000; repeatable."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a trace of what trace-cmd or perf recorded, or of what they and ftrace printed, and say what is missing."""
    from traces.imports.importing import import_file
    from traces.imports.told import ToldOfText, slots
    from traces.imports.told import vm_of as named
    from traces.recording.arrow_records import spare_allocations

    if out is None:
        out = Path("imported.parquet") if str(file) == "-" else Path(file.name.split(".")[0] + ".parquet")
    told = ToldOfText(kernel, named(vm_of or []), slots(memslot or []))
    spare_allocations()
    made = import_file(file, out, told, force=force)
    summary, said = made.summary, made.said
    if as_json:
        print_json({
            "path": str(summary.path), "events": summary.events, "lost": summary.lost, "bytes": summary.size,
            "complete": summary.complete, "lines": said.found.lines, "not_understood": said.found.odd,
            "others": said.others, "inferred": list(said.assigned.inferred), "remarks": said.remarks(),
        })  # fmt: skip
        return
    read = count(said.found.lines, "line" if said.found.kind == "text" else "record")
    tell(f"{summary.path}: {count(summary.events, 'event')} of {read}, {count(summary.size, 'byte')}")
    for line in (*said.remarks(), *said.assigned.inferred):
        tell(f"kvmtrace: {file}: {line}")


@app.command(
    short_help="Write a synthetic trace for benchmarks and what-ifs.",
    epilog=examples(
        "kvmtrace synth storm.parquet --policy async --smi-rate 1000 \\\n  --events 1000000",
        "kvmtrace synth published.parquet --reset-on non-fault",
    ),
)
def synth(
    out: Annotated[Path, typer.Argument(help="The trace to write.")],
    policy: Annotated[
        str, typer.Option(help="Root policy of the host that the trace pretends to come from: preserve or async.")
    ] = "preserve",
    vms: Annotated[int, typer.Option(help="Virtual machines.")] = 1,
    vcpus: Annotated[int, typer.Option(help="vCPUs of each VM.")] = 1,
    smi_rate: Annotated[
        float | None, typer.Option(help="SMIs per second of guest time. [default: 100; 0.75 with --reset-on]")
    ] = None,
    working_set: Annotated[int, typer.Option(help="Pages accessed between two SMIs, repeats counted.")] = 512,
    memory: Annotated[str, typer.Option(help="Guest memory, a multiple of 2M.")] = "64M",
    locality: Annotated[
        str, typer.Option(help="Which pages: sequential (the same run each time), zipf, uniform, or mixed.")
    ] = "sequential",
    page_size: Annotated[str, typer.Option(help="What the host maps: 4k, 2m or mixed.")] = "4k",
    memslot_rate: Annotated[
        float | None,
        typer.Option(help="Memory slots deleted and made again, per second. [default: 0; 0.7 with --reset-on]"),
    ] = None,
    exit_rate: Annotated[
        float | None, typer.Option(help="Exits other than faults, per second. [default: 0; 10000 with --reset-on]")
    ] = None,
    cr0_wp_rate: Annotated[float, typer.Option(help="CR0.WP writes that reset the MMU, per second.")] = 0.0,
    reset_on: Annotated[
        str | None, typer.Option(help="The host resets the MMU after these exits: exit (all) or non-fault.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of guest time. [default: 1; 10 with --reset-on]")
    ] = None,
    events: Annotated[int | None, typer.Option(help="Instead of --duration: end after about this many events.")] = None,
    zap_rows: Annotated[
        bool, typer.Option("--zap-rows", help="Write the rows of zaps as well: 513 for each table.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a synthetic trace for benchmarks and experiments; its metadata says that it was not recorded."""
    from traces.synth import Parameters, synthesize

    parameters = Parameters(
        policy=policy, vms=vms, vcpus=vcpus, smi_rate=smi_rate, working_set=working_set, memory=size_of(memory),
        locality=locality, page_size=page_size, memslot_rate=memslot_rate, exit_rate=exit_rate,
        cr0_wp_rate=cr0_wp_rate, reset_on=reset_on, duration=duration, events=events, zap_rows=zap_rows, seed=seed,
    )  # fmt: skip
    summary = synthesize(out, parameters, force=force)
    if as_json:
        settled = parameters.settled().to_dict()
        print_json({
            "path": str(summary.path), "events": summary.events, "bytes": summary.size, "parameters": settled,
        })  # fmt: skip
        return
    each = summary.size / max(summary.events, 1)
    print(f"{summary.path}: {summary.events:,} events, {summary.size:,} bytes ({each:.2f} each)", file=sys.stderr)


@app.command(
    short_help="Say what a trace holds, and what was lost.",
    epilog=examples("kvmtrace info stall.parquet", "kvmtrace info stall.parquet --json"),
)
def info(
    trace: Recording,
    as_json: Json = False,
) -> None:
    """Say what a trace holds: kernel, policy, VMs, probes, events by kind, and what was lost."""
    from traces.summary import info as to_dict
    from traces.summary import render

    if as_json:
        print_json(to_dict(trace))
    else:
        print(render(trace), end="")


@app.command(
    short_help="Say what can be recorded on this machine, and what is missing.",
    epilog=examples("kvmtrace doctor", "kvmtrace doctor --json"),
)
def doctor(as_json: Json = False) -> None:
    """Say what can be recorded on this machine, what cannot, and the one command that fixes each problem."""
    from tracer.doctor import SCHEMA, examine, render

    report = examine()
    if as_json:
        print_json(report.to_dict(), SCHEMA)
    else:
        print(render(report), end="")
    raise typer.Exit(report.exit_code)


def main() -> NoReturn:
    """Run the command line, and leave with its exit code."""
    ending.run(app)


if __name__ == "__main__":
    main()
