# SPDX-License-Identifier: Apache-2.0
"""The site of the documents (`make site`): every document is a page, every link leads somewhere, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.browser import Browser
from tests.documents import DOCUMENTS, REPOSITORY
from tests.test_help import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


def built(source: Path, out: Path, builder: str) -> subprocess.CompletedProcess[str]:
    """Sphinx on a tree of documents, as the Makefile runs it."""
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, "-d", str(out / "trees"),
         "-c", str(REPOSITORY / "docs"), str(source), str(out / "site")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    out = tmp_path_factory.mktemp("site")
    done = built(REPOSITORY, out, "html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out / "site"


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if path.name not in ("genindex.html", "search.html")]


def test_every_document_is_a_page_that_the_start_page_lists(site: Path) -> None:
    start = (site / "index.html").read_text()
    for document in DOCUMENTS:
        page = document.relative_to(REPOSITORY).with_suffix(".html")
        assert (site / page).exists(), page
        assert page.name == "README.html" or f'href="{page}"' in start, page


def test_commands_have_every_verb_and_option(site: Path) -> None:
    text = (site / "docs/commands.html").read_text()
    assert set(re.findall(r"<h2>kvmtrace ([\w ]+)<", text)) >= set(ROOT.commands)
    commands = [each for verb in ROOT.commands.values() for each in (verb, *getattr(verb, "commands", {}).values())]
    options = {option for command in commands for each in command.params for option in each.opts}
    assert not [option for option in options if option.startswith("--") and option not in text]


def test_no_page_fetches_anything(site: Path) -> None:
    for page in pages(site):
        fetched = re.findall(
            r"<(?:img|script|iframe)\b[^>]*\bsrc=\"([^\"]+)|<link\b[^>]*\bhref=\"([^\"]+)", page.read_text()
        )
        assert not [each for pair in fetched for each in pair if re.match(r"\w+:|//", each) and "data:" not in each]


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for document in (*DOCUMENTS, *REPOSITORY.glob("*/*.md"), *REPOSITORY.glob("traces/*/*.md")):
        copy = source / document.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(document, copy)
    with (source / "docs/record.md").open("a") as file:
        file.write("\n[a](report.md#gates) [b](report.md#no-such-heading) [c](no-such-page.md)\n")
    done = built(source, tmp_path, "dummy")
    assert done.returncode == 1
    assert "record.md" in done.stderr
    assert "no-such-heading" in done.stderr
    assert "no-such-page" in done.stderr
    assert "gates" not in done.stderr


@pytest.mark.parametrize("width", [400, 1000, 1280, 1920])
def test_no_page_is_wider_than_its_window(browser: Browser, site: Path, width: int) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    wide = {}
    for page in pages(site):
        browser.events.clear()
        browser.send("Page.navigate", url=page.as_uri())
        browser.until(f"location.href === '{page.as_uri()}' && document.readyState === 'complete'")
        most = browser.value("document.documentElement.scrollWidth")
        if most > width:
            wide[page.name] = most
        assert not browser.complaints(), page
    assert not wide
