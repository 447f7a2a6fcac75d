# SPDX-License-Identifier: Apache-2.0
"""One Bochs process: an Intel machine whose KVM has EPT; QEMU's emulation knows AMD's SVM only.

Bochs has neither a usable boot loader nor 9p: a boot sector of ours reads kernel and initramfs, what the guest needs of
this machine is in the initramfs, and results leave through a port that Bochs copies to its standard output. Bochs is
deterministic: the clock that the guest sees is the count of its instructions.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer.lab import qemu
from tracer.lab.bzimage import unpack
from tracer.lab.qemu import Ending
from traces.errors import ENVIRONMENT, Problem

VARIABLE: Final = "KVMTRACE_BOCHS"
PROGRAM: Final = "bochs-bin"  # Debian's `bochs` is a script around it that asks for a terminal
INSTALL: Final = "apt-get install bochs bochsbios vgabios binutils gcc libc6-dev"
BIOS: Final = (Path("/usr/share/bochs/BIOS-bochs-latest"), Path("/usr/share/vgabios/vgabios.bin"))
_TELLS_ITS_CLOCK: Final = "skylake"  # tells 3.5 GHz by CPUID 15h, which the kernel would take for the TSC's

INSTRUCTIONS_PER_SECOND: Final = 50_000_000  # of the guest's clock: more would make each wait cost more, less each tick
CLOCK_AT_START: Final = 1767225600  # 2026-01-01: two runs see the same dates
# Hides RDRAND and RDSEED, by the kernel's numbers of these features. Bochs seeds them by the host's time: what the
# kernel and Python place at random would differ from run to run.
_NO_CHANCE: Final = "clearcpuid=158,306"
_SECTOR: Final = 512
_FIRST_SECTOR: Final = 64
_PARAMETERS, _COMMAND_LINE = 0x10000, 0x11000  # where boot.S expects them
_TABLE: Final = 0x1C0
_HEADS, _PER_TRACK = 16, 63
_ALIGNMENT: Final = 2 << 20
_FILE: Final = re.compile(rb"\x01FILE ([^\n]{1,400}) (\d{1,12})\n")
_END: Final = re.compile(rb"\x01END (\d)\n")


@dataclass(frozen=True)
class Emulator:
    """A Bochs program: where it is, and what its build makes necessary."""

    program: str
    version: str
    has_debugger: bool  # Debian's: it waits for commands
    fills_memory: bool  # files of any size can be put into the guest's memory: see docs/lab.md

    def __str__(self) -> str:
        return f"Bochs {self.version}".strip()


def emulator() -> Emulator:
    """Return the Bochs of $KVMTRACE_BOCHS, else the distribution's. Raises Problem without it or its firmware."""
    given = os.environ.get(VARIABLE)
    program = given or PROGRAM
    try:
        said = _asked(program, "--help")
    except OSError as error:
        if given:
            raise Problem(f"{VARIABLE}: {given}: {error.strerror}") from None
        raise Problem(f"no {PROGRAM}: {INSTALL}", ENVIRONMENT) from None
    for path in BIOS:
        if not path.is_file():
            raise Problem(f"no {path}: {INSTALL}", ENVIRONMENT)
    if "-benchmark" not in said:
        raise Problem(f"{program}: not a Bochs emulator", ENVIRONMENT)
    version = re.search(r"Bochs x86 Emulator (\S+)", said + _asked(program, "--help", "cpu"))
    return Emulator(program, version[1] if version else "", "-rc filename" in said, fills_memory=bool(given))


def _asked(program: str, *words: str) -> str:
    command = [program, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


@dataclass(frozen=True)
class BochsMachine:
    """A machine for Bochs: `memory` in MiB, `model` is Bochs's name of the CPU, `parameters` are the kernel's."""

    image: Path
    initrd: bytes
    memory: int
    model: str
    parameters: tuple[str, ...] = ()

    def prepare(self, work: Path, bochs: Emulator) -> list[str]:
        """Write all that Bochs reads into `work`; return the argv that runs it. Raises Problem as `unpack`."""
        kernel = unpack(self.image)
        at = -(-kernel.end // _ALIGNMENT) * _ALIGNMENT + (32 << 20)
        if at + len(self.initrd) > (self.memory - 64) << 20:
            raise Problem(f"--memory {self.memory}: the guest's files alone take {len(self.initrd) >> 20} MiB")
        early = (f"tsc_early_khz={INSTRUCTIONS_PER_SECOND // 1000}",) if _TELLS_ITS_CLOCK in self.model else ()
        line = " ".join((qemu.COMMAND_LINE, _NO_CHANCE, *early, *self.parameters))
        boot = bytearray(4096)
        boot[0x1F1 : 0x1F1 + len(kernel.header)] = kernel.header
        boot[0x210] = 0xFF  # type_of_loader: none that has a number
        struct.pack_into("<II", boot, 0x218, at, len(self.initrd))
        struct.pack_into("<I", boot, 0x228, _COMMAND_LINE)
        pieces = [(_PARAMETERS, bytes(boot)), (_COMMAND_LINE, line.encode() + b"\0")]
        large = [(kernel.base, kernel.image), (at, self.initrd)]
        lines = []
        if bochs.fills_memory:
            for number, (address, data) in enumerate(large, 1):
                (work / f"memory{number}").write_bytes(data)
                lines.append(f"optramimage{number}: file={work}/memory{number}, address={address:#x}")
        else:
            pieces += large
        cylinders = _write_disk(work / "disk", pieces, kernel.entry, _boot_sector(work))
        (work / "commands").write_text("c\n")
        (work / "bochsrc").write_text("\n".join((*self._configuration(work, bochs, cylinders), *lines)) + "\n")
        argv = [bochs.program, "-q", "-f", str(work / "bochsrc")]
        return [*argv, "-rc", str(work / "commands")] if bochs.has_debugger else argv

    def _configuration(self, work: Path, bochs: Emulator, cylinders: int) -> list[str]:
        # Debian's builds have no display that needs nothing: one for VNC that does not wait for a viewer stands in.
        display = 'rfb, options="timeout=0"' if bochs.has_debugger else "nogui"
        bios, vga = BIOS
        # Debian's builds mix sound in a thread, which aborted ("buffer overflow detected") on a machine without a card.
        silent = ["speaker: enabled=0", "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy"]
        return [
            *(silent if bochs.has_debugger else ()),
            "config_interface: textconfig",
            f"display_library: {display}",
            f"romimage: file={bios}",
            f"vgaromimage: file={vga}",
            "vga: extension=none",
            # One processor: two are interleaved on one thread, at twice the cost.
            f"cpu: model={self.model}, count=1, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, "
            "ignore_bad_msrs=1",
            f"memory: guest={self.memory}, host={self.memory}",
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
            "ata1: enabled=0",
            f"ata0-master: type=disk, path={work}/disk, mode=flat, cylinders={cylinders}, heads={_HEADS}, "
            f"spt={_PER_TRACK}, translation=lba",
            "boot: disk",
            "pci: enabled=1, chipset=i440fx",
            f"clock: sync=none, time0={CLOCK_AT_START}",
            f"com1: enabled=1, mode=file, dev={work}/console",
            f"log: {work}/log",
            "panic: action=fatal",
            "error: action=ignore",
            "info: action=ignore",
            "debug: action=ignore",
            "port_e9_hack: enabled=1",
        ]


def _boot_sector(work: Path) -> bytearray:
    source, made = Path(__file__).with_name("boot.S"), work / "boot"
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-e", "_start"]
    commands = (["gcc", "-c", "-m32", str(source), "-o", f"{made}.o"], [*link, f"{made}.o", "-o", str(made)])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Problem(f"no {command[0]} for the lab's boot sector: {INSTALL}", ENVIRONMENT) from None
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise Problem(f"the lab's boot sector does not assemble ({cause}): {INSTALL}", ENVIRONMENT)
    return bytearray(made.read_bytes())


def _write_disk(path: Path, pieces: list[tuple[int, bytes]], entry: int, sector: bytearray) -> int:
    """Write the disk image: the boot sector with its table, then each piece; return its number of cylinders."""
    table, place = b"", _FIRST_SECTOR
    with path.open("wb") as disk:
        for address, data in pieces:
            sectors = -(-len(data) // _SECTOR)
            table += struct.pack("<III", place, sectors, address)
            disk.seek(place * _SECTOR)
            disk.write(data)
            place += sectors
        table += struct.pack("<III", 0, 0, entry)
        sector[_TABLE : _TABLE + len(table)] = table
        disk.seek(0)
        disk.write(sector)
        cylinders = -(-place // (_HEADS * _PER_TRACK))
        disk.truncate(cylinders * _HEADS * _PER_TRACK * _SECTOR)
    return cylinders


def run(argv: list[str], work: Path, share: Path, timeout: float, tick: Callable[[], None] = lambda: None) -> Ending:
    """Run a prepared machine until it ends or `timeout` seconds have passed; files that it sent go into `share`.

    Raises Problem (environment) when Bochs is not installed.
    """
    console, output = work / "console", work / "output"
    deadline, panicked = time.monotonic() + timeout, False

    def watch() -> bool:
        nonlocal panicked
        tick()
        with suppress(OSError):  # a kernel that panicked would be reset, and boot again
            panicked = b"Kernel panic" in console.read_bytes()[-8192:]
        return panicked

    status = qemu.wait_for(argv, output, timeout, watch, INSTALL)
    ending = receive(output.read_bytes() if output.is_file() else b"", share)
    if panicked:
        return Ending.PANIC
    if ending is None and time.monotonic() < deadline:
        with console.open("a") as file:
            file.write(f"\n{_why(status, work / 'log')}\n")
    return ending or (Ending.TIMEOUT if time.monotonic() >= deadline else Ending.EMULATOR_FAILED)


def _why(status: int | None, log: Path) -> str:
    """Return how an emulator ended before its guest had sent all, and its last line in the log."""
    said = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "nothing in its log")
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name} before its guest had ended: {last}"
    return f"status {status} before its guest had ended: {last}"


def receive(sent: bytes, share: Path) -> Ending | None:
    """Put the files that a guest's init sent into `share`; return how it said that it ended, None if it did not."""
    at = 0
    while found := _FILE.search(sent, at):
        name, size = Path(found[1].decode(errors="replace")), int(found[2])
        at = found.end() + size
        if name.is_absolute() or ".." in name.parts or at > len(sent):
            return None
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_bytes(sent[found.end() : at])
    end = _END.search(sent, at)
    return qemu.BY_CODE[int(end[1])] if end and int(end[1]) < len(qemu.BY_CODE) else None
