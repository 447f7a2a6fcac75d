# SPDX-License-Identifier: Apache-2.0
"""Several recordings with one set of probes: each is whole, and none sees the other's counts or threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.own_vm import noted, own_vms
from traces.reader import Trace


def batch(specification: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracer.several", str(specification)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_each_recording_stands_alone(tmp_path: Path, vmm: str) -> None:
    commands = {"first": [vmm, "roots"], "second": [vmm, "slot-delete"], "third": [vmm, "roots"]}
    jobs = [
        {"out": str(tmp_path / f"{name}.parquet"), "command": noted(tmp_path / name, *command)}
        for name, command in commands.items()
    ]
    specification = tmp_path / "jobs.json"
    specification.write_text(json.dumps({"events": "mmu", "jobs": jobs}))
    done = batch(specification)
    assert done.returncode == 0, done.stderr
    created = {}
    for name, command in commands.items():
        out = tmp_path / f"{name}.parquet"
        assert Trace.open(out).metadata.raw["complete"] is True
        assert json.loads(out.with_suffix(".stdout").read_text())["scenario"] == command[1]
        (vm,) = own_vms(Trace.open(out), tmp_path / name)
        pages = pl.scan_parquet(out).filter(pl.col("kind") == "kvm_mmu_get_page", pl.col("vm") == vm["id"]).collect()
        created[name] = len(pages)
    assert created["first"] == created["third"] > created["second"] > 0


def test_a_failing_job_ends_the_batch(tmp_path: Path) -> None:
    specification = tmp_path / "jobs.json"
    jobs = [{"out": str(tmp_path / "x.parquet"), "command": ["no-such-command-here"]}]
    specification.write_text(json.dumps({"events": "mmu", "jobs": jobs}))
    done = batch(specification)
    assert done.returncode in (2, 3)
    assert len(done.stderr.strip().splitlines()) == 1
