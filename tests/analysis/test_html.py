# SPDX-License-Identifier: Apache-2.0
"""The page in a real Chromium: every picture drawn, nothing fetched, readable narrow and wide, light and dark."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.formats import drawn as drawn_by
from analysis.formats.html import _library, render
from analysis.reading.sources import open_source
from analysis.report_model.charts import pictures
from analysis.report_model.picture import Picture
from analysis.report_model.report import Check, Report, Status
from analysis.reporting import Wanted, reported
from replay.result import KEY
from tests.analysis.browser import Browser
from tests.analysis.test_formats import from_json
from tests.golden.reports import golden
from traces.synth import Parameters, synthesize

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]  # the browser and the pages are made once

FIELD = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"
CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
EVIL = """</script></title></style><img src=x onerror="alert(1)"><!--'{{ 7 * 7 }}&lt;"""
WIDTHS = (400, 1600)
SCHEMES = ("light", "dark")

# Contrast of two colours as WCAG has it, and what of a page's drawn text falls short of 4.5.
_PALE = """(() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => { const [r, g, b] = parts(text).map((v) => v / 255).map(
    (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (parts(colour)[3] !== 0) return colour; } };
  const found = [];
  for (const node of document.querySelectorAll("h1, h2, p, td, th, dd, dt, a, summary, svg text")) {
    const style = getComputedStyle(node);
    const [one, other] = [light(node.matches("svg text") ? style.fill : style.color), light(behind(node))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5 || parseFloat(style.fontSize) < 10)
      found.push([node.textContent.slice(0, 40), contrast, style.fontSize]);
  }
  return found;
})()"""
_MARKS = """[...document.querySelectorAll("figure:not([hidden]) .chart")].map((chart) =>
  [...chart.querySelectorAll(".role-mark path, .role-mark line")].filter((mark) => {
    const box = mark.getBoundingClientRect();
    return box.width + box.height > 0; }).length)"""
_OUTSIDE = """[...document.querySelectorAll(".chart svg")].filter((svg) =>
  svg.getBoundingClientRect().right > svg.closest("figure").getBoundingClientRect().right
  || [...svg.querySelectorAll("text")].some((text) => {
    const [own, all] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
    return own.width && (own.left < all.left - 1 || own.right > all.right + 1); })).length"""


class _Page(HTMLParser):
    """Ids, links, scripts, and the text of tables by their label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self._cell: list[str] | None = None
        self._label = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "data")]
        if tag == "div" and found.get("role") == "region":
            self._label = found["aria-label"] or ""
        elif tag == "table":
            self.tables.append((self._label, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """A recording with soft-hangs, and its replay."""
    path = tmp_path_factory.mktemp("storm") / "storm.parquet"
    synthesize(path, Parameters(policy="async", smi_rate=2000, working_set=3000, events=600_000))
    with reported(path, Wanted()) as report:
        yield report


@pytest.fixture(scope="module")
def page(storm: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(storm))
    return path


def _check(browser: Browser, page: Path, count: int) -> None:
    """What holds of every page, as it is shown."""
    marks = browser.value(_MARKS)
    assert len(marks) == count
    assert all(marks), marks
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.value("performance.getEntriesByType('resource').map((each) => each.name)") == []
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(_OUTSIDE) == 0
    assert browser.value(_PALE) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_drawn_and_readable(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.show(page, width, scheme)
    _check(browser, page, 5)
    dark = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")


def test_soft_hangs_and_roots_are_in_the_pictures(browser: Browser, page: Path, storm: Report) -> None:
    browser.show(page, 1600, "light")
    red = browser.value("document.querySelectorAll('.chart line[stroke=\"#d33a3a\"]').length")
    assert storm.recording is not None
    assert red == 1
    assert browser.value("document.querySelectorAll('#r1-2 .role-mark line').length") == 67
    assert browser.value("document.querySelectorAll('#r1-3 .role-mark line').length") == 1


def test_a_change_of_scheme_or_width_draws_anew(browser: Browser, page: Path) -> None:
    browser.show(page, 1600, "light")
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    wide = "document.querySelector('.chart svg').getBoundingClientRect().width"
    before = browser.value(ink), browser.value(wide)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.until(f"document.documentElement.dataset.drawn && {ink} !== {json.dumps(before[0])}")
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    browser.until(f"document.documentElement.dataset.drawn && {wide} < 400")
    _check(browser, page, 5)


def test_a_mark_tells_what_it_is(browser: Browser, page: Path) -> None:
    browser.show(page, 1600, "light")
    box = browser.value(
        "(() => { const box = document.querySelector('#r1-1 .mark-rect path').getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    browser.until("document.querySelector('#vg-tooltip-element.visible')?.textContent.includes('share')")
    assert browser.complaints() == []


def test_the_page_may_fetch_nothing(browser: Browser, page: Path) -> None:
    browser.show(page, 400, "light")
    for attempt, directive in (
        ("fetch('http://localhost:9/').catch(() => {})", "connect-src"),
        ("document.body.append(Object.assign(document.createElement('script'), {text: '1'}))", "script-src-elem"),
        ("document.body.append(Object.assign(new Image(), {src: 'http://localhost:9/'}))", "img-src"),
    ):
        refused = browser.value(
            "new Promise((done) => { addEventListener('securitypolicyviolation', (event) => done("
            f"event.effectiveDirective)); {attempt}; setTimeout(() => done('not refused'), 5000); }})"
        )
        assert refused == directive


def test_links_lead_to_queries_and_nowhere_else(page: Path, storm: Report) -> None:
    found = _Page(page.read_text())
    assert len(found.ids) == len(set(found.ids))
    assert found.links
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    for table in storm.tables:
        assert f"#r1-{table.query}" in found.links
    assert found.tags.count("script") == 3  # the charts, one copy of the library, the page's own
    assert page.stat().st_size < 2_000_000


def test_tables_have_the_numbers_of_the_other_formats(page: Path, storm: Report) -> None:
    shown = dict(_Page(page.read_text()).tables)
    for table in storm.tables:
        if len(table.frame):
            assert shown[table.title] == [[column.title for column in table.columns], *table.texts()]


def test_each_picture_has_a_text_alternative(browser: Browser, page: Path, storm: Report) -> None:
    drawn, lacking = pictures(storm)
    assert lacking == []
    assert [each.query for each in drawn] == ["vcpu_states", "lives", "shares", "refills", "heat"]
    shown = dict(_Page(page.read_text()).tables)
    for each in drawn:
        assert 1 < len(shown[each.title]) <= 1 + 2 * 25
        assert each.about
    browser.show(page, 1600, "light")
    labels = browser.value(
        "[...document.querySelectorAll('.chart')].map((chart) =>"
        " document.getElementById(chart.getAttribute('aria-labelledby')).textContent)"
    )
    assert labels == [each.title for each in drawn]
    assert browser.value("document.querySelectorAll('figure details table').length") == len(drawn)


def test_pictures_hold_what_the_queries_say(storm: Report) -> None:
    vcpu_states, lives, shares, refills, heat = pictures(storm)[0]
    recording, result = storm.recording, storm.result
    assert recording is not None
    assert result is not None
    rows = pl.read_parquet(result.path).with_columns(pl.col("row", "policy", "event").cast(pl.String))
    recorded = rows.filter(row="vcpu", policy="async")["recorded_ns"][0]
    assert vcpu_states.frame.select("guest", "faults", "roots", "other").sum().sum_horizontal()[0] == recorded
    assert lives.frame["roots"].sum() == 67 == rows.filter(row="root", policy="async", event="created").height
    assert heat.frame["installs"].sum() <= recording.metadata.kinds["kvm_mmu_set_spte"]
    made = refills.frame.group_by("run").agg(pl.col("roots").sum())
    assert dict(made.iter_rows()) == {"async (recorded)": 65}  # 67 but for the first of two role words; preserve: none
    for run, policy in (("async (recorded)", "async"), ("preserve", "preserve")):
        mine = shares.frame.filter(run=run)
        ran = (mine["guest_share"] * mine["length_ns"]).sum()
        progress = rows.filter(row="progress", policy=policy)
        assert ran == pytest.approx(progress["guest_ns"].max(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "count"), [("smi-both-6.1", 5), ("two-vms-6.1-async", 5), ("huge-6.12-shadow", 5), ("smi-storm-5.10", 5)]
)
def test_recordings_of_the_corpus(browser: Browser, name: str, count: int, tmp_path: Path) -> None:
    with reported(CORPUS / f"{name}.parquet", Wanted()) as report:
        (tmp_path / "page.html").write_text(render(report))
    browser.show(tmp_path / "page.html", 400, "dark")
    _check(browser, tmp_path / "page.html", count)


def test_charts_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    synthesize(path, Parameters(policy="async", vcpus=24, smi_rate=2000, working_set=64, events=400_000))
    with reported(path, Wanted()) as report:
        drawn, lacking = pictures(report)
        assert lacking == []
        for each in drawn:
            assert _points(each) < 5000, each.title
        assert "16 more vCPUs" in drawn[0].about
        assert drawn[1].title == "All 24 vCPUs of VM 1"
        assert "One in" in drawn[2].about


def _points(picture: Picture) -> int:
    return sum(map(len, picture.chart.to_dict()["datasets"].values()))


@pytest.fixture(scope="module")
def field() -> Iterator[Report]:
    with reported(FIELD, Wanted(drawn=drawn_by("html"))) as report:
        yield report


_FIGURES = """[...document.querySelectorAll("figure[data-vm]")].filter((each) => each.offsetParent)
  .map((each) => each.dataset.vm)"""
_ROWS = """[...document.querySelectorAll(".tables tr[data-vm]")].filter((each) => each.offsetParent)
  .map((each) => each.dataset.vm)"""
# Parts of a grid that stand in their row alone, though not over all of its width.
_ALONE = """[...document.querySelectorAll(".figures > :not([hidden]), .tables > *")].filter((each) => {
  const row = [...each.parentElement.children].filter(
    (other) => other.offsetParent && other.offsetTop === each.offsetTop);
  return row.length === 1 && each.getBoundingClientRect().width < each.parentElement.getBoundingClientRect().width - 2;
}).length"""
# Rows of tables that end before the page does.
_RAGGED = """[...document.querySelectorAll(".tables > *")].filter((each) => {
  const [box, all] = [each.getBoundingClientRect(), each.parentElement.getBoundingClientRect()];
  const last = ![...each.parentElement.children].some((other) => other.offsetParent
    && other.offsetTop === each.offsetTop && other.getBoundingClientRect().left > box.left);
  return each.offsetParent && last && Math.abs(box.right - all.right) > 2;
}).length"""
_SCROLL = """[...document.querySelectorAll(".wide")].filter((each) => each.scrollWidth > each.clientWidth
  && !["auto", "scroll"].includes(getComputedStyle(each).overflowX)).length"""


@pytest.mark.parametrize("width", WIDTHS)
def test_several_vms_are_chosen_from(browser: Browser, field: Report, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(field))
    browser.show(page, width, "dark")
    (table,) = (each for each in field.tables if each.query == "overview")
    worst = str(table.frame["vm"][0])
    assert f"of VM {worst} " in browser.value("document.querySelector('h1').textContent")
    assert set(browser.value(_FIGURES)) == {worst}
    assert len(set(browser.value(_ROWS))) == 26
    options = browser.value("[...document.querySelectorAll('.vms option')].map((each) => each.value)")
    assert options == ["", *(str(vm) for vm in table.frame["vm"])]
    for vm in (options[2], options[-1]):
        browser.value(
            "(() => { delete document.documentElement.dataset.drawn; const pick = document.querySelector('.vms');"
            f" pick.value = '{vm}'; pick.dispatchEvent(new Event('change')); }})()"
        )
        browser.until("document.documentElement.dataset.drawn")
        assert set(browser.value(_ROWS)) == {vm}
        drawn = vm != options[-1]  # which never ran
        assert set(browser.value(_FIGURES)) == ({vm} if drawn else set())
        assert browser.value("document.querySelector('.undrawn').offsetParent !== null") is not drawn
        assert browser.value(_ALONE) == browser.value(_RAGGED) == 0
        assert browser.value("document.documentElement.scrollWidth") == width
        assert browser.value(_SCROLL) == 0
    assert browser.complaints() == []


def test_the_page_has_the_figures_of_the_golden_files(field: Report) -> None:
    """Those of text, Markdown, mail, JSON and JUnit are of the same recording of 26 VMs."""
    text = golden("field", "json").read_text()
    (document,) = json.loads(text)["reports"]
    (rows,) = from_json(text)
    page = render(field)
    shown = dict(_Page(page).tables)
    assert len(document["tables"]) > 10
    for table in document["tables"]:
        titles = [column["title"] for column in table["columns"]]
        told = [[row[title] for title in titles] for row in rows[table["query"]]]
        assert shown.get(table["title"], [titles]) == [titles, *told]
    for line in document["verdict"]:
        assert html.escape(line, quote=False) in html.unescape(page).replace("&", "&amp;")
    roots = {row["VM"]: int(row["roots"]) for row in rows["overview"]}
    counted = 0
    for picture in pictures(field)[0]:
        if picture.query == "lives":
            number = roots[str(picture.vm)]
            (drawn,) = picture.chart.to_dict()["datasets"].values()
            assert picture.frame["roots"].sum() == number == max(row["place"] for row in drawn)
            assert f"{number:,} in all" in picture.about
            counted += 1
    assert counted > 3


@pytest.mark.parametrize("width", WIDTHS)
def test_64_vcpus_are_all_in_one_picture(browser: Browser, tmp_path: Path, width: int) -> None:
    path, page = tmp_path / "many.parquet", tmp_path / "page.html"
    synthesize(path, Parameters(policy="async", vcpus=64, smi_rate=500, working_set=32, events=60_000))
    with reported(path, Wanted(drawn=drawn_by("html"))) as report:
        page.write_text(render(report))
        (every,) = (each for each in pictures(report)[0] if each.title == "All 64 vCPUs of VM 1")
    assert len(every.frame) == 64
    assert _points(every) < 5000
    browser.show(page, width, "light")
    assert browser.complaints() == []
    assert browser.value(_ALONE) == browser.value(_RAGGED) == 0
    assert browser.value(_SCROLL) == 0
    assert browser.value("document.documentElement.scrollWidth") == width


def test_a_recording_or_a_result_alone(browser: Browser, storm: Report, tmp_path: Path) -> None:
    alone = [
        (replace(storm, result=None), ["vcpu_states", "lives", "fills", "heat"]),
        (replace(storm, recording=None), ["shares", "refills"]),
    ]
    for report, queries in alone:
        assert [each.query for each in pictures(report)[0]] == queries
    page = tmp_path / "page.html"
    page.write_text(render(*(report for report, _ in alone)))
    browser.show(page, 1600, "dark")
    _check(browser, page, 6)
    assert browser.value("document.querySelectorAll('article').length") == 2


def test_text_from_files_is_text(browser: Browser, storm: Report, tmp_path: Path) -> None:
    assert storm.result is not None
    table = pq.read_table(storm.result.path)
    named = pa.array([EVIL if name == "preserve" else name for name in table["policy"].to_pylist()])
    meta = {KEY: pq.read_metadata(storm.result.path).metadata[KEY].replace(b'"preserve"', json.dumps(EVIL).encode())}
    at = table.schema.get_field_index("policy")
    table = table.set_column(
        at, table.schema.field(at), named.cast(pa.string()).dictionary_encode().cast(table.schema.field(at).type)
    )
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "evil.parquet")
    source = open_source(tmp_path / "evil.parquet")
    report = replace(
        storm, result=source, title=EVIL, verdict=(EVIL, EVIL), trust=((EVIL, EVIL),),
        checks=(Check("gate", EVIL, Status.FAILED, EVIL),),
        tables=tuple(replace(each, note=EVIL) for each in storm.tables),
    )  # fmt: skip
    page = tmp_path / "page.html"
    page.write_text(render(report))
    tags = _Page(page.read_text()).tags
    assert "img" not in tags
    assert tags.count("script") == 3
    browser.show(page, 400, "light")
    _check(browser, page, 5)
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.querySelector('.of').textContent") == EVIL
    assert "<img src=x" in browser.value("document.querySelector('#r1-3').textContent")  # in the legend


def test_nothing_to_draw(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(Report("empty", ("nothing",), (), ())))
    found = _Page(page.read_text())
    assert "script" not in found.tags
    browser.events.clear()
    browser.send("Page.navigate", url=page.as_uri())
    browser.until("document.readyState === 'complete' && document.querySelector('h1').textContent === 'nothing'")
    assert browser.complaints() == []


def test_the_javascript_is_bundled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = []

    def bundle(snippet: str) -> str:
        bundled.append(snippet)
        return "window.vegaEmbed = null;"

    monkeypatch.setattr("vl_convert.javascript_bundle", bundle)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _library.__wrapped__() == _library.__wrapped__() == "window.vegaEmbed = null;"
    assert len(bundled) == 1
    (kept,) = (tmp_path / "kvmtrace").iterdir()
    assert kept.read_text() == "window.vegaEmbed = null;"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # where nothing can be kept
    assert _library.__wrapped__() == "window.vegaEmbed = null;"
    assert len(bundled) == 2
