# SPDX-License-Identifier: Apache-2.0
"""Formats: golden files, and the same figures in each, read back from its text."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as Xml

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.formats import FORMATS, renderer
from analysis.formats.markdown import LIMIT
from analysis.report_model.report import Check, Report, Status
from analysis.report_model.report_table import Column, ReportTable
from analysis.report_model.units import Unit, format_value, span
from tests.golden import reports as golden

pytestmark = pytest.mark.xdist_group("formats")  # the reports are made once

Rows = dict[str, list[dict[str, str]]]  # cells by the query and the column's title


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, Report]]:
    with golden.reports() as found:
        yield found


def rounded(text: str) -> str:
    """Without the last digits of quotients: polars divides one way or another by how many CPUs there are."""
    return re.sub(r"\d\.\d{13,}", lambda number: f"{float(number[0]):.12f}", text)


@pytest.mark.parametrize(("name", "form"), list(golden.wanted()))
def test_golden(made: dict[str, Report], name: str, form: str) -> None:
    said = "changed on purpose? python -m tests.golden.reports, and review"
    assert rounded(renderer(form)(made[name])) == rounded(golden.golden(name, form).read_text()), said


def expected(report: Report) -> Rows:
    """From the model."""
    return {
        table.query: [dict(zip([c.title for c in table.columns], texts, strict=True)) for texts in table.texts()]
        for table in report.tables
    }


def from_json(text: str) -> list[Rows]:
    """Exact values, made text by the unit that the document gives."""
    units = {unit.value: unit for unit in Unit}
    found = []
    for report in json.loads(text)["reports"]:
        tables: Rows = {}
        for table in report["tables"]:
            tables[table["query"]] = [
                {c["title"]: _told(row[c["name"]], units[c["unit"]], c["title"]) for c in table["columns"]}
                for row in table["rows"]
            ]
        found.append(tables)
    return found


def _told(value: Any, unit: Unit, title: str) -> str:
    signed = title == "change"
    if isinstance(value, list):
        return span(*value, unit, signed=signed)
    return format_value(value, unit, signed=signed)


def from_columns(text: str) -> Rows:
    """From aligned text: cells are two blanks apart. A table that was turned has its titles down the side."""
    found: Rows = {}
    for part in re.split(r"\n(?:-- )?(?=[^\n]*\(query )", text)[1:]:
        head, *lines = part.split("\n\n")[0].split("\n")
        if head.endswith("none") or lines[:1] == ["none"]:
            found[_query(head)] = []
            continue
        cells = [re.split(r" {2,}", line.strip()) for line in lines if line.strip() and not line.startswith("-- ")]
        if cells[0][0] in ("policy", "VM", "what", "by", "kind") and len({len(row) for row in cells}) == 1:
            if len(cells[0]) != len(set(cells[0])) or cells[1][0] == "time":
                cells = [list(row) for row in zip(*cells, strict=True)]
            found[_query(head)] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    return found


def _query(head: str) -> str:
    match = re.search(r"\(query (\w+)", head)
    assert match
    return match[1]


def from_markdown(text: str) -> Rows:
    found: Rows = {}
    for part in text.split("\n### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        cells = [
            [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.findall(r"\|((?:\\.|[^|\\])*)", line)[:-1]]
            for line in lines
        ]
        query = re.search(r"[Qq]uery `(\w+)`", part)
        assert query
        found[query[1]] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]] if cells else []
    return found


def from_junit(text: str, report: Report) -> Rows:
    titles = {(table.query, column.key): column.title for table in report.tables for column in table.columns}
    found: Rows = {}
    for item in Xml.fromstring(text).iter("property"):
        match = re.fullmatch(r"(\w+)\.([1-9]\d*)\.(\w+)", item.attrib["name"])
        if match:
            rows = found.setdefault(match[1], [])
            while len(rows) < int(match[2]):
                rows.append({})
            rows[-1][titles[match[1], match[3]]] = item.attrib["value"]
    return found


@pytest.mark.parametrize("name", ["storm", "field", "gated", "diff"])
def test_the_same_figures_are_in_every_format(made: dict[str, Report], name: str) -> None:
    report = made[name]
    whole = expected(report)
    assert from_json(renderer("json")(report)) == [whole]
    assert from_markdown(renderer("md")(report)) == whole
    compared = 0
    for form in ("text", "mail", "junit"):
        if (name, form) == ("diff", "junit"):
            continue
        text = renderer(form)(report)
        found = from_junit(text, report) if form == "junit" else from_columns(text)
        assert found.keys() <= whole.keys()
        assert "policies" in found
        for query, rows in found.items():
            for row, full in zip(rows, whole[query], strict=False):  # the first rows, and the columns there is room for
                assert row.items() <= full.items(), (form, query)
                compared += len(row)
    assert compared > 100


@pytest.mark.parametrize("name", ["storm", "field", "gated", "diff"])
def test_the_same_first_line_and_checks_are_in_every_format(made: dict[str, Report], name: str) -> None:
    report = made[name]
    first = " ".join(report.headline.split())
    assert " ".join(renderer("text")(report).split()).startswith(first)
    assert " ".join(renderer("mail")(report).split()).startswith(first)
    assert re.sub(r"\\(.)", r"\1", renderer("md")(report)).startswith(f"**{first}**")
    assert json.loads(renderer("json")(report))["reports"][0]["headline"] == report.headline
    assert not report.checks or report.headline in {
        item.attrib["value"] for item in Xml.fromstring(renderer("junit")(report)).iter("property")
    }


def test_junit_has_a_case_for_each_check(made: dict[str, Report]) -> None:
    suites = Xml.fromstring(renderer("junit")(made["gated"], made["storm"]))
    gated, storm = suites
    cases = {
        case.attrib["name"]: [(child.tag, child.attrib["type"]) for child in case] for case in gated.iter("testcase")
    }
    assert cases == {
        "preserve.refaults > 0": [],
        "async.faults > 10000": [],
        "async.refaults > 2000": [("failure", "failed")],
        "fidelity < 1": [],
        "at most 6 role words under preserve": [],
        "responses matched": [],
    }
    assert (gated.attrib["tests"], gated.attrib["failures"], gated.attrib["skipped"]) == ("6", "1", "0")
    assert storm.attrib["skipped"] == "1"  # not validated, and said so


def test_a_terminal_and_a_mail_have_their_limits(made: dict[str, Report]) -> None:
    for report in made.values():
        text, mail = (renderer(form)(report) for form in ("text", "mail"))
        assert text.count("\n") <= 60
        assert max(map(len, text.splitlines())) <= 80
        assert mail.isascii()
        assert max(map(len, mail.splitlines())) <= 72


words = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="\n"), min_size=1, max_size=12)


@given(st.lists(st.tuples(words, st.integers(0, 1 << 60), st.integers(0, 1 << 60)), min_size=1, max_size=8), words)
def test_any_table_reads_back(rows: list[tuple[str, int, int]], said: str) -> None:
    frame = pl.DataFrame(
        [(text, min(low, high), max(low, high)) for text, low, high in rows],
        schema={"what": pl.String, "n_low": pl.Int64, "n_high": pl.Int64},
        orient="row",
    )
    columns = (Column("what", "what", Unit.TEXT), Column("n_low", "count", high="n_high"))
    check = Check("gate", said, Status.FAILED, said)
    report = Report(said, (said,), ((said, said),), (ReportTable("kinds", "Any", columns, frame),), (check,))
    whole = expected(report)
    assert from_json(renderer("json")(report)) == [whole]
    assert from_markdown(renderer("md")(report)) == whole
    assert from_junit(renderer("junit")(report), report)["kinds"] == whole["kinds"][:4]
    (case,) = Xml.fromstring(renderer("junit")(report)).iter("testcase")
    assert case.attrib["name"] == said
    for form in ("text", "mail"):
        renderer(form)(report)


@pytest.mark.slow
def test_a_summary_stays_under_its_limit() -> None:
    text = string.ascii_letters * 200
    frame = pl.DataFrame({"what": [text] * 20})
    table = ReportTable("kinds", "Any", (Column("what", "what", Unit.TEXT),), frame)
    report = Report("x", ("y",), (), (table,) * 4)
    assert len(renderer("md")(report).encode()) < LIMIT
    many = renderer("md")(*[report] * 30)
    assert len(many.encode()) <= LIMIT
    assert many.count("**y**") == 30
    endless = renderer("md")(*[Report("x" * 10_000, ("y",), (), ())] * 200)
    assert len(endless.encode()) <= LIMIT
    assert "more reports" in endless


def test_every_format_of_the_list_renders() -> None:
    report = Report("x", ("y",), (), ())
    for form in FORMATS:
        assert "y" in renderer(form)(report)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, Unit.COUNT, "-"),
        (1234567, Unit.COUNT, "1,234,567"),
        (999, Unit.NS, "999 ns"),
        (1_500, Unit.NS, "1.50 us"),
        (-2_000_000, Unit.NS, "-2.00 ms"),
        (12_300_000_000, Unit.NS, "12.3 s"),
        (0.0, Unit.SHARE, "0 %"),
        (1.0, Unit.SHARE, "100 %"),
        (0.99999, Unit.SHARE, ">99.9 %"),
        (0.0001, Unit.SHARE, "<0.1 %"),
        (0.5, Unit.SHARE, "50.0 %"),
        (36864, Unit.BYTES, "36 KiB"),
        (5000, Unit.BYTES, "4.9 KiB"),
        (0, Unit.BYTES, "0 B"),
        (59225725123, Unit.BOOT, "59.225725"),
        (0x3784, Unit.HEX, "0x3784"),
        (7, Unit.ID, "7"),
        (True, Unit.FLAG, "yes"),
        ("a\x1b[2J", Unit.TEXT, "a?[2J"),
        (11.806, Unit.RATIO, "11.81x"),
        (0.0616, Unit.RATIO, "0.0616x"),
    ],
)
def test_values_read_as_they_are(value: Any, unit: Unit, text: str) -> None:
    assert format_value(value, unit) == text
