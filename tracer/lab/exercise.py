# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.lab.exercise`: do all of a recording but its probes, then list every file that was read.

A guest that cannot see this machine's file system is given these files: the interpreter, modules, shared libraries and
what they read. A recording of one made-up row is written; compacting it is left to this machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

_opened: set[str] = set()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        _opened.add(arguments[0])


def _record(directory: Path) -> None:
    """Write the segments of a recording of one row."""
    from importlib.metadata import version

    import numpy as np

    from tracer import several  # noqa: F401 - what a guest runs
    from tracer.probing.libbpf import libbpf
    from tracer.probing.offsets import Layout
    from tracer.probing.program import program
    from tracer.writer import SegmentThread
    from traces.record import RECORD
    from traces.schema import BY_NAME

    libbpf()
    program((), Layout({}, {}, ""))
    rows = np.zeros(1, RECORD)
    rows["kind"], rows["time"] = BY_NAME["kvm_entry"].code, 1
    writer = SegmentThread(directory / "a.kvmt", {"recorder": version("kvmtrace")})
    writer.write([rows], 10**18)
    writer.close(lambda: {"loss": {}})


def _mapped() -> set[str]:
    """Return the files mapped into this process: shared libraries, the interpreter and its loader."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) > 5 and parts[5].startswith("/")}


def main() -> None:
    sys.addaudithook(_note)
    with tempfile.TemporaryDirectory() as name:
        _record(Path(name))
    modules = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    start = {str(Path(prefix) / "pyvenv.cfg") for prefix in (sys.prefix, sys.base_prefix)}
    start |= {str(file) for directory in sys.path if directory for file in Path(directory).glob("*.pth")}
    ours = ("/proc/", "/sys/", "/dev/", f"{name}/")
    for path in sorted({*_opened, *_mapped(), *filter(None, modules), *start, sys.executable}):
        place = Path.cwd() / path
        if not str(place).startswith(ours) and place.exists():
            print(place)


if __name__ == "__main__":
    main()
