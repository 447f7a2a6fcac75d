# SPDX-License-Identifier: Apache-2.0
"""Man pages, made from the command line's own help: `python scripts/man.py DIRECTORY`, a page for each verb."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer

import kvmtrace
from traces.command_line.help_text import examples_of

VERSION: Final[str] = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
_EXIT_CODES = {
    "0": "It is fine.",
    "1": "A verdict or a gate failed.",
    "2": "Bad input, bad usage, or nowhere to write.",
    "3": "The environment lacks something; the message ends with the command that gets it.",
    "130": "Interrupted with Ctrl-C.",
}


def roff(text: str) -> str:
    """Text as a line of roff that shows it as it is."""
    text = text.rstrip().replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return "\\&" + text if text.startswith(".") else text


def _prose(text: str) -> str:
    return roff(" ".join(text.split()))


def _section(name: str, *lines: str) -> list[str]:
    return [f".SH {name}", *lines] if lines else []


def _entries(entries: Iterator[tuple[str, str]]) -> list[str]:
    return [line for term, text in entries for line in (".TP", f"\\fB{roff(term)}\\fR", _prose(text))]


def _records(context: Any, kind: str) -> Iterator[tuple[str, str]]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and parameter.param_type_name == kind:
            yield record


def page(context: Any) -> str:
    """The page of one command, in roff's man macros."""
    command, name = context.command, context.command_path.replace(" ", "-")
    commands = getattr(command, "commands", {})
    note, lines = examples_of(command.epilog or "")
    usage = " ".join(command.collect_usage_pieces(context))
    examples = [line for each in lines for line in (".PP", ".nf", *map(roff, each.splitlines()), ".fi")]
    others = sorted(
        {context.parent.command_path if context.parent else "", *(f"{context.command_path} {c}" for c in commands)}
    )
    head = " ".join(f'"{part}"' for part in (name.upper(), "1", "", f"kvmtrace {VERSION}", "kvmtrace"))
    return "\n".join([
        f".TH {head}",
        *_section("NAME", f"{roff(name)} \\- {roff(command.get_short_help_str(200).rstrip('.'))}"),
        *_section("SYNOPSIS", f"\\fB{roff(context.command_path)}\\fR {roff(usage)}"),
        *_section("DESCRIPTION", _prose(command.help or ""), *([".PP", _prose(note)] if note else [])),
        *_section("COMMANDS", *_entries((each, sub.help or "") for each, sub in commands.items())),
        *_section("ARGUMENTS", *_entries(_records(context, "argument"))),
        *_section("OPTIONS", *_entries(_records(context, "option"))),
        *_section("EXIT STATUS", *_entries(iter(_EXIT_CODES.items()))),
        *_section("EXAMPLES", *examples),
        *_section("SEE ALSO", ", ".join(f"\\fB{roff(each.replace(' ', '-'))}\\fR(1)" for each in others if each)),
        "",
    ])  # fmt: skip


def contexts(context: Any | None = None) -> Iterator[Any]:
    """Each command's context, groups before what is in them."""
    if context is None:
        command = typer.main.get_command(kvmtrace.app)
        context = command.make_context("kvmtrace", [], resilient_parsing=True)
    yield context
    for name, command in getattr(context.command, "commands", {}).items():
        yield from contexts(command.make_context(name, [], parent=context, resilient_parsing=True))


def pages() -> Iterator[tuple[str, str]]:
    """Each command's name and page."""
    for context in contexts():
        yield context.command_path.replace(" ", "-"), page(context)


def main(directory: str) -> None:
    """Write them all."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (Path(directory) / f"{name}.1").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
