# SPDX-License-Identifier: Apache-2.0
"""The commands `kvmtrace validate`, `kvmtrace replay` and `kvmtrace explore`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.command_line.documents import print_json
from traces.command_line.help_text import examples
from traces.errors import VERDICT_FAILED, Problem
from traces.options import Force, Json, RecordedPolicy, Recording, part_of, taking
from traces.outputs import RESULT, check

if TYPE_CHECKING:
    from traces.selection import Selection

app = typer.Typer()


@app.command(
    short_help="Compare a recording with the model of its own kernel.",
    epilog=examples("kvmtrace validate stall.parquet", "kvmtrace validate stall.parquet --json"),
)
@taking(selected=part_of("vm", "since", "until"))
def validate(
    trace: Recording,
    policy: Annotated[
        str, typer.Option(help="Root policy to compare it with. [default: the recorded kernel's]", show_default=False)
    ] = "",
    recorded_policy: RecordedPolicy = "",
    *,
    selected: Selection,
    as_json: Json = False,
) -> None:
    """Replay a recording under its own kernel's policy and compare each response of the MMU; exit 1 below 100 %."""
    from replay.validate.compare import validate as compare
    from replay.validate.validate_text import SCHEMA, render, to_dict
    from traces.reader import Trace

    whole = Trace.open(trace, recorded_policy)
    since, _ = selected.window(whole)
    report = compare(selected.of(whole), policy, since=since)
    if as_json:
        print_json(to_dict(report), SCHEMA)
    else:
        print(render(report), end="")
    if not report.holds:
        raise typer.Exit(VERDICT_FAILED)


@app.command(
    short_help="Say what the VMs would have done under other root policies.",
    epilog=examples(
        "kvmtrace replay stall.parquet",
        "kvmtrace replay stall.parquet --policy ./mine.py -o result.parquet",
        "kvmtrace replay new.parquet --policy async --refault recent:512",
        "kvmtrace replay stall.parquet --policy async --sweep smi-rate=1:1000:log",
        "kvmtrace replay stall.parquet --aging locked,lockless@20000x1",
    ),
)
@taking(selected=part_of("vm", "until"))
def replay(
    trace: Recording,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="sync, async, preserve-worker, preserve, shadow, a file with a policy of your own, or an entry point; "
            "repeatable. [default: the recorded one, preserve, async]"
        ),
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(
            help="Replay as this kernel version would behave, such as 5.15: when it unloads, how it zaps. "
            "[default: its own policy, and the recorded one; --policy names others]"
        ),
    ] = "",
    refault: Annotated[
        str,
        typer.Option(
            help="Where the trace does not say what the guest accessed again: none, all, accessed, or recent:PAGES. "
            "[default: the interval from none to all]"
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result, a Parquet file.")] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--time/--no-time", help="Also predict, in virtual time, how long each vCPU takes and how long it hangs."
        ),
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
        int, typer.Option(help="Call a recorded vCPU stuck after this many exits at one RIP without progress.", min=1)
    ] = 200,  # stuck_rip.CERTAIN
    sweep: Annotated[
        str, typer.Option(help="Mode: SMIs at other rates, such as smi-rate=10:10000:log; where does it hang?")
    ] = "",
    smi_rate: Annotated[float, typer.Option(help="Mode: SMIs at this rate, per second and vCPU.", min=0)] = 0.0,
    scale_working_set: Annotated[
        float, typer.Option(help="With --sweep or --smi-rate: a refill needs this many times the pages.", min=0)
    ] = 1.0,
    vcpus_holding_root: Annotated[
        int, typer.Option(help="With --sweep or --smi-rate: this many vCPUs have the root loaded.", min=1)
    ] = 1,
    aging: Annotated[
        str,
        typer.Option(
            help="Mode: agers that hold mmu_lock (locked) or do not (lockless): how long faults wait, with 1 to "
            "64 vCPUs. locked,lockless@20000x1: 20,000 a second of 1 page each."
        ),
    ] = "",
    zap_lock: Annotated[
        str, typer.Option(help="Mode: range zaps under mmu_lock for read or for write, such as read,write@1000x1.")
    ] = "",
    apicv: Annotated[
        str, typer.Option(help="Mode: APICv inhibits by memslot (every SPTE goes) or by gfn: SPTEs and refills.")
    ] = "",
    tdp_pages: Annotated[
        str, typer.Option(help="Mode: tables kept in a list under a spinlock, or by a counter: time and waits.")
    ] = "",
    recorded_policy: RecordedPolicy = "",
    *,
    selected: Selection,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say what the recorded VMs would have done under other root policies, and how long it would have taken."""
    from replay import bounds, counts_text, own_policy, plan, run, worst_off
    from replay.decode import capabilities
    from replay.timing import time_text as time_report
    from replay.timing.stalls import Rule
    from replay.timing.timed_run import Settings
    from replay.whatif import each_vm, smi_rate_text
    from replay.whatif import questions as designs
    from replay.whatif import smi_rate as rates
    from traces.reader import Trace

    if smi not in ("auto", "open", "closed"):
        raise Problem(f"--smi {smi}: give auto, open or closed")
    settings = Settings(smi, Rule(stall_share, stall_window * 1_000_000), stuck_exits)

    asked = {"--aging": aging, "--zap-lock": zap_lock, "--apicv": apicv, "--tdp-pages": tdp_pages}
    questions_asked = [name for name, value in asked.items() if value]
    instead = [*(["--sweep"] if sweep else []), *(["--smi-rate"] if smi_rate else []), *questions_asked]
    if instead and out is not None:
        raise Problem(f"replay {instead[0]}: writes no result: give no -o (--json prints what it finds)")
    if questions_asked and policy:
        raise Problem(f"replay {questions_asked[0]}: is no matter of a root policy: give no --policy")
    if questions_asked and (sweep or smi_rate):
        raise Problem(f"replay {instead[0]}: is another question than {questions_asked[0]}: ask them one by one")
    inputs = [trace, *map(Path, policy or ())]
    if out is not None:
        check(out, RESULT, inputs, force=force)
    assumed = plan.refault(refault)
    shown = capabilities.Capabilities(selected.of(Trace.open(trace, recorded_policy)))
    if questions := designs.asked(aging=aging, zap_lock=zap_lock, apicv=apicv, tdp_pages=tdp_pages):
        found, unanswered = designs.answer(shown, questions)
        checks = [work.check for work, _ in found if work.check is not None]
        if as_json:
            own, none = own_policy.to_dict(checks), each_vm.to_dict(unanswered)
            document = {"own_policy": own, "designs": designs.to_dict(found), "unanswered": none}
            print_json({"trace": str(trace), **document})
        else:
            print(counts_text.untrusted(checks) + designs.render(found, unanswered), end="")
        return
    share = bounds.accessed_share(shown.trace, shown.kernel) if assumed.name == "accessed" else 0.0
    wanted = plan.make(shown, policy or [], kernel, assumed)
    if sweep or smi_rate:
        wide = rates.parse(sweep) if sweep else rates.Sweep(smi_rate, smi_rate)
        change = rates.SmiChange(scale_working_set, vcpus_holding_root)
        kernels = (target.parameters for target in wanted.targets if target.policy is None)
        swept, checks, unanswered = rates.swept(shown, kernels, wide, change)
        if as_json:
            own, document = own_policy.to_dict(checks), smi_rate_text.to_dict(swept, unanswered, wide)
            print_json({"trace": str(trace), "own_policy": own, "sweep": document})
        else:
            print(counts_text.untrusted(checks) + smi_rate_text.render(swept, unanswered, wide), end="")
        return
    taken = settings if timed else None
    replayed = run.replay(wanted, taken) if out is None else run.replay_into(wanted, out, taken, inputs, force=force)
    if as_json:
        time = {"time": time_report.to_dict(replayed.times, settings)} if timed else {}
        print_json({**counts_text.to_dict(replayed, share), **time})
    else:
        print(counts_text.render(replayed, share), end="")
        if timed:
            print(time_report.render(replayed.times, wanted, worst_off.ranked(replayed)), end="")


@app.command(
    short_help="Try every interleaving of a small model of kernel paths.",
    epilog=examples(
        "kvmtrace explore --list",
        "kvmtrace explore vm-destroy",
        "kvmtrace explore apicv --variant write",
        "kvmtrace explore ./mine.py --bound vcpus=4 --json >found.json",
        "kvmtrace explore --replay found.json",
    ),
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
        Path | None, typer.Option(help="Mode: run the schedules in what --json printed, and say what breaks.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Mode: list the scenarios and their variants.")] = False,
    as_json: Json = False,
) -> None:
    """Try every interleaving of a small model of kernel paths; exit 1 when one breaks an invariant, 0 if none does."""
    from replay.explore import catalogue, explore_text
    from replay.explore.scenario import run
    from replay.explore.scenarios import SCENARIOS

    if list_:
        if as_json:
            print_json(explore_text.listing(SCENARIOS))
        else:
            print(explore_text.render_listing(SCENARIOS), end="")
        return
    if replay is not None:
        own = catalogue.find(scenario) if scenario else None
        replayed = [explore_text.replay(given, own, str(replay)) for given in explore_text.schedules(replay)]
        if as_json:
            print_json({"replays": replayed})
        else:
            print("".join(map(explore_text.render_replay, replayed)), end="")
        if any(one["broken"] for one in replayed):
            raise typer.Exit(VERDICT_FAILED)
        return
    if not scenario:
        raise Problem("give a scenario, or --list to see those there are")

    wanted, bounds = catalogue.find(scenario), explore_text.bounds(bound or [])
    names = variant or [each.name for each in wanted.variants]
    runs = []
    for name in names:
        runs.append(run(wanted, name, bounds, max_states))
        if not as_json:
            print(explore_text.render(runs[-1]), flush=True)
    if as_json:
        print_json(
            {"scenario": wanted.name, "title": wanted.title, "runs": [explore_text.to_dict(each) for each in runs]}
        )
    if any(each.schedule for each in runs):
        raise typer.Exit(VERDICT_FAILED)
