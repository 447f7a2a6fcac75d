# SPDX-License-Identifier: Apache-2.0
"""How accurate the replay's predictions are: recordings replayed under another policy, compared with what was recorded.

    python -m benchmarks.accuracy            # writes docs/prediction-accuracy.md

Each prediction is made from one recording of the corpus and compared with another recording of the same scenario, made
under the other policy or on the other kernel; a scenario does the same work in every run. The recorded counts are taken
from the rows of the trace, without the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import polars as pl

from replay import bounds, plan, run
from replay.bounds import Count
from replay.decode.capabilities import Capabilities
from replay.timing.timed_run import Settings
from tracer.lab.matrix import provenance
from traces import kernels
from traces.kernels.spte import LARGE
from traces.reader import Trace

ROOT: Final = Path(__file__).parents[1]
CORPUS: Final = ROOT / "traces" / "corpus"
DOCUMENT: Final = ROOT / "docs" / "prediction-accuracy.md"
COUNTS: Final = ("roots", "tables", "installs", "first accesses", "zaps")
_TIMED: Final = ("slot-delete", "smi-storm", "steady", "wp-toggle")  # recorded under both policies on both CPUs


@dataclass(frozen=True)
class Direction:
    """One comparison: recordings of kernel `source`, replayed with these options, predict those of kernel `target`."""

    source: str
    target: str
    policy: str = ""
    kernel: str = ""
    refault: str = ""

    @property
    def options(self) -> str:
        """Return the options as given to `kvmtrace replay`.

        Empty where the recording's own policy and kernel are replayed.
        """
        given = {"--policy": self.policy, "--kernel": self.kernel, "--refault": self.refault}
        return " ".join(f"{option} {value}" for option, value in given.items() if value)


@dataclass(frozen=True)
class Cell:
    """One count as predicted and as recorded; `recorded` is None where recordings of that kernel do not show it."""

    predicted: Count
    recorded: int | None

    @property
    def verdict(self) -> str:
        """Return "exact" (one number, the right one), "within" (in the predicted interval), "off" or "unseen"."""
        if self.recorded is None:
            return "unseen"
        if self.recorded not in self.predicted:
            return "off"
        return "exact" if self.predicted.low == self.predicted.high else "within"


# Why a predicted count may differ from the recorded one; reason() says in which cells.
REASONS: Final = {
    "A": "MMIO SPTEs go with their table and are not counted as leaves by KVM; the model counts each as a leaf.",
    "B": "5.10 drops a table with a range that covers it. A recording of 5.10 does not show what the host removed, "
    "and from the shadow MMU's, which removes leaves only, it cannot be inferred.",
    "C": "`all` takes each root built to be needed whole. The last toggle of these scenarios comes after the last "
    "pass: the root built for it is hardly accessed. The interval without `--refault` holds what happened.",
    "D": "Words of 5.10 have CR0.WP and EFER.NX, and a page is accessed first under each word. The upper end has one "
    "word, to which all that the recorded root had mapped goes.",
}


# Scenarios with MMIO SPTEs, and scenarios where the host's speed decides how many SPTEs the host removes.
_MMIO: Final = ("bar", "idle", "lost-idt", "mmio", "mmio-poll", "not-emulated", "one-idle")
_BY_THE_CLOCK: Final = {"ksm", "notifier-storm", "nx-recovery", "slot-storm"}


def reason(direction: Direction, scenario: str, count: str) -> str:
    """Return the key in REASONS that explains why this count may be off, or "" where it must not be off."""
    if direction.target == "5.10" and direction.refault == "all" and count == "first accesses" and "toggle" in scenario:
        return "D"
    rules = (
        ("A", scenario in _MMIO and count == "zaps"),
        ("B", direction.source == "5.10-shadow" and scenario.startswith("notifier") and count == "tables"),
        ("C", direction.refault == "all" and "toggle" in scenario and count in ("tables", "installs", "zaps")),
    )
    return next((key for key, holds in rules if holds), "")


_OF_TIMES: Final = (
    "One recording of each, on 6.1 under both root policies: what the passes took as recorded, and as predicted from",
    "the recording under the other policy (docs/time-accuracy.md has medians of many). AMD's under QEMU, with the",
    "recorder's own work in it; Intel's under Bochs, whose clock counts instructions: compare lines of one CPU.",
    "",
    "What the model does not include: on Intel's one processor a memslot's change waits under the old policy until the",
    "worker is done with it (1,141 ms in KVM_SET_USER_MEMORY_REGION, 159 under the new one). AMD's guest has two.",
)
KERNELS: Final = ("5.10", "6.1", "6.1-async", "6.12", "7.x")
SHADOWS: Final = ("5.10-shadow", "6.1-shadow", "6.12-shadow", "7.x-shadow")


def directions() -> Iterator[Direction]:
    """Yield every comparison of the document, in its order."""
    for kernel in (*KERNELS, *SHADOWS):
        yield Direction(kernel, kernel)
    yield Direction("6.1-async", "6.1", "preserve")
    yield Direction("6.1", "6.1-async", "async")
    yield Direction("6.1", "6.1-async", "async", refault="all")
    yield Direction("6.1-async", "6.1-shadow", "shadow")
    yield Direction("6.1-shadow", "6.1-async", "async")
    for kernel in ("6.1", "6.12", "7.x"):
        yield Direction(kernel, f"{kernel}-shadow", "shadow")
        yield Direction(f"{kernel}-shadow", kernel, "preserve")
    # Recordings of the same kernels on Intel (EPT).
    yield Direction("6.1-ept", "6.1-ept")
    yield Direction("6.1-async-ept", "6.1-async-ept")
    yield Direction("6.1-async-ept", "6.1-ept", "preserve")
    yield Direction("6.1-ept", "6.1-async-ept", "async")
    yield Direction("6.1-ept", "6.1-async-ept", "async", refault="all")
    yield Direction("5.10-ept", "5.10-ept")
    yield Direction("5.10-ept", "6.1-ept", kernel="6.1")
    yield Direction("6.1-ept", "5.10-ept", kernel="5.10")
    for kernel in ("6.12", "7.x"):
        yield Direction(f"{kernel}-ept", f"{kernel}-ept")
        yield Direction("6.1-ept", f"{kernel}-ept", kernel=kernel)
        yield Direction(f"{kernel}-ept", "6.1-ept", kernel="6.1")
    yield Direction("5.10", "5.10-shadow", "shadow")
    yield Direction("5.10-shadow", "5.10", "sync")
    yield Direction("5.10", "6.1", kernel="6.1")
    yield Direction("5.10", "6.1-async", "async", "6.1")
    yield Direction("6.1", "5.10", kernel="5.10")
    yield Direction("6.1", "5.10", kernel="5.10", refault="all")
    yield Direction("6.1-async", "5.10", kernel="5.10")
    for kernel in ("6.12", "7.x"):
        yield Direction("6.1", kernel, kernel=kernel)
        yield Direction(kernel, "6.1", kernel="6.1")


def scenarios(direction: Direction) -> list[str]:
    """Return the scenarios that both kernels have recordings of, without those whose work depends on the host's speed.

    A recording that is compared with itself may be of any scenario.
    """

    def of(kernel: str) -> set[str]:
        suffix = f"-{kernel}.parquet"
        return {path.name.removesuffix(suffix) for path in CORPUS.glob(f"*{suffix}")}

    both = of(direction.source) & of(direction.target)
    return sorted(both if direction.source == direction.target else both - _BY_THE_CLOCK)


@cache
def _evidence(name: str) -> Capabilities:
    return Capabilities(Trace.open(CORPUS / f"{name}.parquet"))


def predicted(direction: Direction, scenario: str) -> dict[str, Count]:
    """Return the counts that a replay of the source's recording predicts for the target, by name."""
    capabilities = _evidence(f"{scenario}-{direction.source}")
    own = kernels.at(direction.kernel).policy if direction.kernel else capabilities.own.name
    names = [direction.policy or own]
    assumed = plan.refault(direction.refault)
    wanted = plan.make(capabilities, names, direction.kernel, assumed)
    found = bounds.counts(run.replay(wanted).outcomes, assumed)
    faults, refaults = found["faults"], found["refaults"]
    prefetched = found["prefetched"]
    least = faults.low - refaults.low
    if faults.high is None or refaults.high is None or prefetched.high is None:
        installs, accesses = Count(faults.low + prefetched.low, None), Count(least, None)
    else:
        # With `merged` the two ends of the interval count accesses under different sets of role words.
        other = faults.high - (refaults.low if wanted.targets[0].merged else refaults.high)
        installs = Count(faults.low + prefetched.low, faults.high + prefetched.high)
        accesses = Count(min(least, other), max(least, other))
    return {
        "roots": found["creations"],
        "tables": found["tables_built"],
        "installs": installs,
        "first accesses": accesses,
        "zaps": found["zapped"],
    }


@cache
def recorded(name: str) -> dict[str, int | None]:
    """Return the counts that the rows of a recording show, without the model, by name.

    None for a count they do not show.
    """
    capabilities = _evidence(name)
    trace = capabilities.trace
    rows = trace.scan().with_columns(pl.col("kind").cast(pl.String)).sort("seq")
    there = capabilities.kernel.vendor.fault.present
    kind = pl.col("kind")
    built = rows.filter(kind == "kvm_mmu_get_page", pl.col("flags") & 1 == 1, pl.col("root") == 0)
    set_ = kind.is_in(["kvm_mmu_set_spte", "mark_mmio_spte"])
    request = pl.when(kind == "kvm_mmu_spte_requested").then(pl.col("gfn")).forward_fill().over("tid")
    present = pl.when(kind == "kvm_page_fault").then(pl.col("code") & there != 0).forward_fill().over("tid")
    level = pl.when(kind == "mark_mmio_spte").then(pl.lit(1, pl.Int8)).otherwise(pl.col("level"))
    size = level.replace_strict({1: 1, 2: 1 << 9, 3: 1 << 18}, default=1, return_dtype=pl.Int64)
    role = (
        rows.filter(pl.col("root") > 0, pl.col("role") > 0).group_by("root").agg(pl.col("role").first().alias("word"))
    )
    key = ("vm", "word", "level", "gfn")
    sets = (
        rows.with_columns(request=request // size * size, present=present, level=level)
        .filter(set_)
        .join(role, on="root", how="left", maintain_order="left")
        .with_columns(
            first=pl.int_range(pl.len()).over(key) == 0,
            # 5.10 traces the installation of one MMIO SPTE twice (mark_mmio_spte, then kvm_mmu_set_spte).
            again=(pl.col("gfn") == pl.col("gfn").shift(1))
            & (kind.shift(1) == "mark_mmio_spte")
            & (kind != "mark_mmio_spte"),
            # A level other than that of the last SPTE in the 2 MiB region: it replaced a table or a huge leaf.
            other=(pl.col("level") != pl.col("level").shift(1).over("vm", "word", pl.col("gfn") // 512)).fill_null(
                False
            ),
            asked=(pl.col("gfn") == pl.col("request")) | (kind == "mark_mmio_spte"),
        )
        .filter(~pl.col("again").fill_null(False))
        .collect()
    )
    first = int((sets["first"] & sets["asked"]).sum())
    installs = int((~sets["present"] | sets["first"] | sets["other"]).sum())
    zaps: int | None = None
    if capabilities.has("kvm_tdp_mmu_spte_changed") and not capabilities.shadow:
        spte = capabilities.kernel.spte
        gone = [0, spte.nonpresent, spte.frozen]
        leaf = pl.col("level") == 1
        changed = rows.filter(kind == "kvm_tdp_mmu_spte_changed")
        was = ~pl.col("old").is_in(gone) & (leaf | (pl.col("old") & LARGE != 0))
        now = ~pl.col("new").is_in(gone) & (leaf | (pl.col("new") & LARGE != 0))
        zaps = changed.filter(was, pl.col("old") & spte.present != 0, pl.col("new").is_in(gone)).collect().height
        installs = changed.filter(now, pl.col("old").is_in(gone)).collect().height
    return {
        "roots": trace.metadata.root_count,
        "tables": built.collect().height,
        "installs": installs,
        "first accesses": first,
        "zaps": zaps,
    }


@cache
def table(direction: Direction) -> dict[str, dict[str, Cell]]:
    """Return the cells of a comparison, by scenario and name of the count."""
    found = {}
    for scenario in scenarios(direction):
        said, seen = predicted(direction, scenario), recorded(f"{scenario}-{direction.target}")
        found[scenario] = {name: Cell(said[name], seen[name]) for name in COUNTS}
    return found


def times() -> list[str]:
    """Return the lines of a table of recorded and predicted times under both root policies of 6.1, on both CPUs."""
    measured = {row.file.removesuffix(".parquet"): row.guest_ns / 1e6 for row in provenance(CORPUS)}
    lines = ["| CPU | scenario | recorded under | ms | replayed under | predicted, ms | recorded, ms | error |"]
    lines += ["|-|-|-|-:|-|-:|-:|-:|"]
    for scenario in _TIMED:
        for cpu, new, old in (("AMD", "6.1", "6.1-async"), ("Intel", "6.1-ept", "6.1-async-ept")):
            for source, target, own, policy in ((old, new, "async", "preserve"), (new, old, "preserve", "async")):
                name, there = f"{scenario}-{source}", measured[f"{scenario}-{target}"]
                (vm,) = run.replay(plan.make(_evidence(name), [policy]), Settings()).times
                # The time that the VMM measures includes a little more than the vCPU's rows do.
                scale = measured[name] / sum(map(sum, vm.recorded))
                low, high = (scale * sum(vcpu.wall for vcpu in vm.outcomes[end].vcpus) for end in (0, -1))
                error = "within" if low < there < high else f"{(low if there <= low else high) / there - 1:+.0%}"
                said = f"{low:,.0f}" if low == high else f"{low:,.0f} .. {high:,.0f}"
                line = (cpu, scenario, own, f"{measured[name]:,.0f}", policy, said, f"{there:,.0f}", error)
                lines.append(f"| {' | '.join(line)} |")
    return lines


def document() -> str:
    """The text of docs/prediction-accuracy.md."""
    tables = {direction: table(direction) for direction in directions()}
    lines = [
        "# What replay predicts, and what happened",
        "",
        "Generated by `python -m benchmarks.accuracy` from the recordings in `traces/corpus`; a test keeps it so. Each",
        "recording is replayed under the policy of another of the same scenario, and compared with what the rows of",
        "that one say. One number: predicted exactly. `low .. high (n)`: predicted as an interval, recorded n.",
        "**Bold**: off, with the letter of the reason. A dash: that kernel's recordings do not show it. Counts: roots",
        "created, tables built, leaf installs (prefetched ones included), first accesses of a page under a role word,",
        "leaves zapped. Each recording stands for itself, too; two of ksm, notifier-storm, nx-recovery or",
        "slot-storm are not compared, as it depends on the host's speed how much it removes there.",
        "",
        "| recording of | replayed with | predicts | exact | in the interval | off | not recorded |",
        "|-|-|-|-:|-:|-:|-:|",
    ]
    for direction, rows in tables.items():
        verdicts = [cell.verdict for cells in rows.values() for cell in cells.values()]
        tally = " | ".join(str(verdicts.count(verdict)) for verdict in ("exact", "within", "off", "unseen"))
        lines.append(f"| {direction.source} | {_options(direction)} | {direction.target} | {tally} |")
    lines += ["", "## How long it takes", "", *_OF_TIMES, "", *times()]
    lines += ["", "## Reasons", "", *(f"- **{key}**: {why}" for key, why in REASONS.items())]
    for direction, rows in tables.items():
        lines += ["", f"## {direction.source} to {direction.target}: {_options(direction)}", ""]
        lines += ["| scenario | " + " | ".join(COUNTS) + " |", "|-|" + "-:|" * len(COUNTS)]
        for scenario, cells in rows.items():
            shown = (_shown(cell, reason(direction, scenario, name)) for name, cell in cells.items())
            lines.append(f"| {scenario} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _options(direction: Direction) -> str:
    return f"`{direction.options}`" if direction.options else "its own policy"


def _shown(cell: Cell, why: str) -> str:
    if cell.recorded is None:
        return "-"
    if cell.verdict == "off":
        return f"**{cell.predicted.text}, recorded {cell.recorded:,}** {why or '?'}"
    return cell.predicted.text if cell.verdict == "exact" else f"{cell.predicted.text} ({cell.recorded:,})"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
