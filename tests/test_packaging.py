"""What stands in more than one file about versions agrees: pyproject.toml, CITATION.cff, constraints.txt."""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documents import REPOSITORY

PROJECT: Final[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_a_citation_names_the_version() -> None:
    cited = re.search(r"^version: (.+)$", (REPOSITORY / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == PROJECT["version"]


def test_constraints_have_a_version_that_fits_for_every_dependency() -> None:
    lines = [line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    pinned = {canonicalize_name(name): version for name, _, version in lines if version}
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    for text in wanted:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (text, version)
