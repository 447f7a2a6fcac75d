"""Every scenario on every kernel: the recordings that are shipped, and the table of where they come from.

A cell is one boot that records one scenario; its file is `SCENARIO[-PARAMETERS]-KERNEL[-shadow].parquet`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tracer import vmm
from tracer.lab.fetch import present
from tracer.lab.kernels import KERNELS, missing
from tracer.lab.session import boot, recorder
from traces.errors import BAD_INPUT, Problem

PROVENANCE: Final = "provenance.json"
TABLE: Final = "README.md"
SHADOW: Final = "kvm.tdp_mmu=0"

# `storm` is for volume on software KVM; it adds to `roots` nothing but emulator events.
_LEFT_OUT: Final = ("storm",)
# Besides each scenario with its defaults.
_VARIATIONS: Final = (
    ("cr4-toggle", ("--bit", "pge")),
    ("dirty-log", ("--huge",)),
    ("notifier", ("--how", "dontneed")),
)


@dataclass(frozen=True)
class Cell:
    """One recording to make: a scenario with its arguments on a kernel, with the TDP MMU or the shadow MMU."""

    scenario: str
    arguments: tuple[str, ...]
    kernel: str
    shadow: bool = False

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        values = "-".join(argument.lstrip("-") for argument in self.arguments)
        return "-".join(filter(None, (self.scenario, values, self.kernel, "shadow" if self.shadow else "")))


@dataclass(frozen=True)
class Row:
    """A recording's line of provenance.

    `kinds` counts the stored events by kind; of them `faults` are page faults, `leaves` leaf installs, `tables` table
    pages created (5.10 does not trace those of TDP roots); `roots` is how many roots there were. `guest_ns` is how long
    the passes took under the recorder and under emulation.
    """

    file: str
    scenario: str
    arguments: tuple[str, ...]
    kernel: str
    package: str
    release: str
    policy: str
    parameters: tuple[str, ...]
    recorder: str
    events: int
    lost: int
    roots: int
    tables: int
    faults: int
    leaves: int
    guest_ns: int
    kinds: dict[str, int]
    bytes: int
    sha256: str


def cells(kernels: Sequence[str], scenarios: Sequence[str] = (), *, shadow: bool = True) -> list[Cell]:
    """The cells for these kernels (names of the table) and scenarios (all by default).

    With `shadow`, each twice, except on a kernel that only differs in what the shadow MMU does not use. Raises Problem
    for a name that is not there.
    """
    listed = [scenario.name for scenario in vmm.scenarios()]
    for name in scenarios:
        if name not in listed:
            raise Problem(f"{name}: no such scenario; there are {', '.join(listed)}")
    wanted = scenarios or [name for name in listed if name not in _LEFT_OUT]
    pairs = [(name, ()) for name in wanted] + [(name, given) for name, given in _VARIATIONS if name in wanted]
    return [
        Cell(name, arguments, kernel, is_shadow)
        for name, arguments in sorted(pairs)
        for kernel in kernels
        for is_shadow in ((False, True) if shadow and not KERNELS[kernel].variant else (False,))
    ]


def record(cell: Cell, directory: Path) -> Row:
    """Make one recording in `directory`. Raises Problem when the guest, the scenario or the recorder fails."""
    kernel = present(cell.kernel)
    if kernel is None:
        raise missing(cell.kernel)
    path = directory / f"{cell.name}.parquet"
    command = recorder([str(vmm.binary()), cell.scenario, *cell.arguments], "mmu")
    parameters = (SHADOW,) if cell.shadow else ()
    done = boot(kernel, command, trace=path, parameters=parameters)
    if done.signalled or done.code or not path.is_file():
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise Problem(f"{cell.name}: not recorded ({said})", done.code if done.code <= BAD_INPUT else BAD_INPUT)
    if done.warnings:
        raise Problem(f"{cell.name}: the guest's kernel complained ({done.warnings[0]})")
    return examine(cell, path, kernel.package, (*kernel.parameters, *parameters), _guest_ns(done.stdout))


def _guest_ns(stdout: str) -> int:
    """How long the passes took, as the VMM reports it in its line of JSON."""
    return int(json.loads(stdout.splitlines()[-1])["wall_ns"])


def examine(cell: Cell, path: Path, package: str, parameters: tuple[str, ...], guest_ns: int) -> Row:
    """The line of provenance for a recording that was just made."""
    import pyarrow.compute as pc

    from traces.reader import Trace

    trace = Trace.open(path)
    roots: set[int] = set()
    tables = 0
    for batch in trace.batches(["kind", "root", "flags"]):
        roots.update(root for root in pc.unique(batch["root"]).to_pylist() if root)
        created = pc.and_(pc.equal(batch["kind"], "kvm_mmu_get_page"), pc.equal(pc.bit_wise_and(batch["flags"], 1), 1))
        tables += pc.sum(created).as_py() or 0
    kinds = trace.counts()
    return Row(
        file=path.name,
        scenario=cell.scenario,
        arguments=cell.arguments,
        kernel=cell.kernel,
        package=package,
        release=str(trace.metadata.raw["host"]["kernel"]),
        policy=trace.metadata.policy,
        parameters=parameters,
        recorder=str(trace.metadata.raw["recorder"]),
        events=trace.metadata.events,
        lost=trace.metadata.lost,
        roots=len(roots),
        tables=tables,
        faults=kinds.get("kvm_page_fault", 0),
        leaves=kinds.get("kvm_mmu_set_spte", 0),
        guest_ns=guest_ns,
        kinds=dict(kinds),
        bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def fill(
    wanted: Iterable[Cell],
    directory: Path,
    say: Callable[[str], None],
) -> tuple[list[Row], list[Problem]]:
    """Make those of the recordings that are not in `directory` yet, and bring its provenance up to date each time.

    A failed cell does not keep the others from being recorded. Returns the rows of all `wanted` cells that are there,
    and what failed.
    """
    rows = {row.file: row for row in provenance(directory) if (directory / row.file).is_file()}
    problems: list[Problem] = []
    wanted = list(wanted)
    for number, cell in enumerate(wanted, 1):
        file = f"{cell.name}.parquet"
        if file in rows:
            continue
        say(f"{number}/{len(wanted)} {cell.name}")
        try:
            rows[file] = record(cell, directory)
        except Problem as problem:
            problems.append(problem)
            continue
        _write(directory, [rows[name] for name in sorted(rows)])
    return [rows[file] for file in (f"{cell.name}.parquet" for cell in wanted) if file in rows], problems


def provenance(directory: Path) -> list[Row]:
    """The recordings that `directory` says it has; none when it has no provenance yet."""
    path = directory / PROVENANCE
    if not path.is_file():
        return []
    try:
        recordings = json.loads(path.read_text())["recordings"]
        return [Row(**{name: _tuple(value) for name, value in entry.items()}) for entry in recordings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path}: not a table of provenance ({error})") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _write(directory: Path, rows: list[Row]) -> None:
    document = {"schema": 1, "recordings": [asdict(row) for row in rows]}
    (directory / PROVENANCE).write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# Recordings of the kernel lab",
        "",
        "Made by `kvmtrace lab matrix -o DIRECTORY`; `provenance.json` has every count and SHA-256. Times are of the",
        "scenario's passes, recorded and under emulation: compare them with each other, not with hardware.",
        "",
        "| recording | kernel package | policy | recorder | events | lost | roots | tables | faults | leaves | ms |",
        "|-|-|-|-|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        figures = (row.events, row.lost, row.roots, row.tables, row.faults, row.leaves, round(row.guest_ns / 1e6))
        texts = (row.file.removesuffix(".parquet"), row.package, row.policy, row.recorder)
        lines.append(f"| {' | '.join((*texts, *(f'{figure:,}' for figure in figures)))} |")
    (directory / TABLE).write_text("\n".join(lines) + "\n")


def render(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    heads = ("recording", "policy", "events", "lost", "roots", "tables", "faults", "leaves", "ms")
    body = [
        (
            row.file.removesuffix(".parquet"),
            row.policy,
            *(f"{figure:,}" for figure in (row.events, row.lost, row.roots, row.tables, row.faults, row.leaves)),
            f"{row.guest_ns / 1e6:,.0f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (heads, *body)) for column in range(len(heads))]
    text = ""
    for line in (heads, *body):
        padded = [f"{word:{'<' if column < 2 else '>'}{widths[column]}}" for column, word in enumerate(line)]
        text += "  ".join(padded).rstrip() + "\n"
    return text
