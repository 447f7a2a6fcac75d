# SPDX-License-Identifier: Apache-2.0
"""Words that this project once used in a sense of its own, and what the field says instead.

Looked for in prose: documents, docstrings, comments, messages, help. Names in code (variables, keys of formats) are not
prose; a word in backticks or quotes is being spoken of, not used.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.documents import REPOSITORY

WORDS: Final = {
    r"foretell\w*|foretold": "predict",
    r"wholly": "entirely; for a share: 100 %",
    r"harmed|harms": "mutated; damages",
    r"mend\w*": "fix, repair",
    r"lock-step|lockstep": "conformance check",
    r"stimul\w+": "inputs",
    r"lowerings?": "specialization for a kernel",
    r"ghosts?|husks?": "remembered tree; invalid root",
    r"word index": "role index",
    r"(?:its|their|whose|'s|’s) doing|doings": "state; caused by",
    r"at the hands of": "by",
    r"the dearest|dearer": "largest cost; costs more",
    r"what (?:it|they|that time|the time) goes? on": "time by category",
    r"goes on with": "continues with",
    r"(?:and|or) (?:its|their) likes?": "and similar ones",
    r"nothing to go by|go(?:es)? by what": "undefined; depends on",
    r"by and by": "gradually",
    r"put down to": "attributed to",
    r"beside": "next to (a place), besides (in addition), compared with",
    r"h[eo]ld(?:s|ing)?(?: [^\s.:;]+){0,12} against": "compared with, checked against",
    r"told apart|told of": "distinguished; reported",
    r"can(?:not)? be told|could be told|as told|ha(?:d|s|ve) told": "determined; given; reported",
    r"(?:comes?|came) to (?:the same|a stop|their ends?|an end)": "gives the same; stops, ends",
    r"what \S+(?: \S+)? (?:comes?|came) to": "the result of",
    r"left open|leaves? open": "undetermined by the trace",
    r"never came": "missing",
    r"of chance": "random",
    r"bring(?:s|ing)? about": "cause",
}
# A comment or a string of Python; the tree of `ast` says the same in six times the time.
TOKEN: Final = re.compile(
    r"""\#[^\n]* | (?P<prefix>\b[rbfu]{1,2}|)(?P<quote>\"{3}|'{3}|["'])(?P<text>(?:\\.|.)*?)(?P=quote)""",
    re.S | re.I | re.X,
)


def prose(path: Path, quoted: bool = False) -> list[tuple[int, str]]:
    """A file's prose, line by line: all of a document but its code, all comments and texts of a program.

    Without `quoted` what is in backticks or double quotes is left out.
    """
    text = path.read_text()
    if path.suffix == ".md":
        kept, code = [], False
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("```"):
                code = not code
            elif not code and not line.startswith("    "):
                kept.append((number, line))
    elif path.suffix == ".py":
        kept = [(at, line) for at, piece in _texts(text) for line in piece.splitlines()]
    else:
        kept = list(enumerate(text.splitlines(), 1))
    return kept if quoted else [(number, re.sub(r"`[^`]*`|\"[^\"]*\"", "", line)) for number, line in kept]


def _texts(source: str) -> list[tuple[int, str]]:
    """The strings of a program that are no keys (they have a blank in them), and its comments."""
    found: list[tuple[int, str]] = []
    number, first, at, pieces = 1, 1, 0, list[str]()
    for token in TOKEN.finditer(source):
        between = source[at : token.start()]
        if pieces and (token["text"] is None or between.strip()):
            found.append((first, "".join(pieces)))
            pieces = []
        number += between.count("\n")
        if token["text"] is None:
            found.append((number, token[0]))
        else:
            first = first if pieces else number
            pieces.append(_value(token))
        number += token[0].count("\n")
        at = token.end()
    if pieces:
        found.append((first, "".join(pieces)))
    return [(number, text) for number, text in found if " " in text.strip()]


def _value(literal: re.Match[str]) -> str:
    """A string's text: without the expressions of an f-string, and of escapes only newlines and tabs."""
    text = literal["text"]
    if "f" in literal["prefix"].lower():
        text = re.sub(r"\{[^{}]*\}", "{}", text)
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t", "\n": ""}.get(escape[1], escape[1]), text, flags=re.S)


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    named = [REPOSITORY / name for name in listed.stdout.split()]
    wanted = [path for path in named if path.suffix in (".md", ".py", ".c", ".h", ".html") and path.is_file()]
    return [path for path in wanted if path.name not in ("CHANGELOG.md", Path(__file__).name)]


def test_prose_has_none_of_the_words_that_only_we_would_understand() -> None:
    every = re.compile("|".join(rf"(?:\b(?:{word})\b)" for word in WORDS), re.I)
    hits = [
        f"{path.relative_to(REPOSITORY)}:{number}: {found[0]!r}"
        for path in files()
        for number, line in prose(path)
        if (found := every.search(line))
    ]
    assert not hits, "\n".join(hits)


def test_the_search_finds_words_where_they_would_stand(tmp_path: Path) -> None:
    program = tmp_path / "a.py"
    text = "It foretells a fault."
    program.write_text(f'"""{text}"""\nx = {{"mend": 1}}  # mends `harmed` rows\nraise ValueError("not wholly so")\n')
    lines = prose(program)
    hits = [(number, word) for word in WORDS for number, line in lines if re.search(rf"\b(?:{word})\b", line)]
    assert sorted(hits) == [(1, r"foretell\w*|foretold"), (2, r"mend\w*"), (3, "wholly")]
    document = tmp_path / "a.md"
    document.write_text("It mends, and says `mend`.\n\n    kvmtrace mend\n\n```\nmend\n```\n")
    assert [number for number, line in prose(document) if "mend" in line] == [1]
