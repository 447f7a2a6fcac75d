# SPDX-License-Identifier: Apache-2.0
"""The command lines that README and docs/ print, and what stands beneath them as their output.

A command is a line indented by four spaces, or one after `$ ` in a block marked `console`; there what follows is its
output, up to a last line `...` where the rest is left out. `python -m tests.documents FILE...` writes the outputs anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[1]
DOCUMENTS: Final = (*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md")))
STARTS: Final = ("kvmtrace ", "cp ", "sudo kvmtrace ", "sudo kill ", "trace-cmd ")

# What a test cannot run, by how the line begins, and why.
NOT_RUN: Final = {
    "sudo ": "needs root and this machine's KVM; tests marked `live` record",
    "kvmtrace record": "needs root and this machine's KVM; tests marked `live` record",
    "kvmtrace dump": "asks a flight recorder that runs; tests/flight has them",
    "kvmtrace doctor": "says what this machine has: another one, other lines",
    "kvmtrace lab run": "boots a kernel; tests marked `lab` do",
    "kvmtrace lab fetch": "needs the network",
    "kvmtrace lab matrix": "boots many kernels",
    "kvmtrace probes": "needs a kernel's types or a compiler; tests/tracer/test_kept.py has them",
    "kvmtrace top stall.parquet": "is a screen; tests/top/test_terminal.py has a terminal",
    "kvmtrace --install-completion": "changes the shell's files",
    "kvmtrace fleet": "names places of the reader's host; tests/fleet has them",
    "kvmtrace report stall.parquet --guest": "names a guest's recording; tests of import have them",
    "kvmtrace export stall.parquet --csv guest_tasks": "the same",
    "kvmtrace export stall.parquet --perfetto -o stall.pftrace --guest": "the same",
    "kvmtrace import": "names files of the reader's; tests/traces/test_import.py has them",
    "trace-cmd report": "the same, of trace-cmd",
    "cp /usr/share": "firmware that is not everywhere, for a lab run",
}
# Of these kinds the ones that name only what ships, or what those before them in the same document have made.
RUN: Final = (
    "kvmtrace fleet index traces/corpus ",
    'kvmtrace fleet replay catalogue.parquet --where "trace LIKE',
    "kvmtrace fleet report results",
)
EXPECTED: Final = {
    "kvmtrace explore": (0, 1),  # 1: it has found what a scenario is there to show
    "kvmtrace fleet report results --fail-on": (1,),  # the recordings have soft-hangs
}


@dataclass(frozen=True)
class Command:
    """A printed command line, the lines beneath it, and where these stand in the document."""

    line: str
    output: tuple[str, ...] | None  # None: not printed
    begin: int
    end: int

    @property
    def shell(self) -> str:
        """The line without its remark, and without the backslashes that break it."""
        return self.line.replace("\\\n", " ")

    @property
    def not_run(self) -> str | None:
        """Why no test runs it, if none does."""
        if self.line.startswith(RUN):
            return None
        return next((why for start, why in NOT_RUN.items() if self.line.startswith(start)), None)

    @property
    def called(self) -> list[list[str]]:
        """The arguments of each kvmtrace in the line; there is more than one in a pipe."""
        lexer = shlex.shlex(self.shell, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        calls: list[list[str]] = []
        at: list[str] | None = None
        for word in lexer:
            if set(word) <= set("|;&<>"):
                at = None
            elif at is not None:
                at.append(word)
            elif word == "kvmtrace":
                at = []
                calls.append(at)
        return calls


def commands(path: Path) -> list[Command]:
    """Every command that a document prints, in order."""
    lines = path.read_text().splitlines()
    found: list[Command] = []
    fence: str | None = None
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
        elif fence == "console" and line.startswith("$ "):
            command, at = _whole(lines, at, line[2:], 0)
            begin = at
            while at < len(lines) and not lines[at].startswith(("$ ", "```")):
                at += 1
            output = tuple(lines[begin:at]) or None
            found.append(Command(command, output, begin, at))
        elif fence is None and line.startswith("    ") and line[4:].startswith(STARTS):
            command, at = _whole(lines, at, line[4:], 4)
            found.append(Command(command, None, at, at))
        elif fence in ("", "sh") and line.startswith(STARTS):
            command, at = _whole(lines, at, line, 0)
            found.append(Command(command, None, at, at))
    return found


def _whole(lines: list[str], at: int, first: str, indent: int) -> tuple[str, int]:
    """A command line with the lines that it goes on over, and the place after it."""
    command = first
    while command.endswith("\\"):
        command += "\n" + lines[at][indent:]
        at += 1
    return command, at


def environment(directory: Path, source: Path) -> dict[str, str]:
    """Of somebody with 80 columns whose `kvmtrace`, put below that directory, is that of a source tree."""
    program = directory / "bin" / "kvmtrace"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport kvmtrace\n\nif __name__ == '__main__':\n    kvmtrace.main()\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(source), "COLUMNS": "80"}


def typed(line: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A line of a shell."""
    return subprocess.run(
        [shutil.which("bash") or "sh", "-c", line],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip


class Reader:
    """Somebody who types a document's commands in a directory of their own, with the files that README names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("traces", "replay", "docs", "tests"):
            (directory / name).symlink_to(REPOSITORY / name)
        self.environment = environment(directory, REPOSITORY)
        for command in commands(REPOSITORY / "README.md"):
            if command.line.startswith("cp "):
                self.run(command)

    def run(self, command: Command) -> subprocess.CompletedProcess[str]:
        """Type it; where no output is printed, 100 million events become 100,000, and 4 GiB of a guest 16 MiB."""
        smaller = command.shell.replace("100000000", "100000").replace("--working-set 1048576", "--working-set 4096")
        line = f"{{ {smaller}\n}} 2>&1"
        return typed(line, self.directory, self.environment)


def figures_apart(lines: tuple[str, ...] | list[str]) -> list[str]:
    """Lines without their figures and units, which may change with a cost, and without the widths that follow them."""
    apart = []
    for line in lines:
        text = re.sub(r"\d[\d.,:TZ-]*(?: ?(?:ns|us|ms|s|KiB|MiB|GiB|%|x)\b)?%?", "#", line)
        apart.append(re.sub(r"\s+", " ", text).strip())
    return [line for line in apart if line]


def shown(command: Command, printed: str) -> list[str]:
    """Of what a command prints as much as stands in the document: all, or the lines before its `...`."""
    lines = [line.rstrip() for line in printed.rstrip("\n").splitlines()]
    if command.output and command.output[-1] == "...":
        return lines[: len(command.output) - 1]
    return lines


def renew(path: Path, directory: Path) -> None:
    """Write a document with its outputs as they are today."""
    reader = Reader(directory)
    lines = path.read_text().splitlines()
    moved = 0
    for command in commands(path):
        if command.not_run is not None:
            continue
        printed = reader.run(command).stdout
        if command.output is not None:
            new = shown(command, printed)
            if command.output[-1] == "...":
                new.append("...")
            lines[command.begin + moved : command.end + moved] = new
            moved += len(new) - len(command.output)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            renew(Path(name), Path(place))
