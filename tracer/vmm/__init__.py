# SPDX-License-Identifier: Apache-2.0
"""The VMM of the project: a static C program over /dev/kvm with named scenarios that make MMU events in volume."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from traces.errors import ENVIRONMENT, Problem

HERE = Path(__file__).parent
BINARY = HERE / "kvmtrace-vmm"
# Static, so that the same file runs inside the kernel lab's guests, whose libraries may be others or none.
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
INSTALL = "sudo apt-get install gcc libc6-dev"


class VmmScenario(NamedTuple):
    """A scenario of the VMM: its name, one line on what it shows, and the default of every option that it takes."""

    name: str
    shows: str
    defaults: dict[str, Any]
    needs_smm: bool


def binary() -> Path:
    """Return the path of the built program, which is built if it is missing or older than its sources.

    Raises Problem (3) where there is no compiler, or no static C library, to build it with.
    """
    inputs = [*HERE.glob("*.c"), *HERE.glob("*.h")]
    if not BINARY.exists() or BINARY.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        _build(sorted(str(path) for path in inputs if path.suffix == ".c"))
    return BINARY


def scenarios() -> list[VmmScenario]:
    """Return all scenarios, as the program itself lists them."""
    listed = subprocess.run([binary(), "--list"], check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in listed.splitlines()]
    return [VmmScenario(row["name"], row["shows"], row["defaults"], row["needs_smm"]) for row in rows]


def _build(sources: list[str]) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Problem(f"no C compiler to build {BINARY.name} with: {INSTALL}", ENVIRONMENT)
    try:
        # Into a directory of its own and then renamed: two builds at once, or one cut short, leave no half program.
        with tempfile.TemporaryDirectory(prefix=".build-", dir=HERE) as scratch:
            built = Path(scratch) / BINARY.name
            done = subprocess.run([compiler, *FLAGS, "-o", built, *sources], capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
                reason = errors[0] if errors else f"{compiler} exited with {done.returncode}"
                raise Problem(f"cannot build {BINARY.name} ({reason}): {INSTALL}", ENVIRONMENT)
            built.replace(BINARY)
    except OSError as error:
        reason = f"cannot build {BINARY.name} in {HERE} ({error.strerror}): run make setup as its owner"
        raise Problem(reason, ENVIRONMENT) from error
