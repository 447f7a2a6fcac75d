# SPDX-License-Identifier: Apache-2.0
"""Every scenario on every kernel: the recordings that are shipped, and the table of where they come from.

A cell is one scenario on one kernel with one of its MMUs, recorded to `SCENARIO[-PARAMETERS]-KERNEL[-MMU].parquet`;
cells of one kernel and MMU share a boot.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tracer import vmm
from tracer.lab import prebuilt, qemu
from tracer.lab.fetch import present
from tracer.lab.lab_cpus import AMD
from tracer.lab.lab_kernels import KERNELS, LabKernel, missing
from tracer.lab.session import DEFAULT_TIMEOUT, DEFAULT_TIMEOUT_INTEL, boot, compiled_probes, several
from traces import durable
from traces.command_line.layout import TextColumn
from traces.command_line.screen import Page
from traces.errors import BAD_INPUT, ENVIRONMENT, Problem
from traces.recording.compact import compact


@dataclass(frozen=True)
class LabMmu:
    """One of a kernel's MMUs: the CPU that it is recorded on, and the module parameters that choose it."""

    cpu: str
    parameters: tuple[str, ...] = ()


_FIGURES: Final = ("events", "lost", "roots", "tables", "faults", "leaves", "ms")
PROVENANCE: Final = "provenance.json"
TABLE: Final = "README.md"
# What a kernel's MMUs are called here, and the module parameters that choose them; TDP roots have no name. Direct
# shadow pages stand for guest-physical ranges, with NPT off they stand for the guest's own page tables.
TDP: Final = ""
DIRECT: Final = "shadow"
PAGING: Final = "npt0"
EPT: Final = "ept"
PML: Final = "pml"
NO_AD: Final = "eptad0"
PAGING_ON_INTEL: Final = "ept0"
MMUS: Final[Mapping[str, LabMmu]] = {
    TDP: LabMmu(AMD),
    DIRECT: LabMmu(AMD, ("kvm.tdp_mmu=0",)),
    PAGING: LabMmu(AMD, ("kvm_amd.npt=0",)),
    EPT: LabMmu("intel"),
    PML: LabMmu("intel-pml"),
    NO_AD: LabMmu("intel", ("kvm_intel.eptad=0",)),
    PAGING_ON_INTEL: LabMmu("intel", ("kvm_intel.ept=0",)),
}

EVENTS: Final = "mmu"
SECONDS_PER_CELL: Final = 30
SECONDS_PER_CELL_INTEL: Final = 120

# `storm` is for volume on software KVM; it adds to `roots` nothing but emulator events. The others are about who does
# what, which tests/lab/test_booking.py records; `apicv` needs hardware (docs/lab.md).
_LEFT_OUT: Final = ("storm", "other-thread", "late-vcpu", "one-mapping", "cross-fault", "apicv")
# Besides each scenario with its defaults; with the TDP MMU only, to keep what ships small.
_VARIATIONS: Final = (
    ("cr4-toggle", ("--bit", "pge")),
    ("dirty-log", ("--how", "clear")),
    ("dirty-log", ("--how", "ring")),
    ("dirty-log", ("--huge",)),
    ("idle", ("--how", "userspace")),
    ("notifier", ("--how", "dontneed")),
    ("notifier-storm", ("--how", "process")),
    ("slot-delete", ("--how", "leaves")),
)
# On Intel variations are of the first TDP MMU and of the reference only; of a variant, which differs in when roots go,
# those in which vCPUs give up roots, and one in which they do not. AMD's recordings have the rest.
_VARIED_ON_INTEL: Final = ("5.10", "6.1")
_GIVING_UP: Final = (
    "cr4-toggle", "efer-toggle", "mmio", "slot-delete", "slot-move", "smi-both", "smi-grow", "smi-one", "smi-storm",
    "steady", "two-vms", "wp-toggle",
)  # fmt: skip
# Kinds of trouble that do not depend on the root policy, with the TDP MMU. What the MMU does about them differs between
# kernels: an old one and the newest. How a guest leaves the kernel does not: an old one. (5.10 has no dirty
# rings; 7.3 never leaves the kernel with `lost-idt`: it injects the exception again at every entry.)
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("bar", "efault", "flash", "idle", "idle-how-userspace", "lost-idt", "mmio-poll", "not-emulated",
         "notifier-storm-how-process", "one-idle", "triple-fault"), ("6.1",)
    ),
    **dict.fromkeys(
        ("cow", "dirty-log-how-clear", "dirty-log-how-ring", "ksm", "notifier-storm", "nx-recovery", "slot-storm"),
        ("6.1", "7.x"),
    ),
    "slot-delete-how-leaves": ("6.12", "7.x"),
}  # fmt: skip
# Without A/D bits, and with page-modification logging, only those that write pages again or age them.
_DIRTYING: Final = ("dirty-log", "notifier", "smi-storm")
# With nested paging off only those in which pages of the guest's tables are found again, go out of sync, or are zapped.
_PAGING: Final = (
    "churn", "cr4-toggle", "efer-toggle", "notifier", "roots", "slot-delete", "smi-storm", "wp-toggle"
)  # fmt: skip
# Without EPT it is the same shadow MMU: those in which what the vendors do differently could show.
_NO_EPT: Final = ("churn", "roots", "slot-delete", "smi-storm", "wp-toggle")


@dataclass(frozen=True)
class Cell:
    """One recording to make: a scenario with its arguments on a kernel, with one of `MMUS`."""

    scenario: str
    arguments: tuple[str, ...]
    kernel: str
    mmu: str = TDP

    @property
    def name(self) -> str:
        """The name of the recording's file, without its ending."""
        return "-".join(filter(None, (self.what, self.kernel, self.mmu)))

    @property
    def what(self) -> str:
        """The scenario's name with its arguments, joined by dashes."""
        return "-".join((self.scenario, *(argument.lstrip("-") for argument in self.arguments)))


@dataclass(frozen=True)
class MatrixRow:
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
    emulator: str = ""  # with its version, from November 2026 on
    cpu: str = ""  # of `lab list`, the same


def cells(kernels: Mapping[str, Sequence[str]], scenarios: Sequence[str] = ()) -> list[Cell]:
    """Return the cells for these kernels (names of the table) with their MMUs, and these scenarios (default: all).

    Scenarios with other options than their defaults, and kinds of trouble, are recorded with the TDP MMU only. Kinds of
    trouble are recorded on the kernels of `KINDS`, unless they are asked for (then with their defaults: what their
    other options need may be missing on other kernels). With NPT off, only scenarios that show something there are
    recorded. Raises Problem for a scenario that does not exist.
    """
    listed = [scenario.name for scenario in vmm.scenarios()]
    for name in scenarios:
        if name not in listed:
            raise Problem(f"{name}: no such scenario; there are {', '.join(listed)}")
    wanted = scenarios or [name for name in listed if name not in _LEFT_OUT]
    pairs = [(name, ()) for name in wanted] + [(name, given) for name, given in _VARIATIONS if name in wanted]
    made = (
        Cell(name, arguments, kernel, mmu)
        for name, arguments in sorted(pairs)
        for kernel, mmus in kernels.items()
        for mmu in mmus
        if _telling(name, arguments, kernel, mmu)
    )
    return [
        cell
        for cell in made
        if cell.what not in KINDS
        or (cell.mmu == TDP and cell.kernel in KINDS[cell.what])
        or (scenarios and not cell.arguments)
    ]


def worth(kernel: LabKernel, cpus: Sequence[str]) -> tuple[str, ...]:
    """Return the MMUs of a kernel, on these CPUs, that are worth recording.

    A variant differs from its stock kernel in the TDP MMU only. What an Intel CPU does without A/D bits, with PML, and
    without EPT, where the guest's page tables are shadowed as without NPT, does not differ between kernels.
    """
    chosen = [name for name, mmu in MMUS.items() if mmu.cpu.partition("-")[0] in cpus]
    if kernel.variant:
        chosen = [name for name in chosen if name in (TDP, EPT)]
    return tuple(name for name in chosen if kernel.name == "6.1" or name not in (PML, NO_AD, PAGING_ON_INTEL))


def _telling(name: str, arguments: tuple[str, ...], kernel: str, mmu: str) -> bool:
    """Whether a scenario shows anything with an MMU that it does not show with others."""
    if mmu in (NO_AD, PML):
        return name in _DIRTYING and not arguments
    if mmu == EPT:
        given_up = name in _GIVING_UP or not KERNELS[kernel].variant
        return given_up and (not arguments or kernel in _VARIED_ON_INTEL)
    telling = {PAGING: _PAGING, PAGING_ON_INTEL: _NO_EPT}.get(mmu, (name,))
    return name in telling and (mmu == TDP or (not arguments and name not in KINDS))


def record(group: Sequence[Cell], directory: Path, events: str = EVENTS) -> tuple[list[MatrixRow], list[Problem]]:
    """Record cells of one kernel and one MMU in one boot; return the rows of those made, and what failed."""
    first = group[0]
    kernel = present(first.kernel)
    if kernel is None:
        raise missing(first.kernel)
    mmu = MMUS[first.mmu]
    parameters, on_amd = mmu.parameters, mmu.cpu == AMD
    problems: list[Problem] = []
    jobs = {cell.name: [str(vmm.binary()), cell.scenario, *cell.arguments] for cell in group}
    command, give = several(jobs, events, segments=not on_amd)
    limit, each = (DEFAULT_TIMEOUT, SECONDS_PER_CELL) if on_amd else (DEFAULT_TIMEOUT_INTEL, SECONDS_PER_CELL_INTEL)
    try:
        done = boot(
            kernel,
            command,
            cpu=mmu.cpu,
            probes=prebuilt.have(kernel) if on_amd else compiled_probes(kernel),
            give=give,
            into=directory,
            parameters=parameters,
            timeout=limit + each * len(group),
        )
    except Problem as problem:
        problems.append(problem)
    else:
        if done.signalled or done.code:
            said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            problems.append(Problem(f"{first.kernel}: {said}", done.code if done.code <= ENVIRONMENT else BAD_INPUT))
        problems += [Problem(f"{first.kernel}: the guest's kernel complained ({line})") for line in done.warnings[:1]]
    for recording in directory.glob("*.kvmt"):
        if recording.with_suffix(".parquet").name in {f"{cell.name}.parquet" for cell in group}:
            compact(recording, recording.with_suffix(".parquet"))
            shutil.rmtree(recording)
    rows = []
    for cell in group:
        path = directory / f"{cell.name}.parquet"
        said_by_vmm = path.with_suffix(".stdout")
        said = said_by_vmm.read_text() if said_by_vmm.is_file() else ""
        if path.is_file() and said:
            rows.append(examine(cell, path, kernel.package, (*kernel.parameters, *parameters), _guest_ns(said)))
        else:
            path.unlink(missing_ok=True)  # of a scenario that failed
            problems += [] if problems else [Problem(f"{cell.name}: not recorded")]
        said_by_vmm.unlink(missing_ok=True)
    return rows, problems


def _guest_ns(stdout: str) -> int:
    """Return how long the passes took, as the VMM reports it in its line of JSON."""
    return int(json.loads(stdout.splitlines()[-1])["wall_ns"])


def examine(cell: Cell, path: Path, package: str, parameters: tuple[str, ...], guest_ns: int) -> MatrixRow:
    """Return the row of provenance for a recording that was just made."""
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
    return MatrixRow(
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
        emulator=str(trace.metadata.raw["lab"].get("emulator", "")),
        cpu=str(trace.metadata.raw["lab"].get("cpu", "")),
    )


def fill(
    wanted: Iterable[Cell], directory: Path, say: Callable[[str], None], jobs: int = 1
) -> tuple[list[MatrixRow], list[Problem]]:
    """Make the recordings that are not in `directory` yet, and update its provenance after each boot.

    There is one boot for each kernel and MMU, `jobs` of them at a time; a failed one does not keep the others from
    being recorded. Returns the rows of all `wanted` cells that are there, and what failed.
    """
    rows = {row.file: row for row in provenance(directory) if (directory / row.file).is_file()}
    problems: list[Problem] = []
    wanted = list(wanted)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in wanted:
        file = f"{cell.name}.parquet"
        if file not in rows:
            groups.setdefault((cell.kernel, cell.mmu), []).append(cell)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(record, group, directory): name for name, group in groups.items()}
        try:
            for number, done in enumerate(as_completed(running), 1):
                made, failed = _outcome(done)
                problems += failed
                rows |= {row.file: row for row in made}
                _write(directory, [rows[name] for name in sorted(rows)])
                said = " ".join(filter(None, running[done]))
                say(f"{number}/{len(groups)} {said}: {len(made)} recordings")
        except BaseException:
            # The pool would wait for boots of several minutes. Again and again: one may be about to start.
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(boot.done() for boot in running):
                qemu.kill_running()
                time.sleep(0.05)
            raise
    return [rows[file] for file in (f"{cell.name}.parquet" for cell in wanted) if file in rows], problems


def _outcome(done: Future[tuple[list[MatrixRow], list[Problem]]]) -> tuple[list[MatrixRow], list[Problem]]:
    try:
        return done.result()
    except Problem as problem:
        return [], [problem]


def provenance(directory: Path) -> list[MatrixRow]:
    """Return the recordings that `directory` says it has; none where it has no provenance yet."""
    path = directory / PROVENANCE
    if not path.is_file():
        return []
    try:
        recordings = json.loads(path.read_text())["recordings"]
        return [MatrixRow(**{name: _tuple(value) for name, value in entry.items()}) for entry in recordings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path}: not a table of provenance ({error})") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _write(directory: Path, rows: list[MatrixRow]) -> None:
    recordings = ",\n".join(json.dumps(asdict(row), separators=(",", ":")) for row in rows)  # a line each, for diffs
    provenance = f'{{"schema": 1, "recordings": [\n{recordings}\n]}}\n'
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
    for name, text in ((PROVENANCE, provenance), (TABLE, "\n".join(lines) + "\n")):
        try:
            durable.write_file(directory / name, text.encode())
        except OSError as error:
            raise Problem(f"{directory / name}: cannot be written: {error.strerror}: it is as it was") from None


def render(rows: Sequence[MatrixRow]) -> str:
    """Return the rows as a table for a terminal."""
    body = [
        [
            row.file.removesuffix(".parquet"),
            row.policy,
            *(f"{figure:,}" for figure in (row.events, row.lost, row.roots, row.tables, row.faults, row.leaves)),
            f"{row.guest_ns / 1e6:,.0f}",
        ]
        for row in rows
    ]
    page = Page()
    names = [TextColumn(title, right=False) for title in ("recording", "policy")]
    page.table([*names, *map(TextColumn, _FIGURES)], body)
    return page.text
