# SPDX-License-Identifier: Apache-2.0
"""Make the golden reports again: `python -m tests.golden.reports`. Review what changed; it is what users see.

One is of a recording whose other policy is an interval, one of a recording of 26 VMs, one has gates that pass and fail,
and one is a comparison.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

from analysis.diff import compare, opened
from analysis.formats import FORMATS, renderer
from analysis.gates import parse
from analysis.report_model import trust
from analysis.report_model.report import Report
from analysis.reporting import Wanted, reported

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
STORM: Final = Path("traces/corpus/smi-storm-6.1.parquet")
FIELD: Final = Path("tests/recordings/field-6.1.parquet")
OLD_STORM: Final = Path("traces/corpus/smi-storm-6.1-async.parquet")
SUFFIXES: Final = {"text": "txt", "md": "md", "mail": "mail.txt", "json": "json", "junit": "xml"}
GATES: Final = ("preserve.refaults > 0", "faults > 10000", "refaults > 2000", "fidelity < 1")
RELEASE: Final = ("report", "kvmtrace 0.1.0")  # whichever is installed: a release changes no report


@contextmanager
def reports() -> Iterator[dict[str, Report]]:
    """The reports by name. Paths in them are relative to the project, so that they are the same everywhere."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with (
            patch.object(trust, "REPORTED", RELEASE),
            tempfile.TemporaryDirectory() as scratch,
            reported(STORM, Wanted()) as storm,
            reported(FIELD, Wanted()) as field,
            reported(OLD_STORM, Wanted(gates=tuple(map(parse, GATES)))) as gated,
        ):
            sides = [opened(path, "", Path(scratch) / path.name, []) for path in (STORM, OLD_STORM)]
            yield {"storm": storm, "field": field, "gated": gated, "diff": compare(*sides, mark=False)}
    finally:
        os.chdir(before)


def golden(name: str, form: str) -> Path:
    return HERE / f"report-{name}.{SUFFIXES[form]}"


def wanted() -> Iterator[tuple[str, str]]:
    """Which report in which format; a comparison has no gate, and so no JUnit."""
    for name in ("storm", "field", "gated", "diff"):
        for form in FORMATS:
            if form in SUFFIXES and (name, form) != ("diff", "junit"):
                yield name, form


def main() -> None:
    with reports() as made:
        for name, form in wanted():
            golden(name, form).write_text(renderer(form)(made[name]))


if __name__ == "__main__":
    main()
