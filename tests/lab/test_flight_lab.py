# SPDX-License-Identifier: Apache-2.0
"""Hangs on real kernels: each makes one dump, which begins before it and names its cause. What is well makes none."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import NO_VARIANT
from tracer import vmm
from tracer.lab import prebuilt
from tracer.lab.fetch import choose, present
from tracer.lab.session import SHARE, boot
from traces.reader import Trace

pytestmark = pytest.mark.lab
SECOND = 10**9
ROOTS = "roots > 2/s for 4s"  # one a pass under the old policy: an emulated pass of 64 pages takes a tenth of a second
LOOPS = ("same-rip > 10000", "same-gfn > 100", "errors > 0 for 1s")
STORM = "smi-storm --loops 100 --pages 64 --timeout 600"


def fly(kernel: str, into: Path, triggers: Sequence[str], scenario: str, after: str = "500ms") -> list[Path]:
    """The dumps of a flight over a scenario on a kernel, each of them ending `after` its trigger."""
    python = sys.executable
    asked = " ".join(f"--trigger '{trigger}'" for trigger in triggers)
    script = (
        f"d=$(mktemp -d) && {python} -m kvmtrace record --flight 60s --after {after} {asked} -o $d"
        f" -- {vmm.binary()} {scenario} && cp $d/*.parquet {SHARE}/; true"
    )
    chosen = choose(kernel, None)
    finished = boot(chosen, ["sh", "-c", script], probes=prebuilt.have(chosen), into=into, timeout=1800)
    assert ": 1 dump; " in finished.stderr or ": 0 dumps; " in finished.stderr, finished.stderr
    return list(into.glob("*.parquet"))


def kvmtrace(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", *map(str, words)], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_old_policys_storm_is_dumped_from_its_beginning_and_named(tmp_path: Path) -> None:
    if present("6.1-async") is None:
        pytest.skip(NO_VARIANT)
    (dump,) = fly("6.1-async", tmp_path, [ROOTS], STORM)
    meta = Trace.open(dump).metadata
    facts = meta.raw["flight"]
    assert facts["trigger"] == "roots"
    assert meta.complete, meta.discrepancies
    made = pl.scan_parquet(dump).filter(
        pl.col("kind") == "kvm_mmu_get_page", pl.col("flags") & 1 == 1, pl.col("root") > 0
    )
    times = made.sort("time").select("time").collect()["time"].to_list()
    assert len([time for time in times if facts["time"] - 4 * SECOND < time <= facts["time"]]) > 8 * 7 / 8
    assert facts["begins"] < times[0], "the first root is there"
    assert facts["time"] <= times[8] + 4 * SECOND, "within twice its time from when there were enough"
    assert kvmtrace("validate", dump).startswith("100 %")
    report = kvmtrace("report", dump)
    verdict = report.split("\n\n")[0]
    assert "under async (as recorded)" in verdict
    # A fast machine emulates the storm without a soft-hang, whose cause the verdict would name, too.
    assert "gone with its root (SMI, " in " ".join(verdict.split())
    assert "SMI: root lost" in report


@pytest.mark.parametrize(
    ("scenario", "trigger", "cause"),
    [
        ("mmio-poll --loops 2000", "same-gfn", "emulated MMIO at gpa 0x200000 (gfn 0x200), in no memslot"),
        ("efault --loops 2000", "errors", "KVM_RUN fails with EFAULT (errno 14)"),
    ],
)
def test_a_vcpu_that_loops_is_dumped_from_its_beginning_and_named(
    scenario: str, trigger: str, cause: str, tmp_path: Path
) -> None:
    asked = [each for each in LOOPS if each.startswith(trigger)]
    (dump,) = fly("6.1", tmp_path, asked, scenario, after="5s")  # a busy machine emulates some hundred loops a second
    meta = Trace.open(dump).metadata
    facts = meta.raw["flight"]
    assert facts["trigger"] == trigger
    assert meta.complete, meta.discrepancies
    looping = (pl.col("kind") == "kvm_page_fault") & (pl.col("addr") == 0x200000)
    if trigger == "errors":
        looping = (pl.col("kind") == "kvm_userspace_exit") & (pl.col("ret") == -errno.EFAULT)
    times = pl.scan_parquet(dump).filter(looping).sort("time").select("time").collect()["time"].to_list()
    assert facts["begins"] < times[0], "what led to it is there"
    first = (
        pl.scan_parquet(dump).filter(pl.col("kind") == "kvm_page_fault").select(pl.col("time").min()).collect().item()
    )
    assert first < times[0], "and the pages that it had before"
    verdict = " ".join(kvmtrace("report", dump).split("\n\n")[0].split())
    assert verdict.startswith("vCPU 0 of VM 1 (kvmtrace-vmm ")
    assert cause in verdict


def test_the_new_policys_storm_triggers_nothing(tmp_path: Path) -> None:
    assert fly("6.1", tmp_path, [ROOTS, *LOOPS], STORM) == []
