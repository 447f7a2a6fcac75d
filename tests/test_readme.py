"""The command lines that README and docs/ print: each is understood, and README's work as printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_help import ROOT

REPOSITORY = Path(__file__).parents[1]
PRINTED = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def printed(path: Path) -> list[str]:
    """The command lines in a document's indented blocks; one that goes on over lines as one."""
    text = path.read_text()
    return [line.replace("\\\n", " ") for line in re.findall(r"^    ((?:kvmtrace|cp) .*(?:(?<=\\)\n.*)*)$", text, re.M)]


@pytest.mark.parametrize("path", PRINTED, ids=lambda path: path.name)
def test_every_printed_command_line_is_understood(path: Path) -> None:
    for line in printed(path):
        words = shlex.split(line, comments=True)
        if words[0] == "kvmtrace":
            command = ROOT
            given = words[1:]
            if given[0].startswith("-"):
                assert given[0] in {option for each in ROOT.params for option in each.opts}, line
                continue
            while hasattr(command, "commands"):
                command = command.commands[given.pop(0)]
            command.make_context("it", given)


ELSEWHERE = ("kvmtrace doctor", "kvmtrace record", "kvmtrace dump", "kvmtrace lab", "kvmtrace --install-completion")
FOUND = {"kvmtrace explore vm-destroy --variant v2": 1}  # it is there to find something


@pytest.mark.slow
def test_readmes_commands_work_as_printed(tmp_path: Path) -> None:
    for name in ("traces", "replay"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    command = tmp_path / "bin" / "kvmtrace"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport kvmtrace\n\nif __name__ == '__main__':\n    kvmtrace.main()\n")
    command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80",
    }  # fmt: skip
    run = [line for line in printed(REPOSITORY / "README.md") if not line.startswith(ELSEWHERE)]
    assert len(run) > 20
    for line in run:
        done = subprocess.run(
            [shutil.which("bash") or "sh", "-c", line.replace("100000000", "100000")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        expected = FOUND.get(line.partition("#")[0].strip(), 0)
        assert done.returncode == expected, (line, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr, line


def test_modules_and_files_that_texts_name_are_there() -> None:
    """Documents, help and messages name modules as `replay.simulate.policy_api.Policy`, files as `traces/SPEC.md`."""
    packages = "analysis|benchmarks|replay|scripts|tests|tracer|traces"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = listed.stdout.split()
    gone = []
    for file in files:
        if not file.endswith((".md", ".py")) or file.startswith("tests/"):
            continue
        text = (REPOSITORY / file).read_text()
        for name in set(re.findall(rf"\b(?:{packages})(?:\.[a-z]\w*)+\b(?!/)", text)):
            parts = name.split(".")
            # A module, or what it defines: the package alone does not do.
            places = [REPOSITORY / Path(*parts[:end]) for end in range(2, len(parts) + 1)]
            if not any(place.is_dir() or place.with_suffix(".py").exists() for place in places):
                gone.append(f"{file}: {name}")
        for name in set(re.findall(rf"\b(?:{packages})/[\w/.-]+\.(?:py|md|c|h|json|parquet)\b", text)):
            if name not in files:
                gone.append(f"{file}: {name}")
    assert not gone
