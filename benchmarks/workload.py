# SPDX-License-Identifier: Apache-2.0
"""Run one command as a recorder's child: its JSON line and the CPU time it used go to a file.

A script of its own, so that every recorder starts the same thing: `python workload.py RESULT COMMAND...`. The
recorder's own CPU time is then that of its whole process tree minus what is written here (this interpreter included).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path


def main(result: str, *command: str) -> int:
    """Write {"output": the command's JSON, "cpu_seconds": user + system of it and of this process}; its exit status.

    "vmm_cpu_seconds" are those of the command alone.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own, vmm = (usage.ru_utime + usage.ru_stime for usage in used)
        found = {"output": json.loads(done.stdout), "cpu_seconds": own + vmm, "vmm_cpu_seconds": vmm}
        Path(result).write_text(json.dumps(found))
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
