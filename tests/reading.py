# SPDX-License-Identifier: Apache-2.0
"""Sentences at random, for a reader who has never met us: `python -m tests.reading [SEED [COUNT [PATH...]]]`.

COUNT sentences (10) are drawn from each document, each module with a verb's help, and the docstrings, comments
and messages of the modules with the most prose. Each should be clear without the rest to an engineer who knows KVM, or
be rewritten. The same seed draws the same sentences from the same files.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.documents import DOCUMENTS, REPOSITORY
from tests.test_words import prose

MODULES: Final = 20  # of those with the most prose
_PACKAGES: Final = ("analysis", "replay", "tracer", "traces")


def sentences(path: Path) -> list[str]:
    """The sentences of a file's prose, but for fragments of a few words."""
    text = " ".join(line.strip(" #>*-") for _, line in prose(path, quoted=True) if not line.startswith(("|", "# ")))
    found = (" ".join(each.split()) for each in re.split(r"(?<=[.:;!?])\s+(?=[A-Z`*0-9])|\s{2,}", text))
    return [each for each in dict.fromkeys(found) if len(each.split()) >= 5]


def drawn(paths: list[Path], seed: int, count: int) -> Iterator[tuple[Path, list[str]]]:
    """Of each file this many of its sentences."""
    for path in paths:
        every = sentences(path)
        yield path, random.Random(f"{seed} {path.name}").sample(every, min(count, len(every)))


def modules() -> list[Path]:
    """The modules with the most prose."""
    every = [path for name in _PACKAGES for path in (REPOSITORY / name).rglob("*.py")]
    return sorted(every, key=lambda path: -sum(map(len, sentences(path))))[:MODULES]


def main(seed: str = "1", count: str = "10", *names: str) -> None:
    """Print them."""
    verbs = [path for name in _PACKAGES for path in sorted((REPOSITORY / name).rglob("cli.py"))]
    paths = [REPOSITORY / name for name in names] or [*DOCUMENTS, *verbs, *modules()]
    for path, found in drawn(paths, int(seed), int(count)):
        print(f"\n{path.relative_to(REPOSITORY)}", *(f"  - {each}" for each in found), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
