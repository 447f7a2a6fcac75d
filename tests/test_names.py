# SPDX-License-Identifier: Apache-2.0
"""No two public classes, and no two modules, of the product have one name: a name says which of them is meant."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("analysis", "replay", "traces", "tracer")
# Names that several modules may have, with the reason.
MODULES: Final = {
    "__init__": "of each package",
    "cli": "a package's own verbs of the command line",
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def repeated(named: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that more than one has, with where."""
    places = defaultdict(list)
    for name, where in named:
        places[name].append(where)
    return {name: where for name, where in places.items() if len(where) > 1}


def classes(path: Path) -> list[tuple[str, str]]:
    """The public classes of a module."""
    found = re.findall(r"^class ([^\W_]\w*)", path.read_text(), re.M)  # `ast` has the same in fifty times the time
    return [(name, str(path.relative_to(ROOT))) for name in found]


def test_no_two_public_classes_have_one_name() -> None:
    found = [each for path in sources() for each in classes(path)]
    assert len(found) > 200
    assert repeated(found) == {}


def test_no_two_modules_have_one_name() -> None:
    found = [(path.stem, str(path.relative_to(ROOT))) for path in sources()]
    assert len(found) > 150
    assert set(repeated(found)) == set(MODULES)


def test_a_repeated_class_is_found() -> None:
    assert repeated([("Page", "a.py"), ("Slot", "a.py"), ("Page", "b.py")]) == {"Page": ["a.py", "b.py"]}
