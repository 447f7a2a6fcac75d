# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.lab.simultaneous DIRECTORY`: one run each of six scenarios, recorded by three tools at once.

kvmtrace, trace-cmd and perf record the same events on the same clock (CLOCK_MONOTONIC): what an import makes of the
files of the other two is compared with the trace that kvmtrace made itself. A boot of each kernel gives
SCENARIO-KERNEL.parquet, and of the others' files SCENARIO-KERNEL.dat.xz and .data.xz.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tracer import vmm
from tracer.lab import prebuilt
from tracer.lab.fetch import fetch
from tracer.lab.session import DEFAULT_TIMEOUT, SHARE, boot, several
from traces.errors import ENVIRONMENT, Problem

KERNELS: Final = ("5.10", "6.1", "6.12", "7.x")
# Few pages, so that what ships is small.
SCENARIOS: Final = {
    "smi-storm": ("--pages", "16", "--loops", "4"),
    "smi-both": ("--pages", "8", "--loops", "3"),
    "slot-delete": ("--pages", "16", "--loops", "3"),
    "dirty-log": ("--pages", "12"),
    "notifier": ("--pages", "16", "--loops", "3"),
    "churn": ("--pages", "16", "--loops", "2"),
}
# Both of trace-cmd's formats: 6, and 7 with compressed sections.
_TRACE_CMD: Final = {
    "5.10": ("--file-version", "6"),
    "6.1": ("--file-version", "6"),
    "6.12": ("--file-version", "7", "--compression", "zstd"),
    "7.x": ("--file-version", "7", "--compression", "zstd"),
}
_SCRIPT: Final = "beside.sh"
# $1: the name, $2: what is given to trace-cmd, then the workload. No addresses of the kernel's symbols go into
# trace.dat, which are megabytes; both write to the guest's memory first, for trace-cmd splices into its files.
_BESIDE: Final = f"""set -e
name=$1; options=$2; shift 2
mount --bind /dev/null /proc/kallsyms
trace-cmd record -q -C mono $options -b 16384 -e kvm -e kvmmmu -o /tmp/$name.dat \
    perf record -q -a -k mono -m 4M -B -N --no-bpf-event --synth=task -e 'kvm:*' -e 'kvmmmu:*' -o /tmp/$name.data \
    "$@" >&2
umount /proc/kallsyms
cp /tmp/$name.dat /tmp/$name.data {SHARE}
"""


def record(kernel: str, directory: Path, names: Iterable[str] = SCENARIOS) -> list[Path]:
    """Record scenarios on one kernel and return the files. Raises Problem where something is missing."""
    booted = fetch(kernel, lambda line: print(line, file=sys.stderr))
    jobs = {
        f"{name}-{kernel}": [
            "sh", f"{SHARE}/{_SCRIPT}", f"{name}-{kernel}", " ".join(_TRACE_CMD[kernel]),
            str(vmm.binary()), name, *SCENARIOS[name],
        ]
        for name in names
    }  # fmt: skip
    command, give = several(jobs, "mmu", segments=False)
    with tempfile.TemporaryDirectory(prefix="kvmtrace-beside-") as made:
        done = boot(
            booted,
            command,
            probes=prebuilt.have(booted),
            give={**give, _SCRIPT: _BESIDE},
            into=Path(made),
            timeout=2 * DEFAULT_TIMEOUT,
        )
        if done.code or done.signalled:
            raise Problem(f"{kernel}: {done.stderr.strip()[-300:]}", ENVIRONMENT)
        files = (f"{name}{ending}" for name in jobs for ending in (".parquet", ".dat", ".data"))
        return [_keep(Path(made) / file, directory) for file in files]


def _keep(made: Path, directory: Path) -> Path:
    """Move a file to where it is to stay: a trace as it is, files of the other tools compressed."""
    packed = made.suffix != ".parquet"
    kept = directory / f"{made.name}{'.xz' if packed else ''}"
    data = made.read_bytes()
    kept.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if packed else data)
    return kept


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for kernel in sys.argv[2:] or KERNELS:
            for file in record(kernel, directory):
                print(f"{file}: {file.stat().st_size:,} bytes")
    except Problem as problem:
        print(f"kvmtrace: {problem}", file=sys.stderr)
        raise SystemExit(problem.code) from None


if __name__ == "__main__":
    main()
