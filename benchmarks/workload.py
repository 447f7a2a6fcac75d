# SPDX-License-Identifier: Apache-2.0
"""Runs one command as the child of a recorder, and writes its JSON output and the CPU time that it used to a file.

A script of its own, so that every recorder starts the same thing: `python workload.py RESULT COMMAND...`. The
recorder's own CPU time is then that of its whole process tree, minus what is written here (which includes this
interpreter).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path


def main(result: str, *command: str) -> int:
    """Run the command, write what it took to the file `result`, and return its exit status.

    The file gets {"output": the command's JSON, "cpu_seconds": user and system time of the command and of this process,
    "vmm_cpu_seconds": that of the command alone}; it is not written if the command fails.
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
