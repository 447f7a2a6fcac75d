# SPDX-License-Identifier: Apache-2.0
"""Guests that nobody here wrote, recorded in the lab: KVM's selftests, OVMF, Linux under QEMU.

Each is a line of data: what it is, what it is built from, and the command that runs it in the lab guest. Those of one
kernel with equal demands on it share a boot.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracer.lab import prebuilt
from tracer.lab.builds import built
from tracer.lab.fetch import Say, fetch
from tracer.lab.lab_kernels import Bootable
from tracer.lab.session import DEFAULT_MEMORY, DEFAULT_TIMEOUT, JOBS, SHARE, GuestFailed, boot
from traces.recording.compact import compact

# The exit status of KVM's selftests where the host cannot do what they test (KSFT_SKIP).
SKIPPED: Final = 4
_ENDED: Final = "ended with "


@dataclass(frozen=True)
class LabGuest:
    """One guest: `builds.built` makes `build` for it, and `command` runs it, `{built}` standing for that directory.

    `seconds` is its limit on an idle machine, of which ten times are waited; `memory` (MiB) and the number of NUMA
    `nodes` are the lab guest's. `check` puts it into the smaller set that `make check` records.
    """

    name: str
    shows: str
    build: str
    command: str
    seconds: int = 30
    memory: int = DEFAULT_MEMORY
    nodes: int = 1
    check: bool = False


def _selftest(name: str, arguments: str = "", shows: str = "", check: bool = False) -> LabGuest:
    words = f"{{built}}/{name} {arguments}".strip()
    return LabGuest(f"selftest-{name.removesuffix('_test')}", shows, "selftests", words, check=check)


def _nested(name: str, shows: str, build: str = "linux", nodes: int = 1) -> LabGuest:
    command = f"{shlex.quote(sys.executable)} -m tracer.lab.nested {name} {{built}}"
    return LabGuest(name, shows, build, command, seconds=120, memory=3072, nodes=nodes)


# All that build and need neither VMX nor a PMU, AMX, SEV; sizes so that each ends in seconds under emulation.
_SELFTESTS: Final = (
    _selftest("access_tracking_perf_test", "-b 16M -v 1", "aging of pages by idle page tracking"),
    _selftest("demand_paging_test", "-b 16M", "first faults, without userfaultfd", check=True),
    _selftest("dirty_log_perf_test", "-b 16M -i 2", "dirty logging with manual protection", check=True),
    _selftest("dirty_log_test", "-i 4 -I 10 -M dirty-log", "dirty log, read while the guest writes"),
    _selftest("kvm_page_table_test", "-b 16M -v 1", "huge pages split and coalesced by dirty logging"),
    _selftest(
        "memslot_modification_stress_test", "-b 16M -i 20", "memslots made and deleted while vCPUs run", check=True
    ),
    _selftest("memslot_perf_test", "-s 64 -l 1 -f 2 -e 4", "memslots moved, mapped and unmapped"),
    _selftest("set_memory_region_test", "", "memslots moved and deleted under a running guest"),
    _selftest("kvm_create_max_vcpus", "", "as many vCPUs as there may be"),
    _selftest("kvm_binary_stats_test", "", "statistics of VMs and vCPUs"),
    _selftest("rseq_test", "", "a vCPU thread that migrates between CPUs"),
    _selftest("system_counter_offset_test", "", "TSC offsets"),
    _selftest("smm_test", "", "system management mode, with nested SVM", check=True),
    _selftest("state_test", "", "state saved and restored, with nested SVM", check=True),
    _selftest("cpuid_test", "", "CPUID in the guest"),
    _selftest("cr4_cpuid_sync_test", "", "CR4 and CPUID"),
    _selftest("debug_regs", "", "debug registers, single steps"),
    _selftest("emulator_error_test", "", "an instruction that the emulator refuses"),
    _selftest("fix_hypercall_test", "", "patched hypercalls"),
    _selftest("get_msr_index_features", "", "feature MSRs"),
    _selftest("hyperv_clock", "", "Hyper-V's clock page"),
    _selftest("hyperv_cpuid", "", "Hyper-V's CPUID"),
    _selftest("hyperv_features", "", "Hyper-V's MSRs and hypercalls: a VM for each"),
    _selftest("hyperv_svm_test", "", "nested SVM with Hyper-V's enlightenments"),
    _selftest("kvm_clock_test", "", "kvmclock"),
    _selftest("kvm_pv_test", "", "paravirtual features"),
    _selftest("max_vcpuid_cap_test", "", "the limit of vCPU ids"),
    _selftest("mmio_warning_test", "", "a triple fault in real mode"),
    _selftest("monitor_mwait_test", "", "MONITOR and MWAIT"),
    _selftest("nested_exceptions_test", "", "exceptions of nested guests"),
    _selftest("platform_info_test", "", "MSR_PLATFORM_INFO"),
    _selftest("set_boot_cpu_id", "", "which vCPU boots"),
    _selftest("set_sregs_test", "", "KVM_SET_SREGS with wrong bits"),
    _selftest("svm_int_ctl_test", "", "nested SVM, interrupts"),
    _selftest("svm_nested_shutdown_test", "", "a nested guest that ends in a triple fault"),
    _selftest("svm_nested_soft_inject_test", "", "soft interrupts into nested guests"),
    _selftest("svm_vmcall_test", "", "a hypercall of a nested guest"),
    _selftest("sync_regs_test", "", "registers by KVM_RUN's page"),
    _selftest("triple_fault_event_test", "", "triple faults as events"),
    _selftest("tsc_msrs_test", "", "TSC MSRs"),
    _selftest("tsc_scaling_sync", "", "TSC scaling"),
    _selftest("ucna_injection_test", "", "machine checks"),
    _selftest("userspace_io_test", "", "string I/O"),
    _selftest("userspace_msr_exit_test", "", "MSRs of the VMM's"),
    _selftest("xapic_ipi_test", "", "IPIs to a halted vCPU"),
    _selftest("xapic_state_test", "", "the local APIC's state"),
    _selftest("xen_shinfo_test", "", "Xen's shared info page"),
    _selftest("xen_vmcall_test", "", "Xen's hypercalls"),
    _selftest("xss_msr_test", "", "MSR_IA32_XSS"),
)

_NESTED: Final = (
    _nested("firmware", "OVMF with secure boot to its shell: SMIs in hundreds", "firmware"),
    _nested("debian", "Debian's kernel and userland"),
    _nested("pressed", "more work than memory, under KSM and NUMA balancing", nodes=2),
    _nested("hotplug", "two machines at once, a vCPU plugged into one, online and at work", "busy"),
    _nested("loaded", "a machine on a host with a task that never sleeps", "busy"),
    _nested("migration", "a live migration to a file", "busy"),
)

GUESTS: Final = {guest.name: guest for guest in (*_SELFTESTS, *_NESTED)}


@dataclass(frozen=True)
class GuestRun:
    """How a guest ended.

    `status` is its exit status, None where the lab guest did not get to it; `said` is its last line. `trace` is where
    its recording is, if there is one.
    """

    guest: LabGuest
    kernel: str
    status: int | None
    said: str
    trace: Path | None


def record(kernel: str, guests: Iterable[LabGuest], directory: Path, say: Say) -> list[GuestRun]:
    """Record guests on one kernel, to DIRECTORY/NAME-KERNEL.parquet. Those that are there already are left out.

    A guest that ends the machine underneath is a `GuestRun` that says so, as is one that fails; those after it get a
    boot of their own. Raises Problem where a kernel or a build is missing.
    """
    groups: dict[tuple[str, int, int], list[LabGuest]] = {}
    for guest in guests:
        groups.setdefault((guest.build, guest.memory, guest.nodes), []).append(guest)
    booted = fetch(kernel, say)
    runs: list[GuestRun] = []
    for group in groups.values():
        place, barren = built(group[0].build, say), 0
        while group:
            say(f"{kernel}: {', '.join(guest.name for guest in group[:3])} ...")
            failure = _boot(booted, group, place, directory)
            several = [_run(guest, kernel, directory, failure) for guest in group]
            came = next((at for at, run in enumerate(several) if run.status is None), len(group))
            barren = 0 if came else barren + 1
            if barren > 1:  # two boots without any result: it is not the guest's fault
                came = len(group)
            runs += several[: came + 1]
            group = group[came + 1 :]
    return runs


def _boot(booted: Bootable, group: Sequence[LabGuest], place: Path, directory: Path) -> str:
    """Run guests one after another in one lab guest; return what failed, empty if nothing did."""
    jobs = [_job(guest, booted.name, place) for guest in group]
    try:
        done = boot(
            booted,
            [sys.executable, "-m", "tracer.several", f"{SHARE}/{JOBS}"],
            probes=prebuilt.have(booted),
            give={JOBS: json.dumps({"events": "mmu", "jobs": jobs, "segments": True, "whatever_happens": True})},
            into=directory,
            memory=group[0].memory,
            nodes=group[0].nodes,
            timeout=DEFAULT_TIMEOUT + 10 * sum(guest.seconds for guest in group),
        )
    except GuestFailed as problem:
        return str(problem)
    return done.stderr.strip()[-200:] if done.code else ""


def _job(guest: LabGuest, kernel: str, place: Path) -> dict[str, object]:
    command = guest.command.replace("{built}", shlex.quote(str(place)))
    script = f"timeout {10 * guest.seconds} {command}; echo {_ENDED}$?"
    return {"out": f"{SHARE}/{guest.name}-{kernel}.parquet", "command": ["sh", "-c", f"{{ {script}; }} 2>&1"]}


def _run(guest: LabGuest, kernel: str, directory: Path, failure: str) -> GuestRun:
    trace = directory / f"{guest.name}-{kernel}.parquet"
    segments, printed = trace.with_suffix(".kvmt"), trace.with_suffix(".stdout")
    if segments.is_dir():  # compacted here, where it takes a tenth of the time
        compact(segments, trace)
        shutil.rmtree(segments)
    lines: Sequence[str] = printed.read_text(errors="replace").split("\n") if printed.is_file() else ()
    printed.unlink(missing_ok=True)
    lines = [line.strip() for line in lines if line.strip()]
    status = int(lines[-1].removeprefix(_ENDED)) if lines and lines[-1].startswith(_ENDED) else None
    said = failure if status is None else (lines[-2] if status and len(lines) > 1 else "")
    return GuestRun(guest, kernel, status, said, trace if trace.is_file() else None)
