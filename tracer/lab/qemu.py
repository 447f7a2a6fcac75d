# SPDX-License-Identifier: Apache-2.0
"""One QEMU process: its command line, its limits, and what its end means. Bochs has the same limits."""

from __future__ import annotations

import ctypes
import enum
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem

PROGRAM: Final = "qemu-system-x86_64"
INSTALL: Final = "apt-get install qemu-system-x86"

# quiet .. cryptomgr.notests: a boot in 3 s instead of 8 under emulation. panic=-1 oops=panic: a broken kernel ends the
# run at once. rcu_expedited: detaching kprobes took 20 s on 5.10 without it. use_softirq=0: an RCU callback in a
# softirq interrupts other probes, and the kernel then skips its own. nokaslr: traces of two boots compare.
COMMAND_LINE: Final = (
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check audit=0 "
    "random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 rcutree.use_softirq=0"
)

# 16 ns an instruction; time that the guest waits passes at once.
_COUNTED: Final = "shift=4,sleep=off"


@dataclass(frozen=True)
class LabMachine:
    """A machine for QEMU: `memory` in MiB, on one NUMA node or two; `parameters` as on a kernel's command line.

    `counts`: the guest's clock is the count of its instructions, whatever else this machine does.
    """

    image: Path
    initrd: Path
    share: Path
    memory: int
    parameters: tuple[str, ...] = ()
    nodes: int = 1
    counts: bool = False

    def command(self) -> list[str]:
        """Return the argv. There are two processors, for scenarios with two vCPUs; nested guests need SVM and NPT.

        There is one where instructions are counted: with two, QEMU 7.2 does not get beyond starting the second.
        """
        return [
            PROGRAM,
            # Multi-threaded TCG loses runtime code patching (static keys, kprobes) and the guest dies of a stray int3.
            *("-accel", "tcg,thread=single"),
            *(("-icount", _COUNTED) if self.counts else ()),
            *("-M", "q35", "-cpu", "EPYC,+svm,+npt", "-smp", str(2 - self.counts), "-m", str(self.memory)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(self.image), "-initrd", str(self.initrd)),
            *("-append", " ".join((COMMAND_LINE, *self.parameters))),
            *(word for node in range(self.nodes) for word in self._node(node) if self.nodes > 1),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-virtfs", _share(Path("/"), "host") + ",readonly=on"),
            *("-virtfs", _share(self.share, "lab")),
        ]

    def _node(self, node: int) -> tuple[str, ...]:
        """Return the options of a NUMA node, with one of the processors and its share of the memory."""
        memory = f"memory-backend-ram,id=memory{node},size={self.memory // self.nodes}M"
        return ("-object", memory, "-numa", f"node,nodeid={node},memdev=memory{node},cpus={node}")


def _share(path: Path, tag: str) -> str:
    # QEMU's option parser takes a comma doubled; multidevs=remap: the host's root may span file systems.
    return f"local,path={str(path).replace(',', ',,')},mount_tag={tag},security_model=none,multidevs=remap"


_running: Final[set[subprocess.Popen[bytes]]] = set()


class Ending(enum.Enum):
    """How a guest ended. The first five are init.c's, by isa-debug-exit: its code s is QEMU's status s << 1 | 1."""

    ORDERLY = "ran its command"
    MODULE_REFUSED = "could not load a module"
    MOUNT_REFUSED = "could not mount a file system"
    NO_KVM = "has no /dev/kvm"
    NO_COMMAND = "could not start the command"
    PANIC = "panicked or reset"
    EMULATOR_FAILED = "was lost with its emulator"
    TIMEOUT = "did not end in time"


BY_CODE: Final = (
    Ending.ORDERLY,
    Ending.MODULE_REFUSED,
    Ending.MOUNT_REFUSED,
    Ending.NO_KVM,
    Ending.NO_COMMAND,
)


def decode(status: int) -> Ending:
    """Return what QEMU's exit status means. 0 is a failure: `panic=-1 -no-reboot` makes QEMU exit so after a panic."""
    if status == 0:
        return Ending.PANIC
    # An error of QEMU's own (bad option, unreadable image) is 1 as well; `session` tells it by the missing result.
    if status > 0 and status & 1 and status >> 1 < len(BY_CODE):
        return BY_CODE[status >> 1]
    return Ending.EMULATOR_FAILED


def run(argv: list[str], serial: Path, timeout: float, tick: Callable[[], None] = lambda: None) -> Ending:
    """Run QEMU until it ends or `timeout` seconds have passed, with its output in the file `serial`.

    `tick` is called some ten times a second. Raises Problem (environment) when QEMU is not installed.
    """

    def watch() -> bool:
        tick()
        return False

    status = wait_for(argv, serial, timeout, watch, INSTALL)
    return Ending.TIMEOUT if status is None else decode(status)


def wait_for(argv: list[str], said: Path, timeout: float, watch: Callable[[], bool], install: str) -> int | None:
    """Run an emulator, with its output in the file `said`; return its exit status, None if it was killed.

    It is killed after `timeout` seconds, or when `watch`, called some ten times a second, returns True. It does not
    outlive this call, whatever ends that, nor this process. Raises Problem (environment), with `install`, where there
    is none.
    """
    with said.open("wb") as output:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except FileNotFoundError:
            raise Problem(f"no {argv[0]}: {install}", ENVIRONMENT) from None
    deadline = time.monotonic() + timeout
    _running.add(process)
    try:
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.1)
            if watch():
                break
        return None
    finally:
        _running.discard(process)
        _kill(process)
        process.wait()


def kill_running() -> None:
    """Kill every emulator that other threads wait for in `wait_for`, which returns there at once."""
    for process in tuple(_running):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> Callable[[], None]:
    """Return what the child does before exec: have the kernel kill it when we die, even of SIGKILL."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork
    parent = os.getpid()

    def arm() -> None:
        pr_set_pdeathsig = 1
        prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return arm
