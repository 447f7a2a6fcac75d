# SPDX-License-Identifier: Apache-2.0
"""The page of a fleet in a real Chromium: pictures drawn, every host found by what is looked for, names harmless."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from analysis.fleet.fleet_charts import pictures
from analysis.fleet.fleet_report import best_policy, fleet_report
from analysis.fleet.fleet_tables import every_host
from analysis.fleet.judged import COLUMNS
from analysis.fleet.outcome import FleetOutcome, outcome
from analysis.formats.html import render
from benchmarks.fleet_rows import Fleet, parts
from tests.analysis.browser import Browser
from tests.analysis.test_html import EVIL, SCHEMES, WIDTHS, _check

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.xdist_group("browser")]

HOSTS = 400


def evil(part: pa.Table) -> pa.Table:
    """The same with a host's name, a kernel's and a reason that are markup."""
    for name, before in (("host", "host-00007"), ("kernel", "6.6.30"), ("reason", None)):
        values = [EVIL if value == before or (before is None and value) else value for value in part[name].to_pylist()]
        part = part.set_column(part.column_names.index(name), name, pa.array(values, pa.string()))
    return part


def page_of(found: FleetOutcome, to: Path) -> Path:
    best = best_policy(found)
    report = replace(fleet_report(found, EVIL), drawn=pictures(found, best), listed=every_host(found, best))
    to.write_text(render(report))
    return to


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tables = (evil(part).select(list(COLUMNS)) for part in parts(Fleet(hosts=HOSTS, days=3, vms=2)))
    found = outcome((batch for table in tables for batch in table.to_batches()), ("kernel", "vendor"), "results")
    return page_of(found, tmp_path_factory.mktemp("fleet") / "page.html")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_pictures_are_drawn_and_readable(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.show(page, width, scheme)
    _check(browser, page, 3)


def looked_for(browser: Browser, text: str) -> tuple[str, list[str]]:
    browser.value(
        f"(() => {{ const search = document.querySelector('.list input'); search.value = {text!r};"
        "search.dispatchEvent(new Event('input')); })()"
    )
    names = browser.value("[...document.querySelectorAll('.list tbody tr')].map((row) => row.cells[0].textContent)")
    return browser.value("document.querySelector('.list .found').textContent"), names


def test_every_host_is_found(browser: Browser, page: Path) -> None:
    browser.show(page, 1200, "light")
    told, names = looked_for(browser, "")
    assert told == f"{HOSTS} of {HOSTS}, the first 100"
    assert len(names) == 100
    assert looked_for(browser, "host-00399") == (f"1 of {HOSTS}", ["host-00399"])
    _, amd = looked_for(browser, "Host-0039 authenticAMD")
    assert amd
    assert all(name.startswith("host-0039") for name in amd)
    assert looked_for(browser, "nowhere") == (f"0 of {HOSTS}", [])
    assert looked_for(browser, "onerror")[1]  # as text
    assert browser.value("document.images.length") == 0
    assert browser.complaints() == []
