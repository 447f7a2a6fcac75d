# SPDX-License-Identifier: Apache-2.0
"""The worked examples of CONTRIBUTING.md, done in a copy of the repository: a kernel version, a probe, a policy, ..."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents import REPOSITORY, environment, figures_apart, typed

LINKED = ("traces/corpus", "traces/simultaneous", "traces/timing", "tests/recordings")


@dataclass(frozen=True)
class WorkedExample:
    """A section of CONTRIBUTING.md: the diffs that it shows, and the commands to run afterwards with their output."""

    title: str
    diffs: tuple[str, ...]
    commands: tuple[tuple[str, tuple[str, ...]], ...]


def worked_examples() -> list[WorkedExample]:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    found = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        blocks = re.findall(r"^```(diff|console scratch)\n(.*?)^```$", section, flags=re.M | re.S)
        diffs = tuple(body for kind, body in blocks if kind == "diff")
        commands = []
        for _, body in (block for block in blocks if block[0] != "diff"):
            for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
                line, *output = part.splitlines()
                commands.append((line, tuple(output)))
        if diffs:
            found.append(WorkedExample(section.splitlines()[0], diffs, tuple(commands)))
    return found


class ScratchCopy:
    """The files that git knows, copied, with the compiled modules next to them; recordings are linked."""

    def __init__(self, place: Path) -> None:
        self.place = place
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if listed.returncode:
            pytest.skip("not a git checkout")
        compiled = [
            path.relative_to(REPOSITORY) for top in ("replay", "traces") for path in (REPOSITORY / top).rglob("*.so")
        ]
        for file in (*map(Path, listed.stdout.split()), *compiled):
            if not str(file).startswith(LINKED) and (REPOSITORY / file).is_file():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / file, place / file)
        for name in LINKED:
            (place / name).symlink_to(REPOSITORY / name)
        self.environment = environment(place, place)
        # The checks that the page names are those of this environment.
        self.environment["PATH"] = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def apply(self, diff: str) -> None:
        """Line numbers in a document's diff stand for nothing: its lines of context are looked for."""
        for of_file in re.split(r"^(?=--- )", diff, flags=re.M)[1:]:
            done = subprocess.run(
                ["git", "apply", "--recount", "--unidiff-zero", "-"],
                input=of_file, cwd=self.place, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        return typed(line, self.place, self.environment)


EXAMPLES = worked_examples()


def test_every_kind_of_addition_has_its_example() -> None:
    assert [example.title for example in EXAMPLES] == [
        "Add a kernel version", "Add a probe", "Add a policy", "Add a query", "Add a scenario",
        "Add a kernel to the lab", "Add an import format",
    ]  # fmt: skip
    assert all(example.commands for example in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_a_worked_example_works(example: WorkedExample, tmp_path: Path) -> None:
    copy = ScratchCopy(tmp_path)
    for diff in example.diffs:
        copy.apply(diff)
    for line, output in example.commands:
        done = copy.run(line)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if "pytest" in line:
            continue
        printed = figures_apart(done.stdout.splitlines())
        if output and output[-1] == "...":
            wanted = figures_apart(output[:-1])
            assert printed[: len(wanted)] == wanted, line
            assert len(printed) >= max(len(wanted), 1), line
        else:
            assert printed == figures_apart(output), line


@pytest.mark.nightly
def test_all_of_them_at_once_pass_the_checks(tmp_path: Path) -> None:
    copy = ScratchCopy(tmp_path)
    for example in EXAMPLES:
        for diff in example.diffs:
            copy.apply(diff)
    for line in ("python -m ruff check .", "python -m ruff format --check .", "python -m mypy"):
        done = copy.run(line)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
