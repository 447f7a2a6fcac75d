# SPDX-License-Identifier: Apache-2.0
"""Recordings of this machine's own KVM: counted independently, lost on purpose, cut short in every way."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.own_vm import noted, own_vms
from tests.waiting import PATIENCE, until
from tracer.probing import bpf
from tracer.probing.attachments import Choices
from tracer.probing.compiled import import_bcc, quiet
from tracer.probing.headers import headers
from traces.errors import Problem
from traces.reader import Trace

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("live")]

# Kinds that a guest makes here in numbers, and the tracepoint that an independent program counts for each.
COUNTED = {
    "kvm_mmu_get_page": "kvmmmu:kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page": "kvmmmu:kvm_mmu_prepare_zap_page",
    "kvm_mmu_zap_all_fast": "kvmmmu:kvm_mmu_zap_all_fast",
    "kvm_mmu_pagetable_walk": "kvmmmu:kvm_mmu_pagetable_walk",
    "kvm_mmu_paging_element": "kvmmmu:kvm_mmu_paging_element",
    "kvm_emulate_insn": "kvm:kvm_emulate_insn",
    "kvm_userspace_exit": "kvm:kvm_userspace_exit",
    "kvm_pio": "kvm:kvm_pio",
    "kvm_mmio": "kvm:kvm_mmio",
    "kvm_unmap_hva_range": "kvm:kvm_unmap_hva_range",
}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kvmtrace", *map(str, arguments)]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=1200, check=False, **options)


@contextlib.contextmanager
def independent_counter() -> Iterator[Any]:
    """A BPF program of the test's own: events by process and tracepoint, added up in a per-CPU map."""
    bcc = import_bcc()
    text = "struct key { u32 tgid, kind; };\nBPF_PERCPU_HASH(seen, struct key, u64, 4096);\n"
    for i in range(len(COUNTED)):
        text += (
            f"int count_{i}(void *ctx) {{ struct key k = {{bpf_get_current_pid_tgid() >> 32, {i}}};"
            " u64 one = 1, *n = seen.lookup(&k); if (n) (*n)++; else seen.update(&k, &one); return 0; }\n"
        )
    with headers(), quiet():
        counter = bcc.BPF(text=text, cflags=["-w"])
    for i, where in enumerate(COUNTED.values()):
        counter.attach_tracepoint(tp=where.encode(), fn_name=f"count_{i}".encode())
    try:
        yield counter
    finally:
        counter.cleanup()


def counted(counter: Any, pid: int) -> dict[str, int]:
    names = list(COUNTED)
    found = Counter[str]()
    for key, per_cpu in counter["seen"].items():
        if key.tgid == pid:
            found[names[key.kind]] += sum(per_cpu)
    return dict(found)


@pytest.mark.parametrize("scenario", [("roots",), ("storm", "--loops", "300"), ("slot-delete",), ("churn",)])
def test_stored_counts_equal_an_independent_counter(tmp_path: Path, vmm: str, scenario: tuple[str, ...]) -> None:
    out = tmp_path / "live.parquet"
    with independent_counter() as counter:
        done = run("record", "--events", "all", "--json", "-o", out, "--", *noted(tmp_path / "pid", vmm, *scenario))
        assert done.returncode == 0, done.stderr
        pid = int((tmp_path / "pid").read_text())
        expected = counted(counter, pid)
    result = json.loads(done.stdout)
    assert result["lost"] == 0
    assert result["complete"] is True
    owner = [thread["tid"] for thread in Trace.open(out).metadata.raw["threads"] if thread["tgid"] == pid]
    rows = pl.scan_parquet(out).filter(pl.col("tid").is_in(owner)).group_by("kind").len().collect()
    stored = {str(kind): n for kind, n in rows.iter_rows()}
    assert expected, "the counter saw nothing: the test would prove nothing"
    assert {kind: stored.get(kind, 0) for kind in expected} == expected
    assert sum(expected.values()) > 100


def test_a_ring_too_small_loses_to_the_event(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "small.parquet"
    arguments = ("record", "--events", "all", "--ring-size", "4096", "--json", "-o", out)
    done = run(*arguments, "--strict", "--", vmm, "storm", "--loops", "200")
    assert done.returncode == 1, done.stderr
    assert "were lost (--strict)" in done.stderr
    result = json.loads(done.stdout)
    assert result["lost"] > 0
    assert result["emitted"] == result["events"] + result["lost"]
    assert result["complete"] is True, result["discrepancies"]
    metadata = Trace.open(out).metadata.raw
    for kind, counts in metadata["loss"].items():
        if kind != "gap":
            stored = metadata["kinds"].get(kind, 0)
            assert sum(counts["emitted"].values()) == stored + sum(counts["lost"].values()), kind
    gaps = pl.scan_parquet(out).filter(pl.col("kind") == "gap").collect()
    assert gaps["value"].sum() == result["lost"], "every lost event lies in a gap"


def test_identity_roots_and_slots(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "roots.parquet"
    pid = tmp_path / "pid"
    assert run("record", "-o", out, "--", *noted(pid, vmm, "roots", "--loops", "150")).returncode == 0
    trace = Trace.open(out)
    (vm,) = own_vms(trace, pid)
    assert {vcpu["id"] for vcpu in vm["vcpus"]} == {0}  # its own thread, and the one that set it up
    assert {slot["gfn"] for slot in vm["slots"]} == {0, 0x400}
    tids = [vcpu["tid"] for vcpu in vm["vcpus"]]
    pages = pl.scan_parquet(out).filter(pl.col("kind") == "kvm_mmu_get_page", pl.col("tid").is_in(tids)).collect()
    assert pages["vcpu"].unique().to_list() == [0]
    assert pages["vm"].unique().to_list() == [vm["id"]]
    created = pages.filter(pl.col("flags") & 1 == 1)
    assert len(created) == created["root"].n_unique() >= 150, "a root for each CR3 load, each with an id of its own"
    own = (pl.col("kind") == "kvm_mmu_prepare_zap_page") & (pl.col("vm") == vm["id"])
    zapped = pl.scan_parquet(out).filter(own, pl.col("root") > 0).select("root").collect()["root"]
    assert len(zapped) >= 100
    assert set(zapped) <= set(created["root"]), "what is zapped was created here"
    assert pages["role"].n_unique() == 1
    times = pl.scan_parquet(out).sort("seq").select(pl.col("time").is_sorted()).collect().item()
    assert times, "rows are in the order of time over all CPUs"


@contextlib.contextmanager
def running(vmm: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([vmm, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: "anon_inode:kvm-vcpu:0" in open_files(process.pid) and cpu_ticks(process.pid) > 5)
        assert process.poll() is None, "the guest must outlive the test's start"
        yield process
    finally:
        process.kill()
        process.wait()


def open_files(pid: int) -> set[str]:
    """What a process's descriptors are, by name."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    return found


def cpu_ticks(pid: int) -> int:
    """User and system time of a process, in ticks of 10 ms: its guest runs by then."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def recorded_for(directory: Path, flushes: int) -> bool:
    """Wait until a recording has rows on disk, and its manifest has been written anew this many times."""
    seen: set[int] = set()

    def enough() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if (directory / "seg-00000.arrows").stat().st_size:
                seen.add((directory / "manifest.json").stat().st_mtime_ns)
        return len(seen) > flushes

    return bool(until(enough))


def test_attaching_to_a_vm_that_already_runs(tmp_path: Path, vmm: str) -> None:
    """Its slots and vCPU threads come from the snapshot: no ioctl tells about them any more."""
    out = tmp_path / "attached.parquet"
    with running(vmm, "storm", "--loops", "10000000") as guest:
        done = run("record", "--vm", str(guest.pid), "--events", "all", "--duration", "0.5", "-o", out)
        assert done.returncode == 0, done.stderr
    trace = Trace.open(out)
    (vm,) = [vm for vm in trace.metadata.raw["vms"] if vm["pid"] == guest.pid]
    assert vm["origin"] == "snapshot"
    assert {slot["gfn"] for slot in vm["slots"]} >= {0}
    assert all(slot["pages"] > 0 and slot["hva"] > 0 for slot in vm["slots"])
    assert [vcpu["id"] for vcpu in vm["vcpus"]] == [0]
    rows = pl.scan_parquet(out).filter(pl.col("kind") == "kvm_mmu_get_page").select("vm", "vcpu").unique().collect()
    assert rows.rows() == [(vm["id"], 0)]


def test_vm_filter_keeps_others_out(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "one.parquet"
    with running(vmm, "storm", "--loops", "10000000"), running(vmm, "storm", "--loops", "10000000") as wanted:
        done = run("record", "--vm", str(wanted.pid), "--events", "all", "--max-events", "50000", "-o", out)
        assert done.returncode == 0, done.stderr
    assert "50,000 events reached" in done.stderr
    metadata = Trace.open(out).metadata
    assert metadata.events - metadata.gap_count == 50_000
    assert metadata.raw["complete"] is True, metadata.discrepancies
    threads = {thread["tid"]: thread["tgid"] for thread in Trace.open(out).metadata.raw["threads"]}
    tids = pl.scan_parquet(out).filter(pl.col("kind") != "gap").select(pl.col("tid").unique()).collect()["tid"]
    assert {threads[tid] for tid in tids} == {wanted.pid}


def test_started_before_the_first_vm_exists(tmp_path: Path, vmm: str) -> None:
    """Nothing is missed of a VM that is created as soon as the recorder says that it is there."""
    out = tmp_path / "first.parquet"
    recorder = subprocess.Popen(command("record", "-o", out), stderr=subprocess.PIPE, text=True)
    assert recorder.stderr is not None
    said = recorder.stderr.readline()
    assert said == "kvmtrace: no VM is running yet: recording from the first one's creation on\n"
    guest = subprocess.Popen([vmm, "slot-delete"], stdout=subprocess.DEVNULL)
    assert guest.wait(timeout=PATIENCE) == 0
    recorder.send_signal(signal.SIGINT)
    said = recorder.communicate(timeout=PATIENCE)[1]
    assert recorder.returncode == 0, said
    (vm,) = [vm for vm in Trace.open(out).metadata.raw["vms"] if vm["pid"] == guest.pid]
    assert (vm["origin"], vm["comm"]) == ("created", "kvmtrace-vmm")
    assert len(vm["slots"]) == 6, "two, of which one is deleted and made again four times"
    rows = pl.scan_parquet(out).filter(pl.col("vm") == vm["id"]).sort("seq").select("kind").collect()["kind"]
    assert rows[0] == "vm_create"


def test_the_largest_size_holds(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "size.parquet"
    with running(vmm, "storm", "--loops", "10000000"):
        done = run("record", "--events", "all", "--max-size", "4M", "--json", "-o", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["stopped"] == f"{4 << 20:,} bytes reached"
    assert result["complete"] is True, result["discrepancies"]
    assert 0 < result["bytes"] < 2 * (4 << 20)


# A process in a pid namespace of its own, with a /proc that shows it.
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def test_inside_a_pid_namespace(tmp_path: Path, vmm: str) -> None:
    """`--vm`, names, threads and slots are those that `ps` shows in there; another VM, outside, is not recorded."""
    out = tmp_path / "inside.parquet"
    script = (
        f"{vmm} storm --loops 10000000 --timeout 600 >/dev/null & vm=$!; sleep 1;"
        f' "$@" --vm $vm --duration 1; echo $vm $(ls /proc/$vm/task); kill -9 $vm'
    )
    with running(vmm, "storm", "--loops", "10000000"):
        asked = command("record", "-o", out)
        done = subprocess.run(
            [*NAMESPACE, "sh", "-c", script, "sh", *asked],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    pid, *tids = map(int, done.stdout.split())
    assert pid < 100, "a number of the namespace's own"
    metadata = Trace.open(out).metadata
    (vm,) = metadata.vms
    assert (vm["pid"], vm["comm"], vm["origin"]) == (pid, "kvmtrace-vmm", "snapshot")
    assert {vcpu["tid"] for vcpu in vm["vcpus"]} <= set(tids)
    assert {slot["gfn"] for slot in vm["slots"]} == {0, 0x400}
    rows = pl.scan_parquet(out).filter(pl.col("kind") != "gap").select("vm", "tid").unique().collect()
    assert set(rows["vm"]) == {vm["id"]}
    assert set(rows["tid"]) <= set(tids)


def test_a_vm_in_a_pid_namespace(tmp_path: Path, vmm: str) -> None:
    """While another one halts: two that never do may leave a recorder no CPU of two for a minute."""
    out = tmp_path / "outside.parquet"
    endless = ("--loops", "10000000", "--timeout", "600")
    with running(vmm, "idle", *endless):
        guest = subprocess.Popen([*NAMESPACE, vmm, "storm", *endless], stdout=subprocess.DEVNULL)
        try:
            children = Path(f"/proc/{guest.pid}/task/{guest.pid}/children")
            (pid,) = map(int, until(lambda: children.read_text().split()))
            assert until(lambda: "anon_inode:kvm-vcpu:0" in open_files(pid) and cpu_ticks(pid) > 5)
            done = run("record", "--vm", str(pid), "--duration", "1", "-o", out)
        finally:
            guest.kill()
            guest.wait()
    assert done.returncode == 0, done.stderr
    (vm,) = Trace.open(out).metadata.vms
    assert (vm["pid"], vm["comm"], vm["origin"]) == (pid, "kvmtrace-vmm", "snapshot")
    assert {slot["gfn"] for slot in vm["slots"]} == {0, 0x400}
    tids = pl.scan_parquet(out).filter(pl.col("kind") != "gap").select(pl.col("tid").unique()).collect()["tid"]
    assert set(tids) <= {vcpu["tid"] for vcpu in vm["vcpus"]} | {pid}


def test_a_proc_of_another_namespace_is_told(tmp_path: Path) -> None:
    namespace = ("unshare", "--pid", "--fork")
    done = subprocess.run(
        [*namespace, *command("record", "--vm", "1", "-o", tmp_path / "x.parquet")],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.startswith("kvmtrace: --vm 1: /proc is of another pid namespace")
    assert len(done.stderr.splitlines()) == 1


def test_notifiers_of_a_vcpus_own_thread_are_the_vcpus(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "notified.parquet"
    assert run("record", "-o", out, "--", vmm, "other-thread").returncode == 0
    (vm,) = [vm for vm in Trace.open(out).metadata.vms if vm["comm"] == "kvmtrace-vmm"]
    rows = pl.scan_parquet(out).filter(pl.col("kind") == "kvm_unmap_hva_range", pl.col("vm") == vm["id"]).collect()
    entered = pl.scan_parquet(out).filter(pl.col("kind") == "kvm_mmu_get_page", pl.col("vm") == vm["id"]).collect()
    own = dict(entered.select("tid", "vcpu").unique().rows())
    assert set(own.values()) == {0, 1}
    mine = rows.filter(pl.col("tid").is_in(list(own)))
    assert len(mine) >= 4
    assert all(own[tid] == vcpu for tid, vcpu in mine.select("tid", "vcpu").rows())


def test_time_that_a_vcpu_did_not_get(tmp_path: Path, vmm: str) -> None:
    """Two busy threads on one CPU: each vCPU's thread is off it about half of the time, ready to run."""
    out = tmp_path / "starved.parquet"
    cpu = str(max(os.sched_getaffinity(0)))
    spinner = subprocess.Popen(["taskset", "-c", cpu, "sh", "-c", "while :; do :; done"])
    try:
        done = run("record", "--events", "time", "-o", out, "--", "taskset", "-c", cpu, vmm, "roots", "--loops", "9000")
    finally:
        spinner.kill()
        spinner.wait()
    assert done.returncode == 0, done.stderr
    trace = Trace.open(out)
    (vm,) = [vm for vm in trace.metadata.vms if vm["comm"] in ("kvmtrace-vmm", "taskset")]
    rows = pl.scan_parquet(out).filter(pl.col("vm") == vm["id"]).sort("seq").collect()
    waits = rows.filter(pl.col("kind") == "sched_in").with_columns(pl.col("addr", "value").cast(pl.Int64))
    off = waits["time"] - waits["addr"]
    assert set(waits["vcpu"]) == {0}
    assert set(waits["tid"]) <= {vcpu["tid"] for vcpu in vm["vcpus"]}
    assert (waits["value"] <= off).all()
    assert (waits["value"] == off).filter(waits["flags"] & 1 == 1).all(), "preempted: it could have run all the time"
    assert waits["value"].sum() > 0.2 * (rows["time"].max() - rows["time"].min())
    assert (waits["addr"].to_numpy()[1:] >= waits["time"].to_numpy()[:-1]).all(), "periods do not overlap"
    others = rows.filter(pl.col("tid").is_in(waits["tid"].unique().to_list()), pl.col("kind") != "sched_in")["time"]
    inside = others.search_sorted(waits["time"]) - others.search_sorted(waits["addr"] + 1)
    assert inside.sum() == 0, "a thread without a CPU shows nothing"


def test_what_the_compiler_says_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "int f(void *ctx) { return no_such_thing; }"
    monkeypatch.setattr(Choices, "text", lambda *_: broken)
    with pytest.raises(Problem, match=r"bcc could not compile the probes: .*error: use of undeclared.*no_such_thing"):
        bpf.Probes(frozenset({"kvm_mmu_get_page"}), 1, 4096)


def test_the_vm_ends_while_recording(tmp_path: Path, vmm: str) -> None:
    out = tmp_path / "ends.parquet"
    with running(vmm, "storm", "--loops", "10000000") as guest:
        recorder = subprocess.Popen(
            command("record", "--vm", str(guest.pid), "-o", out), stderr=subprocess.PIPE, text=True
        )
        assert recorded_for(tmp_path / "ends.kvmt", flushes=1)
        guest.kill()
        guest.wait()
        said = recorder.communicate(timeout=1200)[1]
    assert recorder.returncode == 0, said
    assert f"the VM's process {guest.pid} ended" in said
    Trace.open(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_recording_cleanly(tmp_path: Path, vmm: str, number: signal.Signals) -> None:
    out = tmp_path / "signal.parquet"
    with running(vmm, "storm", "--loops", "10000000"):
        recorder = subprocess.Popen(command("record", "-o", out), stderr=subprocess.PIPE, text=True)
        assert recorded_for(tmp_path / "signal.kvmt", flushes=1)
        programs = own_programs(recorder.pid)
        assert programs, "no program of its own was seen: the test would prove nothing"
        recorder.send_signal(number)
        said = recorder.communicate(timeout=1200)[1]
    assert recorder.returncode == 0, said
    assert f"ended by {number.name}" in said
    assert Trace.open(out).metadata.raw["complete"] is True
    assert not (tmp_path / "signal.kvmt").exists()
    assert not programs & loaded_programs(), "a program of the recorder is still loaded"


def test_a_second_signal_leaves_a_directory_to_recover(tmp_path: Path, vmm: str) -> None:
    out, directory = tmp_path / "hard.parquet", tmp_path / "hard.kvmt"
    with running(vmm, "storm", "--loops", "10000000"):
        recorder = subprocess.Popen(command("record", "--events", "all", "-o", out), stderr=subprocess.PIPE, text=True)
        assert recorded_for(directory, flushes=0)
        recorder.send_signal(signal.SIGINT)
        recorder.send_signal(signal.SIGTERM)  # another one: two of the same may be delivered as one
        said = recorder.communicate(timeout=1200)[1]
    assert recorder.returncode == 130, said
    assert f"kvmtrace recover {directory}" in said
    assert not out.exists()
    assert run("recover", directory).returncode == 0
    assert Trace.open(out).metadata.raw["events"] > 0


def own_programs(pid: int) -> set[int]:
    """Ids of the BPF programs that a process holds."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("prog_id:")}
    return found


def loaded_programs() -> set[int]:
    """Ids of all BPF programs in the kernel, through the bpf syscall itself."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    found, current = set(), ctypes.c_uint32(0)
    while library.bpf_prog_get_next_id(current, ctypes.byref(current)) == 0:
        found.add(current.value)
    return found


def test_a_killed_recorder_leaves_what_it_flushed(tmp_path: Path, vmm: str) -> None:
    out, directory = tmp_path / "killed.parquet", tmp_path / "killed.kvmt"
    with running(vmm, "storm", "--loops", "10000000"):
        recorder = subprocess.Popen(command("record", "--events", "all", "-o", out), stderr=subprocess.DEVNULL)
        assert recorded_for(directory, flushes=3)  # of a second each
        recorder.kill()
        recorder.wait()
    assert not out.exists()
    for _ in range(2):
        done = run("recover", directory, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["events"] > 0
        assert result["complete"] is False
        assert "the recorder did not end" in " ".join(result["discrepancies"])
    last = pl.scan_parquet(out).select(pl.col("time").max()).collect().item()
    first = pl.scan_parquet(out).select(pl.col("time").min()).collect().item()
    assert last - first > 0.5e9, "more than the first flush survived"


def test_a_full_disk_keeps_what_was_recorded(tmp_path: Path, vmm: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    try:
        with running(vmm, "storm", "--loops", "10000000"):
            done = run("record", "--events", "all", "--duration", "20", "-o", disk / "full.parquet")
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1
        assert "No space left on device" in lines[0]
        assert "kvmtrace recover" in lines[0]
        elsewhere = tmp_path / "rescued.parquet"
        assert run("recover", disk / "full.kvmt", "-o", elsewhere).returncode == 0
        assert Trace.open(elsewhere).metadata.raw["events"] > 1000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--vm", "4194304"], 2, "no such process"),
        (["--vm", "1"], 2, "no KVM virtual machine"),
        (["--vm", "web"], 2, "process id"),
        (["-o", "/nonexistent/x.parquet", "--duration", "1"], 2, "no such directory"),
        (["-o", "/proc/x.parquet", "--", "true"], 2, "/proc/x.kvmt"),
        (["--events", "rooots", "--", "true"], 2, "rooots"),
        (["--ring-size", "5000", "--", "true"], 2, "power of two"),
        (["--ring-size", "many", "--", "true"], 2, "not a size"),
        (["--", "no-such-command-here"], 2, "command not found"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    # With processes of its own: other people's VMs are not seen.
    words = ["unshare", "--pid", "--fork", "--mount-proc", *command("record", *arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvmtrace: ")
    assert said in lines[0]


def test_without_root_is_one_line(tmp_path: Path) -> None:
    """The verb runs once as root, up to its own check, so that nobody needs to read this interpreter's files."""
    script = (
        "import contextlib, os, sys, kvmtrace\n"
        "sys.argv = ['kvmtrace', 'record', '--vm', 'x', '-o', 'y.parquet']\n"
        "with contextlib.suppress(Exception): kvmtrace.app(standalone_mode=False)\n"
        "import tracer.recorder\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.argv = ['kvmtrace', 'record', '-o', 'y.parquet', '--', 'true']\n"
        "kvmtrace.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=1200, check=False, cwd=tmp_path
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr == "kvmtrace: recording needs root (CAP_BPF, CAP_PERFMON, tracefs): run it with sudo\n"


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.parquet"
    out.write_bytes(b"precious")
    done = run("record", "-o", out, "--", "true")
    assert done.returncode == 2
    assert "never overwritten" in done.stderr
    assert out.read_bytes() == b"precious"


def test_the_commands_status_is_told(tmp_path: Path) -> None:
    done = run("record", "-o", tmp_path / "false.parquet", "--", "false")
    assert done.returncode == 1
    assert "status 1" in done.stderr
    assert Trace.open(tmp_path / "false.parquet").metadata.raw["events"] >= 0
