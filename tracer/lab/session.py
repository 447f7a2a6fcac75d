# SPDX-License-Identifier: Apache-2.0
"""One boot of a lab guest: what it is given, what it runs, and what it hands back, such as compiled probes."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer import vmm
from tracer.lab import closure, prebuilt
from tracer.lab.bochs import BochsMachine, emulator
from tracer.lab.bochs import run as run_bochs
from tracer.lab.initramfs import build, compiled
from tracer.lab.lab_cpus import AMD, CPUS, LabCpu, lab_cpu, qemu_version
from tracer.lab.lab_kernels import Bootable
from tracer.lab.modules import Directory, load_order
from tracer.lab.qemu import Ending, LabMachine, run
from tracer.probing.kept import SUFFIX
from traces.errors import BAD_INPUT, ENVIRONMENT, Problem
from traces.kernels.vendors import OFF

# Where init.c mounts the share in the guest.
SHARE: Final = "/mnt/lab"
TRACE: Final = "out.parquet"
JOBS: Final = "jobs.json"
_KEPT: Final = (".parquet", ".kvmt", ".stdout", ".dat", ".data")
SPACE_NEEDED: Final = 256 << 20
DEFAULT_MEMORY: Final = 2048
_TIMEOUT_PROBES: Final = 600.0  # seconds: on a busy machine clang under emulation takes minutes
# Ten times what a recording takes on an idle machine: a busy one is no reason to give up.
DEFAULT_TIMEOUT: Final = 600.0
DEFAULT_TIMEOUT_INTEL: Final = 1200.0  # Bochs interprets

_PARAMETER: Final = re.compile(r"([\w-]+)\.(\w+=\S*)")
_WARNING: Final = re.compile(r"WARNING: |BUG: |Oops|INFO: task |rcu: INFO: |unknown parameter")


class GuestFailed(Problem):
    """The guest did not do its work; `tail` is what it last said on its console, a line each."""

    def __init__(self, message: str, tail: Sequence[str], code: int = BAD_INPUT) -> None:
        super().__init__(message, code)
        self.tail = tuple(tail)


@dataclass(frozen=True)
class Finished:
    """How a command in the guest ended; `seconds` is its wall time there, `warnings` its kernel's complaints."""

    signalled: bool
    code: int
    seconds: float
    stdout: str
    stderr: str
    warnings: tuple[str, ...]


def recorder(workload: Sequence[str], events: str) -> list[str]:
    """Return the command that records `workload` in the guest, with the interpreter that runs this process."""
    return [sys.executable, "-m", "kvmtrace", "record", "-o", f"{SHARE}/{TRACE}", "--events", events, "--", *workload]


def several(
    jobs: Mapping[str, Sequence[str]], events: str, *, segments: bool, shown: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Return the command that records several workloads in the guest, each by its name, and the file it needs.

    `segments` leaves compacting to this machine; what a workload prints is `shown`, else in a .stdout file.
    """
    asked = [{"out": f"{SHARE}/{name}.parquet", "command": list(command)} for name, command in jobs.items()]
    text = json.dumps({"events": events, "jobs": asked, "segments": segments, "shown": shown})
    return [sys.executable, "-m", "tracer.several", f"{SHARE}/{JOBS}"], {JOBS: text}


def boot(
    kernel: Bootable,
    command: Sequence[str],
    *,
    cpu: str = AMD,
    probes: Path | None = None,
    trace: Path | None = None,
    give: Mapping[str, str] | None = None,
    into: Path | None = None,
    parameters: Sequence[str] = (),
    memory: int = DEFAULT_MEMORY,
    nodes: int = 1,
    timeout: float = DEFAULT_TIMEOUT,
    follow: bool = False,
) -> Finished:
    """Boot `kernel`, run `command` and power off; for AMD the host's file system is the guest's.

    An Intel guest has of it what recording needs, and the programs that the command names. `probes` are compiled ones
    to record with; those that the guest compiles itself are kept for the next. `trace` is where the trace that the
    command recorded is moved to; `give` are files to put in the share by name, and `into` is a directory that takes
    every trace, recording, .stdout file and file of trace-cmd or perf (.dat, .data) from there; `parameters` are
    module parameters (kvm.tdp_mmu=0) after the kernel's own; `memory` in MiB, of an AMD guest on one NUMA node or two
    (`nodes`); `timeout` in seconds for the whole boot; `follow` passes the command's output on as it comes, an Intel
    guest's at the end. Whether a failed command is an error is for the caller to decide.

    Raises Problem when something is missing to begin with, GuestFailed when the guest did not get to the end.
    """
    machine = lab_cpu(cpu)
    given = _by_module((*kernel.parameters, *parameters))
    tree = Directory(*kernel.modules)
    loaded = load_order(tree, machine.wanted)
    if not machine.runs(tree):
        raise Problem(
            f"kernel {kernel.name} has no {machine.kvm.replace('_', '-')}.ko here: kvmtrace lab fetch {kernel.name} "
            "--update, or give --modules",
            ENVIRONMENT,
        )
    for module in given:
        if "kvm" in loaded and module not in loaded:
            raise Problem(f"--param {module}.{given[module]}: a lab guest loads no module {module}")
    emulated = emulator() if machine.model else None
    with tempfile.TemporaryDirectory(prefix="kvmtrace-lab-") as directory:
        work = Path(directory)
        free = shutil.disk_usage(work).free
        if free < SPACE_NEEDED:
            raise Problem(
                f"{work.parent}: {free >> 20} MiB free, {SPACE_NEEDED >> 20} needed: make room or set TMPDIR",
                ENVIRONMENT,
            )
        share = work / "share"
        share.mkdir()
        shown = str(emulated) if emulated else f"QEMU {qemu_version()}".strip()
        _ask(share, command, _environment(kernel, machine, shown, given))
        for name, text in (give or {}).items():
            (share / name).write_text(text)
        files = closure.beside(prebuilt.GUEST, (probes,)) if probes else {}
        if emulated:
            files |= _everything(command, share)
        initrd = build(tree, given, compiled("init", work), machine.wanted, files)
        on_command_line = tuple(f"{module}.{one}" for module, several in given.items() for one in several.split())
        output = _Output(share, trace) if follow else None
        tick = output.pass_on if output else lambda: None
        if emulated:
            bochs = BochsMachine(kernel.image, initrd, memory, machine.model, on_command_line)
            ending = run_bochs(bochs.prepare(work, emulated), work, share, timeout, tick)
            console = work / "console"
        else:
            console, packed = work / "serial", work / "initrd"
            packed.write_bytes(initrd)
            on_qemu = LabMachine(kernel.image, packed, share, memory, on_command_line, nodes, machine.counts)
            ending = run(on_qemu.command(), console, timeout, tick)
        if output:
            output.pass_on()
        finished = _result(share) if ending is Ending.ORDERLY else None
        kept = _take(share, trace) if trace else None
        if into:
            for made in (found for ending in _KEPT for found in share.glob(f"*{ending}")):
                shutil.move(made, into / made.name)
        if not probes:
            prebuilt.keep(kernel, share.glob(f"*{SUFFIX}"))
        if finished is None:
            said = console.read_bytes() if console.is_file() else b""
            raise _failure(kernel, ending, said, timeout, kept, machine)
        return finished


def compiled_probes(kernel: Bootable) -> Path:
    """Return the file of a kernel's probes; if there is none, a guest compiles them (half a minute of CPU time).

    Raises Problem where it cannot.
    """
    if found := prebuilt.have(kernel):
        return found
    done = boot(kernel, [sys.executable, "-m", "kvmtrace", "probes", "build"], timeout=_TIMEOUT_PROBES)
    if found := prebuilt.have(kernel):
        return found
    said = (done.stderr.strip().splitlines() or ["without a word"])[-1].removeprefix("kvmtrace: ")
    raise Problem(f"kernel {kernel.name}: its probes were not compiled: {said}", ENVIRONMENT)


def _everything(command: Sequence[str], share: Path) -> closure.Entries:
    """Return all files for a guest that sees nothing of this machine: those that the command and recording read."""
    wanted = closure.of_recorder() if command[0] == sys.executable else []
    for word in (*command, str(vmm.binary())):
        if program := shutil.which(word) if os.access(word, os.X_OK) or word == command[0] else None:
            wanted += closure.of_program(Path(program))
    empty = dict.fromkeys(("/proc", "/sys", "/tmp", "/run", "/root", str(Path.cwd())), (stat.S_IFDIR | 0o755, b""))
    return {**empty, **closure.gather(wanted), **closure.beside(SHARE, share.iterdir())}


def _by_module(parameters: Iterable[str]) -> dict[str, str]:
    """Return parameters as insmod takes them, "a=1 b=2", by module; of one given twice the last counts there."""
    given: dict[str, str] = {}
    for parameter in parameters:
        parts = _PARAMETER.fullmatch(parameter)
        if not parts:
            raise Problem(f"--param {parameter}: not of the form MODULE.PARAMETER=VALUE, such as kvm.tdp_mmu=0")
        module = parts[1].replace("-", "_")
        given[module] = f"{given.get(module, '')} {parts[2]}".strip()
    return given


def _value(given: dict[str, str], module: str, parameter: str) -> str:
    return dict(one.split("=", 1) for one in given.get(module, "").split()).get(parameter, "")


def _environment(kernel: Bootable, machine: LabCpu, emulated_by: str, given: dict[str, str]) -> dict[str, str]:
    switches = (("kvm", "tdp_mmu"), ("kvm_amd", "npt"), ("kvm_intel", "ept"))
    off = any(_value(given, *one) in OFF for one in switches)
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        # What has our modules, of a checkout as well as of an installed package, then what we were given ourselves.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # it would go to the tmpfs and be lost
        # For the trace's provenance: the release of a kernel with replaced modules does not tell it from the stock one.
        "KVMTRACE_LAB_KERNEL": kernel.name,
        "KVMTRACE_LAB_PACKAGE": kernel.package,
        "KVMTRACE_LAB_POLICY": "shadow" if off else kernel.policy,
        "KVMTRACE_LAB_CPU": machine.name,
        "KVMTRACE_LAB_EMULATOR": emulated_by,
        "KVMTRACE_PROBES": prebuilt.GUEST,
    }


def _ask(share: Path, command: Sequence[str], environment: dict[str, str]) -> None:
    (share / "argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in command))
    pairs = (os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    (share / "environ").write_bytes(b"".join(pairs))
    (share / "cwd").write_bytes(os.fsencode(Path.cwd()))


def _result(share: Path) -> Finished | None:
    """Return what the guest left in the share; None where it left nothing, as after an error of QEMU's own."""
    if not (share / "status").is_file():
        return None
    how, code, seconds = (share / "status").read_text().split()
    log = _text(share / "dmesg").splitlines()
    return Finished(
        how == "signal",
        int(code),
        float(seconds),
        _text(share / "stdout"),
        _text(share / "stderr"),
        tuple(re.sub(r"^<\d+>", "", line) for line in log if _WARNING.search(line)),
    )


def _take(share: Path, trace: Path) -> Path | None:
    """Move the trace, or the segments of a recording that was cut short, out of the share; return where it is now."""
    for made, kept in ((share / TRACE, trace), ((share / TRACE).with_suffix(".kvmt"), trace.with_suffix(".kvmt"))):
        if made.exists():
            try:
                shutil.move(made, kept)
            except OSError as error:
                raise Problem(f"{kept}: {error.strerror}") from None
            return kept
    return None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


class _Output:
    """The command's output files in the share, passed on to our own as they grow."""

    def __init__(self, share: Path, trace: Path | None) -> None:
        self.files = {share / "stdout": sys.stdout, share / "stderr": sys.stderr}
        self.trace = str(trace or "")
        self.read = dict.fromkeys(self.files, 0)

    def pass_on(self) -> None:
        for path, stream in self.files.items():
            if not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(self.read[path])
                new = file.read()
            self.read[path] += len(new)
            stream.write(new.decode(errors="replace").replace(f"{SHARE}/{TRACE}", self.trace))
            stream.flush()


def _failure(
    kernel: Bootable,
    ending: Ending,
    serial: bytes,
    timeout: float,
    kept: Path | None = None,
    machine: LabCpu = CPUS[AMD],
) -> GuestFailed:
    """Return the error for a guest that did not do its work; its init says the cause on the console."""
    lines = [line.strip() for line in serial.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line and "TCG doesn't support requested feature" not in line]
    cause = next((line.split(": ", 1)[1] for line in reversed(lines) if line.startswith("kvmtrace-lab: ")), "")
    who = f"kernel {kernel.name}"
    vendor, extension = ("Intel", "VMX") if machine.model else ("AMD", "SVM")
    if ending is Ending.MODULE_REFUSED and machine.kvm in cause:
        message = f"{who}: no {extension} for its KVM ({cause}): a lab guest needs KVM with {vendor} support"
    elif ending is Ending.MODULE_REFUSED:
        message = f"{who}: {cause}: --modules and --kvm-modules must be of the very build of the image"
    elif ending is Ending.MOUNT_REFUSED:
        message = f"{who}: {cause}: it needs 9p over virtio and overlay, built in or in --modules DIR"
    elif ending is Ending.NO_KVM:
        message = f"{who}: no /dev/kvm in it: it needs KVM for {vendor}, built in or in --modules DIR"
    elif ending is Ending.TIMEOUT:
        message = f"{who}: the guest did not end within {timeout:g} s and was killed: --timeout gives it longer"
    elif ending is Ending.PANIC:
        panic = next((line for line in lines if "Kernel panic" in line or "Oops" in line), "no message on its console")
        message = f"{who}: the guest panicked or reset ({re.sub(r'^.*?] ', '', panic)})"
    elif ending is Ending.NO_COMMAND:
        message = f"{who}: {cause or 'the guest could not start the command'}"
    else:
        message = f"{who}: {'Bochs' if machine.model else 'QEMU'} gave up ({lines[-1] if lines else 'without a word'})"
    code = ENVIRONMENT if ending in (Ending.EMULATOR_FAILED, Ending.ORDERLY) else BAD_INPUT
    if kept:
        message += f"; what was recorded until then: kvmtrace recover {kept}"
    return GuestFailed(message, lines[-12:], code)
