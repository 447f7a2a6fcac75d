# SPDX-License-Identifier: Apache-2.0
"""Which VM of a recording is the test's own: on this machine others may run as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traces.reader import Trace


def noted(pid: Path, *command: str) -> list[str]:
    """The command, which writes its process id to a file first."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(pid), *command]


def own_vms(trace: Trace, pid: Path) -> list[dict[str, Any]]:
    """The VMs of the process that was noted so, as the metadata has them."""
    return [dict(vm) for vm in trace.metadata.vms if vm["pid"] == int(pid.read_text())]
