"""Foretelling: each recording of the corpus replayed under the policy of another, and compared with that one's counts.

    python -m replay.foretell            # writes docs/foretelling.md

Both recordings are of one scenario, which does the same in every run, under two policies or on two kernels. What was
recorded is counted from the rows, without the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import polars as pl

from replay import bounds, plan, run
from replay.bounds import Count
from replay.evidence import Evidence
from traces.reader import Trace

ROOT: Final = Path(__file__).parents[1]
CORPUS: Final = ROOT / "traces" / "corpus"
DOCUMENT: Final = ROOT / "docs" / "foretelling.md"
COUNTS: Final = ("roots", "tables", "installs", "first touches", "zaps")
_PRESENT: Final = 1 << 11
_LARGE: Final = 1 << 7


@dataclass(frozen=True)
class Direction:
    """A recording of kernel `source` replayed with these options, to foretell that of `target`."""

    source: str
    target: str
    policy: str = ""
    kernel: str = ""
    refault: str = ""

    @property
    def options(self) -> str:
        """As on the command line; empty: its own policy."""
        given = {"--policy": self.policy, "--kernel": self.kernel, "--refault": self.refault}
        return " ".join(f"{option} {value}" for option, value in given.items() if value)


@dataclass(frozen=True)
class Cell:
    """One count: as foretold and as recorded. `recorded` None: that kernel's recordings do not show it."""

    foretold: Count
    recorded: int | None

    @property
    def verdict(self) -> str:
        """exact, within (an interval), off, or unseen."""
        if self.recorded is None:
            return "unseen"
        if self.recorded not in self.foretold:
            return "off"
        return "exact" if self.foretold.low == self.foretold.high else "within"


KERNELS: Final = ("5.10", "6.1", "6.1-async", "6.12", "7.x")
SHADOWS: Final = ("5.10-shadow", "6.1-shadow", "6.12-shadow", "7.x-shadow")


def directions() -> Iterator[Direction]:
    """Every direction of the table."""
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
    """The scenarios that both kernels have recordings of."""

    def of(kernel: str) -> set[str]:
        suffix = f"-{kernel}.parquet"
        return {path.name.removesuffix(suffix) for path in CORPUS.glob(f"*{suffix}")}

    return sorted(of(direction.source) & of(direction.target))


@cache
def _evidence(name: str) -> Evidence:
    return Evidence(Trace.open(CORPUS / f"{name}.parquet"))


def foretold(direction: Direction, scenario: str) -> dict[str, Count]:
    """What the replay says of the target's counts."""
    evidence = _evidence(f"{scenario}-{direction.source}")
    names = [direction.policy] if direction.policy else []
    if not names and not direction.kernel:
        names = [evidence.own.name]
    assumed = plan.refault(direction.refault)
    found = bounds.counts(run.replay(plan.make(evidence, names, direction.kernel, assumed)).outcomes, assumed)

    def added(one: str, other: str, sign: int = 1) -> Count:
        a, b = found[one], found[other]
        ends = a.low + sign * b.low, a.high + sign * b.high
        return Count(min(ends), max(ends))

    return {
        "roots": found["creations"],
        "tables": found["tables_built"],
        "installs": added("faults", "prefetched"),
        "first touches": added("faults", "refaults", -1),
        "zaps": found["zapped"],
    }


@cache
def recorded(name: str) -> dict[str, int | None]:
    """What a recording's rows say, counted without the model."""
    evidence = _evidence(name)
    trace = evidence.trace
    rows = trace.scan().with_columns(pl.col("kind").cast(pl.String)).sort("seq")
    kind = pl.col("kind")
    built = rows.filter(kind == "kvm_mmu_get_page", pl.col("flags") & 1 == 1, pl.col("root") == 0)
    set_ = kind.is_in(["kvm_mmu_set_spte", "mark_mmio_spte"])
    request = pl.when(kind == "kvm_mmu_spte_requested").then(pl.col("gfn")).forward_fill().over("tid")
    present = pl.when(kind == "kvm_page_fault").then(pl.col("code") & 1 == 1).forward_fill().over("tid")
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
            # 5.10 tells of one MMIO SPTE twice.
            again=(pl.col("gfn") == pl.col("gfn").shift(1))
            & (kind.shift(1) == "mark_mmio_spte")
            & (kind != "mark_mmio_spte"),
            asked=(pl.col("gfn") == pl.col("request")) | (kind == "mark_mmio_spte"),
        )
        .filter(~pl.col("again").fill_null(False))
        .collect()
    )
    first = int((sets["first"] & sets["asked"]).sum())
    installs: int | None = int((~sets["present"] | sets["first"]).sum())
    zaps: int | None = None
    if evidence.has("kvm_tdp_mmu_spte_changed") and not evidence.shadow:
        spte = trace.metadata.raw["layout"]["spte"]
        gone = [0, spte["nonpresent"], spte["frozen"]]
        leaf = pl.col("level") == 1
        changed = rows.filter(kind == "kvm_tdp_mmu_spte_changed")
        was = ~pl.col("old").is_in(gone) & (leaf | (pl.col("old") & _LARGE != 0))
        now = ~pl.col("new").is_in(gone) & (leaf | (pl.col("new") & _LARGE != 0))
        zaps = changed.filter(was, pl.col("old") & _PRESENT != 0, pl.col("new").is_in(gone)).collect().height
        installs = changed.filter(now, pl.col("old").is_in(gone)).collect().height
    return {
        "roots": trace.metadata.root_count,
        "tables": built.collect().height,
        "installs": installs,
        "first touches": first,
        "zaps": zaps,
    }


def table(direction: Direction) -> dict[str, dict[str, Cell]]:
    """Each scenario's cells."""
    found = {}
    for scenario in scenarios(direction):
        said, seen = foretold(direction, scenario), recorded(f"{scenario}-{direction.target}")
        found[scenario] = {name: Cell(said[name], seen[name]) for name in COUNTS}
    return found
