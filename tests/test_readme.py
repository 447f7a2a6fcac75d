# SPDX-License-Identifier: Apache-2.0
"""README and docs: commands work and print what stands there, links and names lead somewhere, README is short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.documents import DOCUMENTS, EXPECTED, NOT_RUN, REPOSITORY, Reader, commands, figures_apart, shown
from tests.test_help import ROOT

WITH_PYTHON: Final = (*DOCUMENTS, *REPOSITORY.glob("*/*.md"))


def programs(path: Path) -> list[str]:
    """The Python that a document prints."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_printed_command_line_is_understood(path: Path) -> None:
    for printed in commands(path):
        for given in printed.called:
            command = ROOT
            if given[0].startswith("-"):
                assert given[0] in {"--help", *(option for each in ROOT.params for option in each.opts)}, printed.line
                continue
            while hasattr(command, "commands"):
                command = command.commands[given.pop(0)]
            command.make_context("it", given)


def test_of_commands_that_no_test_runs_each_kind_is_printed_somewhere() -> None:
    printed = [command.line for path in DOCUMENTS for command in commands(path)]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in printed)]
    assert sum(command.not_run is None for path in DOCUMENTS for command in commands(path)) > 60


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if any(each.not_run is None for each in commands(path))],
    ids=lambda path: path.name,
)
def test_commands_work_and_print_what_stands_there(path: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for command in commands(path):
        if command.not_run is not None:
            continue
        done = reader.run(command)
        expected = next((codes for start, codes in EXPECTED.items() if command.line.startswith(start)), (0,))
        assert done.returncode in expected, (command.line, done.returncode, done.stdout)
        assert "Traceback" not in done.stdout, command.line
        if command.output is not None:
            wanted = command.output[:-1] if command.output[-1] == "..." else command.output
            assert figures_apart(shown(command, done.stdout)) == figures_apart(wanted), command.line


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in WITH_PYTHON if programs(path)], ids=lambda path: path.name)
def test_programs_run_or_are_a_part_of_an_example_that_ships(path: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    examples = [example.read_text() for example in (REPOSITORY / "replay/examples").glob("*.py")]
    for program in programs(path):
        if program.startswith(("import ", "from ")):
            done = subprocess.run(
                [sys.executable, "-c", program],
                cwd=reader.directory, env=reader.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        else:
            assert any(program in example for example in examples), program


def test_targets_of_make_that_documents_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    named = {
        (path.name, target)
        for path in (*DOCUMENTS, *REPOSITORY.glob("*/*.md"))
        for target in re.findall(r"(?:^    |`|&& |run: )make ([a-z][a-z-]+)(?=[ `\n])", path.read_text(), re.M)
    }
    ours = {each for each in named if each[1] not in ("modules_install", "headers_install")}  # the kernel's own
    assert len(ours) > 10
    assert not [each for each in ours if each[1] not in targets]


def test_links_of_documents_lead_somewhere() -> None:
    gone = []
    for path in (*DOCUMENTS, *REPOSITORY.glob("*/*.md"), *(REPOSITORY / "tests/recordings").glob("*.md")):
        text = path.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target and not target.startswith(("#", "mailto:")):
                place, _, part = target.partition("#")
                found = path.parent / place
                if not found.exists() or (part and part not in anchors(found)):
                    gone.append(f"{path.relative_to(REPOSITORY)}: {target}")
    assert not gone


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_names_every_document() -> None:
    index = (REPOSITORY / "docs/README.md").read_text()
    assert not [
        path.name
        for path in (REPOSITORY / "docs").glob("*.md")
        if f"({path.name})" not in index and path.name != "README.md"
    ]


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
            if name not in files and f"+++ b/{name}" not in text:  # a worked example adds it
                gone.append(f"{file}: {name}")
    assert not gone
