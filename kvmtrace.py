"""The command line of kvmtrace: each verb is a thin layer over the package that does the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli import app as analysis
from tracer.lab.cli import app as lab
from traces.errors import VERDICT_FAILED, Problem

SCHEMA = 1

app = typer.Typer(
    help="Record, replay and analyse how KVM x86 keeps, frees and rebuilds its MMU roots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(analysis)
app.add_typer(lab, name="lab")

Json = Annotated[bool, typer.Option("--json", help="Print JSON (with its schema version) instead of text.")]


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps({"schema": SCHEMA, **document}, indent=2))


def _size(text: str) -> int:
    """Bytes of '64M', '1G', '4096'."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text and text[-1].upper() in units else (text, 1)
    if not digits.isdigit() or not int(digits):
        raise Problem(f"{text}: not a size; write it like 64M or 1G")
    return int(digits) * unit


def _kinds(events: str) -> tuple[str, frozenset[str]]:
    from tracer.probes import PRESETS, preset_kinds
    from traces.schema import BY_NAME

    if events in PRESETS:
        return events, preset_kinds(events)
    names = frozenset(name.strip() for name in events.split(",") if name.strip())
    unknown = sorted(names - (BY_NAME.keys() - {"gap"}))
    if unknown or not names:
        what = ", ".join(unknown) or repr(events)
        raise Problem(f"--events {what}: neither a preset ({', '.join(PRESETS)}) nor kinds of event")
    return "list", names


@app.command(
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog="Examples: kvmtrace record --duration 10 -o stall.parquet"
    " | kvmtrace record --vm 4242 --events roots --duration 60"
    " | kvmtrace record -o boot.parquet -- qemu-system-x86_64 -accel kvm ...",
)
def record(
    command: Annotated[list[str] | None, typer.Argument(help="Record while this command runs (after --).")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The trace to write. [default: kvmtrace-DATE.parquet]")
    ] = None,
    vm: Annotated[str, typer.Option(help="Process that owns the VM to record, or `all`.")] = "all",
    duration: Annotated[float | None, typer.Option(help="Seconds to record.", min=0.001)] = None,
    max_events: Annotated[int | None, typer.Option(help="Stop after this many events.", min=1)] = None,
    max_size: Annotated[str | None, typer.Option(help="Stop when this much is on disk, such as 2G.")] = None,
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
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 when an event was lost.")] = False,
    as_json: Json = False,
) -> None:
    """Record live KVM events into a Parquet trace, every event stored or counted as lost."""
    import time

    from tracer.recorder import Options
    from tracer.recorder import record as make_recording

    if vm != "all" and not vm.isdigit():
        raise Problem(f"--vm {vm}: give the process id of the VM's owner, or `all`")
    ring = _size(ring_size) if ring_size else None
    if ring is not None and (ring & (ring - 1) or ring < 4096):
        raise Problem(f"--ring-size {ring_size}: must be a power of two, at least 4096")
    preset, kinds = _kinds(events)
    (outcome,) = make_recording(
        Options(
            out=out or Path(time.strftime("kvmtrace-%Y%m%d-%H%M%S.parquet")),
            kinds=kinds,
            preset=preset,
            vm=None if vm == "all" else int(vm),
            duration=duration,
            max_events=max_events,
            max_size=_size(max_size) if max_size else None,
            ring_bytes=ring,
            command=tuple(command or ()),
            command_stdout=sys.stderr.fileno() if as_json else None,  # standard output is the document's
        )
    )
    summary = outcome.summary
    if as_json:
        _print_json({
            "path": str(summary.path), "events": summary.events, "emitted": summary.events + summary.lost,
            "lost": summary.lost, "bytes": summary.size, "complete": summary.complete,
            "discrepancies": list(summary.discrepancies), "stopped": outcome.stopped, "seconds": outcome.seconds,
            "recorder_cpu_seconds": outcome.cpu_seconds, "command_status": outcome.status,
        })  # fmt: skip
    else:
        each = summary.size / summary.events if summary.events else 0
        print(
            f"{summary.path}: {summary.events:,} events, {summary.lost:,} lost, "
            f"{summary.size:,} bytes ({each:.2f} each); "
            f"{outcome.stopped}; recorder used {outcome.cpu_seconds:.1f} s CPU in {outcome.seconds:.1f} s",
            file=sys.stderr,
        )
    for line in summary.discrepancies:
        print(f"kvmtrace: {summary.path}: {line}", file=sys.stderr)
    if summary.discrepancies or (strict and summary.lost):
        if strict and summary.lost:
            print(
                f"kvmtrace: {summary.lost:,} events were lost (--strict): try a larger --ring-size, or fewer --events",
                file=sys.stderr,
            )
        raise typer.Exit(VERDICT_FAILED)
    if outcome.status:
        print(f"kvmtrace: the command ended with status {outcome.status}", file=sys.stderr)
        raise typer.Exit(VERDICT_FAILED)


@app.command(epilog="Example: kvmtrace recover stall.kvmt")
def recover(
    directory: Annotated[Path, typer.Argument(help="What a killed recorder left: NAME.kvmt.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The trace to write. [default: NAME.parquet]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a trace from what a killed recorder left; repeat it as often as you like."""
    from traces.compact import compact

    summary = compact(directory, out or directory.with_suffix(".parquet"))
    if as_json:
        _print_json({
            "path": str(summary.path), "events": summary.events, "lost": summary.lost, "bytes": summary.size,
            "complete": summary.complete, "discrepancies": list(summary.discrepancies),
        })  # fmt: skip
        return
    print(
        f"{summary.path}: {summary.events:,} events recovered, {summary.lost:,} known lost, {summary.size:,} bytes",
        file=sys.stderr,
    )
    for line in summary.discrepancies:
        print(f"kvmtrace: {line}", file=sys.stderr)


@app.command(epilog="Example: kvmtrace validate stall.parquet")
def validate(
    trace: Annotated[Path, typer.Argument(help="The recording.")],
    policy: Annotated[
        str, typer.Option(help="Root policy to hold it against. [default: the recorded kernel's]", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """Replay a recording under its own kernel's policy and compare each response of the MMU; exit 1 below 100 %."""
    from replay.lockstep.validate import validate as compare
    from replay.lockstep.verdict import facts, render

    report = compare(trace, policy)
    if as_json:
        _print_json(facts(report))
    else:
        print(render(report), end="")
    if not report.holds:
        raise typer.Exit(VERDICT_FAILED)


@app.command(
    epilog="Examples: kvmtrace synth storm.parquet --policy async --smi-rate 1000 --events 1000000"
    " | kvmtrace synth published.parquet --reset-on non-fault",
)
def synth(
    out: Annotated[Path, typer.Argument(help="The trace to write.")],
    policy: Annotated[str, typer.Option(help="Of the host that `recorded` it: preserve or async.")] = "preserve",
    vms: Annotated[int, typer.Option(help="Virtual machines.")] = 1,
    vcpus: Annotated[int, typer.Option(help="vCPUs of each VM.")] = 1,
    smi_rate: Annotated[
        float | None, typer.Option(help="SMIs per second of guest time. [default: 100; 0.75 with --reset-on]")
    ] = None,
    working_set: Annotated[int, typer.Option(help="Pages touched between two SMIs, repeats counted.")] = 512,
    memory: Annotated[str, typer.Option(help="Guest memory, a multiple of 2M.")] = "64M",
    locality: Annotated[
        str, typer.Option(help="Which pages: sequential (the same run each time), zipf, uniform, or mixed.")
    ] = "sequential",
    page_size: Annotated[str, typer.Option(help="What the host maps: 4k, 2m or mixed.")] = "4k",
    memslot_rate: Annotated[
        float | None, typer.Option(help="Slots deleted and made again, per second. [default: 0; 0.7 with --reset-on]")
    ] = None,
    exit_rate: Annotated[
        float | None, typer.Option(help="Exits but faults, per second. [default: 0; 10000 with --reset-on]")
    ] = None,
    cr0_wp_rate: Annotated[float, typer.Option(help="CR0.WP writes that reset the MMU, per second.")] = 0.0,
    reset_on: Annotated[
        str | None, typer.Option(help="The host resets the MMU after these exits: exit (all) or non-fault.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of guest time. [default: 1; 10 with --reset-on]")
    ] = None,
    events: Annotated[int | None, typer.Option(help="Instead: end after about this many events.")] = None,
    zap_rows: Annotated[bool, typer.Option("--zap-rows", help="With the rows of zaps: 513 for each table.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a synthetic trace for benchmarks and what-ifs; its metadata says that nobody recorded it."""
    import time

    from traces.synth import Parameters, synthesize

    shown = time.monotonic()

    def progress(rows: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 1:
            shown = time.monotonic()
            print(f"\r{rows:,} events", end="", file=sys.stderr, flush=True)

    parameters = Parameters(
        policy=policy, vms=vms, vcpus=vcpus, smi_rate=smi_rate, working_set=working_set, memory=_size(memory),
        locality=locality, page_size=page_size, memslot_rate=memslot_rate, exit_rate=exit_rate,
        cr0_wp_rate=cr0_wp_rate, reset_on=reset_on, duration=duration, events=events, zap_rows=zap_rows, seed=seed,
    )  # fmt: skip
    terminal = sys.stderr.isatty()
    summary = synthesize(out, parameters, progress if terminal else None)
    if as_json:
        settled = parameters.settled().document()
        _print_json({
            "path": str(summary.path), "events": summary.events, "bytes": summary.size, "parameters": settled,
        })  # fmt: skip
        return
    each = summary.size / max(summary.events, 1)
    start = "\r" if terminal else ""
    print(
        f"{start}{summary.path}: {summary.events:,} events, {summary.size:,} bytes ({each:.2f} each)", file=sys.stderr
    )


@app.command(epilog="Example: kvmtrace info stall.parquet --json")
def info(
    trace: Annotated[Path, typer.Argument(help="A recording.")],
    as_json: Json = False,
) -> None:
    """Say what a trace holds: kernel, policy, VMs, probes, events by kind, and what was lost."""
    from traces.summary import info as facts
    from traces.summary import render

    if as_json:
        _print_json(facts(trace))
    else:
        print(render(trace), end="")


@app.command(
    epilog="Examples: kvmtrace replay stall.parquet"
    " | kvmtrace replay stall.parquet --policy preserve --policy ./mine.py -o result.parquet"
    " | kvmtrace replay new.parquet --policy async --refault recent:512"
    " | kvmtrace replay stall.parquet --aging locked,lockless@20000x1 --tdp-pages list,counter",
)
def replay(
    trace: Annotated[Path, typer.Argument(help="A recording.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="sync, async, preserve-worker, preserve, shadow, a file with a policy of your own, or an entry point; "
            "repeatable. [default: the recorded one, preserve, async]"
        ),
    ] = None,
    kernel: Annotated[
        str, typer.Option(help="Unload when this version does, such as 5.15; its policy unless --policy is given.")
    ] = "",
    refault: Annotated[
        str,
        typer.Option(
            help="Where the trace does not say what the guest touched again: none, all, accessed, or recent:PAGES. "
            "[default: the interval from none to all]"
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result, a Parquet file.")] = None,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Also how long each vCPU takes and stands still, in virtual time.")
    ] = True,
    smi: Annotated[
        str,
        typer.Option(
            help="open: SMIs keep their wall-clock time; closed: they move with the guest; auto: as recorded."
        ),
    ] = "auto",
    stall_share: Annotated[
        float, typer.Option(help="A soft-hang has less than this share of its time in the guest...", min=0, max=1)
    ] = 0.1,
    stall_window: Annotated[int, typer.Option(help="... for at least this many ms.", min=1)] = 100,
    stuck_exits: Annotated[
        int, typer.Option(help="A recorded vCPU is stuck after so many exits at one RIP.", min=1)
    ] = 100_000,
    sweep: Annotated[
        str, typer.Option(help="Instead: SMIs at other rates, such as smi-rate=10:10000:log; where does it hang?")
    ] = "",
    smi_rate: Annotated[float, typer.Option(help="Instead: SMIs at this rate, per second and vCPU.", min=0)] = 0.0,
    scale_working_set: Annotated[
        float, typer.Option(help="With these two: a refill needs this many times the pages.", min=0)
    ] = 1.0,
    vcpus_holding_root: Annotated[
        int, typer.Option(help="With these two: so many vCPUs have the root loaded.", min=1)
    ] = 1,
    aging: Annotated[
        str,
        typer.Option(
            help="Instead: agers that hold mmu_lock (locked) or do not (lockless): what faults wait, 1 to 64 vCPUs. "
            "locked,lockless@20000x1: 20,000 a second of 1 page each."
        ),
    ] = "",
    zap_lock: Annotated[
        str, typer.Option(help="Instead: range zaps under mmu_lock for read or for write, such as read,write@1000x1.")
    ] = "",
    apicv: Annotated[
        str, typer.Option(help="Instead: APICv inhibits by memslot (every SPTE goes) or by gfn: SPTEs and refills.")
    ] = "",
    tdp_pages: Annotated[
        str, typer.Option(help="Instead: tables kept in a list under a spinlock, or by a counter: time and waits.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what the recorded VMs would have done under other root policies, and how long it would have taken."""
    from replay import bounds, evidence, plan, report, run
    from replay.designs import report as designs
    from replay.keep import keep
    from replay.virtual import report as time_report
    from replay.virtual import whatif
    from replay.virtual.run import Settings, replay_timed
    from replay.virtual.stalls import Rule
    from traces.reader import Trace

    if smi not in ("auto", "open", "closed"):
        raise Problem(f"--smi {smi}: give auto, open or closed")
    settings = Settings(smi, Rule(stall_share, stall_window * 1_000_000), stuck_exits)

    assumed = plan.refault(refault)
    shown = evidence.Evidence(Trace.open(trace))
    if questions := designs.asked(aging=aging, zap_lock=zap_lock, apicv=apicv, tdp_pages=tdp_pages):
        found = designs.answer(shown, questions)
        if as_json:
            _print_json({"trace": str(trace), "designs": designs.facts(found)})
        else:
            print(designs.render(found), end="")
        return
    share = bounds.accessed_share(shown.trace, shown.intel) if assumed.name == "accessed" else 0.0
    wanted = plan.make(shown, policy or [], kernel, assumed)
    if sweep or smi_rate:
        rates = whatif.parse(sweep) if sweep else whatif.Sweep(smi_rate, smi_rate)
        change = whatif.Change(scale_working_set, vcpus_holding_root)
        kernels = (target.axes for target in wanted.targets if target.policy is None)
        swept = whatif.swept(shown, kernels, rates, change)
        if as_json:
            _print_json({"trace": str(trace), "sweep": time_report.sweep_facts(swept, rates)})
        else:
            print(time_report.render_sweep(swept, rates), end="")
        return
    if out is None:
        times = replay_timed(wanted, settings) if timed else []
        replayed = run.replay(wanted)
    else:
        replayed, times = keep(wanted, out, settings, timed=timed)
    if as_json:
        time = {"time": time_report.facts(times, settings)} if timed else {}
        _print_json({**report.facts(replayed, share), **time})
    else:
        print(report.render(replayed, share), end="")
        if timed:
            print(time_report.render(times, wanted), end="")


@app.command(
    epilog="Examples: kvmtrace explore --list | kvmtrace explore vm-destroy | kvmtrace explore apicv --variant write"
    " | kvmtrace explore ./mine.py --bound vcpus=4 --json >found.json | kvmtrace explore --replay found.json",
)
def explore(
    scenario: Annotated[
        str, typer.Argument(help="One of --list, or a Python file with one of your own (docs/explore.md).")
    ] = "",
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; repeatable. [default: all]")] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="How many of what, such as vcpus=4; repeatable. [default: as in --list]")
    ] = None,
    max_states: Annotated[
        int, typer.Option(help="Give up beyond this many states (about 1 KiB each).", min=1)
    ] = 3_000_000,
    replay: Annotated[
        Path | None, typer.Option(help="Instead: run the schedules in what --json printed, and say what breaks.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Instead: list the scenarios and their variants.")] = False,
    as_json: Json = False,
) -> None:
    """Try every interleaving of a small model of kernel paths; exit 1 when one breaks an invariant, 0 if none does."""
    from replay.explore import catalogue, report
    from replay.explore.scenario import run
    from replay.explore.scenarios import SCENARIOS

    if list_:
        if as_json:
            _print_json(report.listing(SCENARIOS))
        else:
            print(report.render_listing(SCENARIOS), end="")
        return
    if replay is not None:
        own = catalogue.find(scenario) if scenario else None
        replayed = [report.replay(given, own, str(replay)) for given in report.schedules(replay)]
        if as_json:
            _print_json({"replays": replayed})
        else:
            print("".join(map(report.render_replay, replayed)), end="")
        if any(one["broken"] for one in replayed):
            raise typer.Exit(VERDICT_FAILED)
        return
    if not scenario:
        raise Problem("give a scenario, or --list to see those there are")

    def progress(states: int) -> None:
        print(f"\r{states:,} states", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    wanted, bounds = catalogue.find(scenario), report.bounds(bound or [])
    names = variant or [each.name for each in wanted.variants]
    runs = []
    for name in names:
        runs.append(run(wanted, name, bounds, max_states, progress if terminal else None))
        if terminal and runs[-1].exploration.seconds > 1:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if not as_json:
            print(report.render(runs[-1]), flush=True)
    if as_json:
        _print_json({"scenario": wanted.name, "title": wanted.title, "runs": [report.facts(each) for each in runs]})
    if any(each.schedule for each in runs):
        raise typer.Exit(VERDICT_FAILED)


@app.command(epilog="Example: kvmtrace doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what can be recorded on this machine, what cannot, and the one command that mends each lack."""
    from tracer.doctor import examine, render

    report = examine()
    if as_json:
        _print_json(report.document())
    else:
        print(render(report), end="")
    raise typer.Exit(report.exit_code)


def main() -> None:
    """Run the command line; a Problem becomes one line and its exit code."""
    try:
        app()
    except Problem as problem:
        print(f"kvmtrace: {problem}", file=sys.stderr)
        raise SystemExit(problem.code) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
