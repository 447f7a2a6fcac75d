# SPDX-License-Identifier: Apache-2.0
"""Make the pictures of the page that documents show again: `python -m tests.golden.pictures`, or `make pictures`.

Of shipped recordings, in the browser of the tests (tests/analysis/browser.py). Look at what changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from analysis.formats import drawn
from analysis.formats.html import render
from analysis.reporting import Wanted, reported
from tests.analysis.browser import Browser
from tests.golden.reports import FIELD, OLD_STORM, ROOT

# The picture, its recording, and how much of the page it shows.
PICTURES: Final = (
    ("report.png", OLD_STORM, 1200, "light", 1500),
    ("report-vms.png", FIELD, 1200, "dark", 1350),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, Browser() as browser:
        for name, recording, width, scheme, height in PICTURES:
            page = Path(scratch) / "page.html"
            with reported(ROOT / recording, Wanted(drawn=drawn("html"))) as report:
                page.write_text(render(report).replace(str(ROOT) + "/", ""))
            browser.show(page, width, scheme, height)
            browser.picture(ROOT / "docs" / name, whole=False)


if __name__ == "__main__":
    main()
