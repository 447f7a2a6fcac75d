# SPDX-License-Identifier: Apache-2.0
"""Guests of QEMU's, run within a lab guest: a firmware, a Debian, two machines, one on a loaded host, a migration.

`python -m tracer.lab.nested NAME DIRECTORY`, in the lab guest; DIRECTORY is what `builds` made for it. QEMU is driven
over its monitor protocol by what the guest says, not by the clock: emulation within emulation takes as long as it
takes, and whoever records has a limit.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from traces.errors import BAD_INPUT, Problem

# Asynchronous page faults would look pages up without a fault; the other paravirtual features have KVM write guest
# memory. From 6.14 on (9be4ec35d668) KVM offers the TSC deadline timer without an APIC of its own, too, and QEMU 7.2
# passes it on: with QEMU's APIC the deadline never comes, and the guest sleeps for good.
_CPU: Final = (
    "host,-tsc-deadline,-kvm-asyncpf-int,-kvm-pv-eoi,-kvm-asyncpf,-kvm-steal-time,-kvm-poll-control,"
    "-kvm-msi-ext-dest-id"
)
# `quiet`: each character on the serial line is two exits to QEMU, half of all that a boot had.
_LINUX: Final = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check random.trust_cpu=on cryptomgr.notests"
)
_WRITTEN: Final = "CPU {} has written it all"
_SPINS: Final = "while True: pass"
_KSM: Final = Path("/sys/kernel/mm/ksm")
_NUMA: Final = Path("/sys/kernel/debug/sched/numa_balancing")


class NestedMachine:
    """One QEMU process, in a directory of its own: serial line, monitor, and a share with what it is to run."""

    def __init__(self, stack: ExitStack, *words: str, script: str = "") -> None:
        self.home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = ["qemu-system-x86_64", "-accel", "kvm", "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-no-reboot", "-net", "none", "-cpu", _CPU, "-serial", f"file:{self.home / 'serial'}"]
        command += ["-qmp", f"unix:{self.home / 'monitor'},server,nowait", *words]
        if script:
            command += self._shares(script)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        stack.callback(self.end)
        wait_for((self.home / "monitor").exists, self)
        self.monitor = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.monitor.connect(str(self.home / "monitor"))
        self.answers = stack.enter_context(self.monitor.makefile("r"))
        self.answers.readline()  # its greeting
        self.ask("qmp_capabilities")

    def _shares(self, script: str) -> list[str]:
        share = self.home / "share"
        share.mkdir()
        (share / "argv").write_bytes(b"sh\0-c\0" + script.encode() + b"\0")
        (share / "environ").write_bytes(b"PATH=/usr/bin:/bin\0")
        (share / "cwd").write_bytes(b"/")
        options = "security_model=none,multidevs=remap"
        shares = (f"local,path=/,mount_tag=host,readonly=on,{options}", f"local,path={share},mount_tag=lab,{options}")
        return [word for share in shares for word in ("-virtfs", share)]

    def ask(self, command: str, **arguments: object) -> Any:
        """Return the monitor's answer to a command; events that come in between are skipped."""
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self.answers:
            answer = json.loads(line)
            if "error" in answer:
                raise Problem(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise Problem(f"{command}: QEMU ended")

    def said(self, text: str) -> bool:
        """Return whether `text` is on the guest's serial line, or in the output of the command that it runs."""
        paths = (self.home / "serial", self.home / "share" / "stdout")
        return any(text in path.read_text(errors="replace") for path in paths if path.exists())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(condition: Callable[[], bool], *machines: NestedMachine) -> None:
    """Wait until a condition holds; raises Problem where a machine ends before."""
    while not condition():
        for machine in machines:
            if machine.process.poll() is not None and not condition():
                serial = machine.home / "serial"
                tail = serial.read_text(errors="replace").splitlines()[-3:] if serial.exists() else []
                raise Problem(f"QEMU ended with {machine.process.returncode}: {' | '.join(tail)}", BAD_INPUT)
        time.sleep(0.2)


def _linux(built: Path, memory: int, *more: str) -> tuple[str, ...]:
    """The kernel and init that were built, with `more` on its command line; no interrupt controllers in the kernel.

    With them the emulation underneath aborts where a guest writes CR8 while an interrupt is pending, and the firmware
    of a machine may be left in single steps: #DB after every instruction.
    """
    return (
        *("-machine", "q35,kernel-irqchip=off", "-m", str(memory)),
        *("-kernel", str(built / "vmlinuz"), "-initrd", str(built / "initrd"), "-append", " ".join((_LINUX, *more))),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    )


def debian(built: Path, stack: ExitStack) -> None:
    """Run this machine's userland under a lab kernel: it reads some of its files and is done."""
    script = "uname -a; sha256sum /usr/bin/[a-m]* > /dev/null; echo finished"
    machine = NestedMachine(stack, *_linux(built, 384), script=script)
    wait_for(lambda: machine.said("finished\n"), machine)


def pressed(built: Path, stack: ExitStack) -> None:
    """Run a guest with more work than memory, while the host merges its pages (KSM) and moves them (NUMA)."""
    for name, value in (("sleep_millisecs", "20"), ("pages_to_scan", "2000"), ("run", "1")):
        (_KSM / name).write_text(value)
    Path("/proc/sys/kernel/numa_balancing").write_text("1")
    for name, value in (("scan_delay_ms", "100"), ("scan_period_max_ms", "500"), ("scan_period_min_ms", "200")):
        if (_NUMA / name).exists():
            (_NUMA / name).write_text(value)
    script = (
        "for turn in 1 2; do dd if=/dev/zero of=/tmp/zero bs=1M count=80 2> /dev/null; "
        "sha256sum /usr/bin/b* /tmp/zero > /dev/null; rm /tmp/zero; done; echo finished"
    )
    machine = NestedMachine(stack, *_linux(built, 256), script=script)
    wait_for(lambda: machine.said("finished\n"), machine)


def hotplug(built: Path, stack: ExitStack) -> None:
    """Two machines at once, of which one gets another vCPU while it runs, brings it online and works on it.

    Its idle vCPUs poll. QEMU 7.2 with its own APIC never clears the SIPI that started a vCPU (`apic_sipi`): when that
    one halts, its thread goes round and round with QEMU's lock, and the machine stands still.
    """
    first = NestedMachine(stack, *_linux(built, 160, "idle=poll"), "-smp", "1,maxcpus=2")
    second = NestedMachine(stack, *_linux(built, 128))
    wait_for(lambda: first.said("busy"), first, second)
    (free,) = [cpu for cpu in first.ask("query-hotpluggable-cpus") if "qom-path" not in cpu]
    first.ask("device_add", driver=free["type"], id="added", **free["props"])
    wait_for(lambda: first.said(_WRITTEN.format(1)) and second.said(_WRITTEN.format(0)), first, second)


def loaded(built: Path, stack: ExitStack) -> None:
    """A machine on a host that also runs a task which never sleeps."""
    load = subprocess.Popen([sys.executable, "-c", _SPINS])
    stack.callback(load.kill)
    machine = NestedMachine(stack, *_linux(built, 128))
    wait_for(lambda: machine.said(_WRITTEN.format(0)), machine)


def migration(built: Path, stack: ExitStack) -> None:
    """A guest that writes its memory is migrated to a file, live."""
    machine = NestedMachine(stack, *_linux(built, 128))
    wait_for(lambda: machine.said("busy"), machine)
    machine.ask("migrate-set-parameters", **{"downtime-limit": 3000, "max-bandwidth": 1 << 30})
    machine.ask("migrate", uri=f"exec:cat > {machine.home / 'state'}")

    def migrated() -> bool:
        status = str(machine.ask("query-migrate").get("status"))
        if status == "failed":
            raise Problem("the migration failed", BAD_INPUT)
        return status == "completed"

    wait_for(migrated, machine)


def firmware(built: Path, stack: ExitStack) -> None:
    """Boot OVMF, whose variable store is in SMM, to its shell."""
    variables = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "vars.fd"
    shutil.copy(built / "vars.fd", variables)
    machine = NestedMachine(
        stack,
        *("-machine", "q35,smm=on,kernel-irqchip=off", "-m", "512"),
        *("-global", "driver=cfi.pflash01,property=secure,value=on"),
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={built / 'code.fd'}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
    )
    wait_for(lambda: machine.said("Shell>"), machine)


GUESTS: Final = {run.__name__: run for run in (debian, pressed, hotplug, loaded, migration, firmware)}


def main() -> None:
    try:
        with ExitStack() as stack:
            GUESTS[sys.argv[1]](Path(sys.argv[2]), stack)
    except Problem as problem:
        print(f"kvmtrace: {problem}", file=sys.stderr)
        raise SystemExit(problem.code) from None


if __name__ == "__main__":
    main()
