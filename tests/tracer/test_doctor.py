# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace doctor` as root, as an ordinary user, and where bcc is missing: each says the right thing, exits 0 or 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NOT_ROOT

# An ordinary user cannot read this interpreter when it lies under a private home: run the verb once as root, which
# imports everything, then become nobody and run it again.
AS_NOBODY = """
import contextlib, io, os, sys
import kvmtrace
sys.argv = ["kvmtrace", "doctor", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()):
    kvmtrace.app(standalone_mode=False)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
kvmtrace.main()
"""


def doctor(*arguments: str, nobody: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", AS_NOBODY] if nobody else ["-m", "kvmtrace", "doctor"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True, text=True, timeout=1200, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    document = json.loads(done.stdout)
    assert document["schema"] == 2
    assert document["can_record"] is (done.returncode == 0)
    return {check["name"]: check for check in document["checks"]}


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_as_root() -> None:
    done = doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks(done)
    assert {found[name]["state"] for name in ("privileges", "bcc", "kernel headers", "tracefs", "BTF")} == {"ok"}
    document = json.loads(done.stdout)
    assert {"kvm_mmu_get_page", "kvm_mmu_zap_all_fast", "ioctl", "memslot"} <= set(document["observable"])
    absent = [probe for probe in document["probes"] if probe["how"] == "none"]
    assert all(probe["why"] for probe in absent), "what cannot be observed has a reason"
    text = doctor().stdout
    assert "this machine can record" in text
    assert len(text.splitlines()) < 60, "one screen"


@pytest.mark.slow
def test_as_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip(NOT_ROOT)
    done = doctor("--json", nobody=True)
    assert done.returncode == 3, done.stdout + done.stderr
    found = checks(done)
    assert found["privileges"]["state"] == "FAIL"
    assert "sudo" in found["privileges"]["fix"]
    assert found["tracefs"]["state"] in ("unseen", "ok")
    assert found["KVM's counters"]["state"] in ("unseen", "ok")
    assert not done.stderr


@pytest.mark.slow
def test_with_bcc_missing(tmp_path: Path) -> None:
    lacking = {"KVMTRACE_WITHOUT_BCC": "1", "KVMTRACE_PROBES": str(tmp_path)}
    done = doctor("--json", **lacking)
    assert done.returncode == 3
    found = checks(done)
    assert found["bcc"]["state"] == "FAIL"
    assert found["bcc"]["fix"] == "apt-get install python3-bpfcc"
    assert "apt-get install python3-bpfcc" in doctor(**lacking).stdout


def test_with_headers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.probing import headers
    from traces.errors import Problem

    monkeypatch.delenv(headers.VARIABLE, raising=False)
    monkeypatch.setattr(headers, "SOURCES", tmp_path)
    monkeypatch.setattr(headers.platform, "release", lambda: "9.9.9-none")
    with pytest.raises(Problem, match="apt-get install linux-headers-amd64") as caught:
        headers.find_headers()
    assert caught.value.code == 3


def test_debians_two_header_trees_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.probing import headers

    for tree, file in (("amd64", "generated/x.h"), ("common", "linux/kconfig.h")):
        path = tmp_path / f"linux-headers-6.1.0-9-{tree}" / "include" / file
        path.parent.mkdir(parents=True)
        path.write_text(tree)
    monkeypatch.delenv(headers.VARIABLE, raising=False)
    monkeypatch.setattr(headers, "SOURCES", tmp_path)
    monkeypatch.setattr(headers.platform, "release", lambda: "9.9.9-none")
    with headers.headers():
        joined = Path(os.environ[headers.VARIABLE])
        assert (joined / "include/generated/x.h").read_text() == "amd64"
        assert (joined / "include/linux/kconfig.h").read_text() == "common"
    assert headers.VARIABLE not in os.environ
    assert not joined.exists()


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_what_is_to_be_mounted_is_there_after_the_commands_it_names(tmp_path: Path) -> None:
    bare = tmp_path / "bare.sh"
    bare.write_text(
        "for place in /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug; do\n"
        "    while umount -q $place; do :; done\n"
        "done\n"
        f"{sys.executable} -m kvmtrace doctor --json >{tmp_path}/before\n"
        f'grep -o \'"fix": "mount [^"]*\' {tmp_path}/before | cut -d\'"\' -f4 | sh -e\n'
        f"{sys.executable} -m kvmtrace doctor --json >{tmp_path}/after\n"
    )
    subprocess.run(["unshare", "--mount", "sh", str(bare)], check=True, timeout=1200)
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("before", "after"))
    states = [{each["name"]: each["state"] for each in one["checks"]} for one in (before, after)]
    assert (states[0]["tracefs"], states[0]["KVM's counters"]) == ("FAIL", "note")
    assert (states[1]["tracefs"], states[1]["KVM's counters"]) == ("ok", "ok")
    assert (before["can_record"], after["can_record"]) == (False, True)
