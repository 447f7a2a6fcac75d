# SPDX-License-Identifier: Apache-2.0
"""What is made from the command line's own help: `--help` with examples that work, shell completion, man pages."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

import kvmtrace
from scripts import man
from tests.test_cli import kvmtrace as run
from tests.verbs import RECORDERS, TALKERS, WRITERS
from traces.command_line.help_text import examples, examples_of

ROOT: Any = typer.main.get_command(kvmtrace.app)
COLUMNS = 80
GROUPS = (("lab",), ("probes",), ("fleet",))  # their verbs have the examples
REPOSITORY = Path(__file__).parents[1]


def commands(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its path, groups among them."""
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


COMMANDS = [pytest.param(path, command, id=" ".join(path) or "kvmtrace") for path, command in commands()]


def help_of(path: tuple[str, ...], command: Any) -> str:
    context: Any = None
    each = ROOT
    for name in ("kvmtrace", *path):
        each = each if context is None else each.commands[name]
        context = each.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=COLUMNS - 2)
    return str(command.get_help(context))


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_help_is_fitted_to_80_columns_and_no_summary_is_cut(path: tuple[str, ...], command: Any) -> None:
    text = help_of(path, command)
    assert all(len(line) <= COLUMNS for line in text.splitlines()), max(text.splitlines(), key=len)
    summaries = text.partition("Commands:")[2].partition("\n\n")[0]
    assert "..." not in summaries


@pytest.mark.parametrize(("path", "command"), [each for each in COMMANDS if each.values[0] not in GROUPS])
def test_examples_stand_on_lines_of_their_own_and_are_understood(path: tuple[str, ...], command: Any) -> None:
    _, shown = examples_of(command.epilog)
    text = help_of(path, command)
    assert shown
    for example in shown:
        assert all(f"    {line}\n" in f"{text}\n" for line in example.splitlines())
        line = shlex.split(example.replace("\\\n", "").removeprefix("sudo "))
        words = list(takewhile(lambda word: not word.startswith(">"), line))
        assert words[: 1 + len(path)] == ["kvmtrace", *path]
        given, called = words[1:], ROOT
        while hasattr(called, "commands"):
            called = called.commands[given.pop(0)]
        called.make_context("it", given)  # raises what the command line would say


# Options whose name stands for something else in each verb.
OF_EACH_VERB = {
    "--output", "--format", "--policy", "--events", "--duration", "--kernel", "--cpu", "--scenario", "--list",
    "--memory", "--replay", "--smi-rate",
}  # fmt: skip


def test_an_option_of_several_verbs_says_the_same_in_each() -> None:
    said: dict[str, dict[str, str]] = {}
    for path, command in commands():
        for parameter in command.params if path else ():
            if parameter.param_type_name == "option":
                said.setdefault(parameter.opts[-1], {})[" ".join(path)] = parameter.help
    said["--vm"].pop("record")  # of a process, not of a trace
    said["--vm"].pop("diff")  # of two traces
    said["--fail-on"].pop("fleet report")  # on figures of a fleet
    unlike = {name: helps for name, helps in said.items() if len(set(helps.values())) > 1}
    assert set(unlike) == OF_EACH_VERB


def test_every_command_and_mode_is_among_the_verbs_that_tests_walk() -> None:
    walked = [verb.line.split() for verb in (*WRITERS, *RECORDERS, *TALKERS)]
    for path, command in commands():
        if hasattr(command, "commands"):
            continue
        lines = [line for line in walked if tuple(line[: len(path)]) == path]
        assert lines, f"{' '.join(path)}: no test walks it"
        for parameter in command.params:
            helped = getattr(parameter, "help", None) or ""
            if parameter.name == "as_json" or helped.startswith("Mode:"):
                option = parameter.opts[-1]
                assert any(option in line for line in lines), f"{' '.join(path)} {option}: no test walks it"
    formats = {line[line.index("--format") + 1] for line in walked if "--format" in line}
    assert formats == {"text", "md", "mail", "html", "json", "junit"}


def test_an_epilog_is_read_as_it_was_made() -> None:
    lines = ["kvmtrace a", "kvmtrace b \\\n  --c", "kvmtrace d"]
    assert examples_of(examples(*lines)) == ("", lines)
    assert examples_of(examples(*lines, note="Note.")) == ("Note.", lines)


def test_the_version_is_the_packages_and_nothing_heavy_is_loaded_for_it() -> None:
    assert run("--version").stdout == f"kvmtrace {version('kvmtrace')}\n"
    code = "import sys; sys.argv = ['kvmtrace', '--version']\ntry:\n import kvmtrace; kvmtrace.main()\n"
    code += "except SystemExit: pass\nprint(sorted({'numpy', 'polars', 'pyarrow', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert done.stdout.splitlines()[1] == "[]"


BASH = """
eval "$(_KVMTRACE_COMPLETE=source_bash kvmtrace)"
COMP_WORDS=({words}); COMP_CWORD={at}; COMP_LINE=; COMP_POINT=0
$(complete -p kvmtrace | sed 's/.*-F \\([^ ]*\\) .*/\\1/') kvmtrace
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# compsys wants a terminal; what our function hands to it can be seen without one.
ZSH = """
compdef() {{ :; }}
eval "$(_KVMTRACE_COMPLETE=source_zsh kvmtrace)"
_arguments() {{ print -r -- "$@"; }}
_files() {{ print FILES; }}
words=({words}); CURRENT={at}+1
_kvmtrace_completion
"""


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvmtrace re", ["record", "recover", "replay", "report"]),
        ("kvmtrace lab ma", ["matrix"]),
        ("kvmtrace export --p", ["--perfetto"]),
        ("kvmtrace info fi", []),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_shell_completes_verbs_and_options_and_leaves_files_to_itself(
    shell: str, words: str, offered: list[str], tmp_path: Path
) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    command = tmp_path / "kvmtrace"
    command.write_text(f"#!{sys.executable}\nimport kvmtrace\nkvmtrace.main()\n")
    command.chmod(0o755)
    done = subprocess.run(
        [shell, "-c", {"bash": BASH, "zsh": ZSH}[shell].format(words=words, at=len(words.split()) - 1)],
        capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    said = done.stdout
    assert not done.stderr
    if offered:
        assert all(word in said for word in offered)
        assert "info" not in said
    else:
        assert said.strip() in ("", "FILES")


def test_completion_for_a_shell_that_is_not_known_is_no_verdict() -> None:
    assert run(_KVMTRACE_COMPLETE="source_tcsh").returncode == 2


@pytest.mark.slow
def test_a_man_page_for_every_command_with_all_that_its_help_has(tmp_path: Path) -> None:
    man.main(str(tmp_path))
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(there) == {"-".join(("kvmtrace", *path)) + ".1" for path, _ in commands()}
    for path, command in commands():
        page = there["-".join(("kvmtrace", *path)) + ".1"]
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option.replace("-", "\\-") in page
    if not shutil.which("man"):
        pytest.skip("no man here to render them")
    for file in tmp_path.iterdir():
        done = subprocess.run(
            ["man", "--warnings", "-l", str(file)],
            capture_output=True, text=True, timeout=1200, check=True, env={**os.environ, "MANWIDTH": "80"},
        )  # fmt: skip
        assert not done.stderr, "groff has nothing to complain of"
        assert file.stem.upper() in done.stdout
        assert all(section in done.stdout for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS"))
