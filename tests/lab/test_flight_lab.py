# SPDX-License-Identifier: Apache-2.0
"""A storm on real kernels: the old policy's triggers a dump that names the cause, the new policy's triggers nothing."""

from __future__ import annotations

import subprocess
import sys
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
TRIGGER = (
    "roots > 2/s for 4s"  # one a pass under the old policy: an emulated pass of 64 pages takes a tenth of a second
)
STORM = "smi-storm --loops 100 --pages 64 --timeout 600"


def fly(kernel: str, into: Path) -> list[Path]:
    """The dumps of a flight over the storm on a kernel."""
    python = sys.executable
    script = (
        f"d=$(mktemp -d) && {python} -m kvmtrace record --flight 60s --after 500ms --trigger '{TRIGGER}' -o $d"
        f" -- {vmm.binary()} {STORM} && cp $d/*.parquet {SHARE}/; true"
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
    (dump,) = fly("6.1-async", tmp_path)
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


def test_the_new_policys_storm_triggers_nothing(tmp_path: Path) -> None:
    assert fly("6.1", tmp_path) == []
