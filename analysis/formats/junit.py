# SPDX-License-Identifier: Apache-2.0
"""The JUnit format, for CI: a suite for each report, a case for each gate and invariant, figures as properties."""

from __future__ import annotations

from typing import Final
from xml.etree import ElementTree as Xml

from analysis.report_model.report import Report, Status

_TAGS: Final = {Status.FAILED: "failure", Status.UNDECIDED: "failure", Status.SKIPPED: "skipped"}


def render(*reports: Report) -> str:
    """Render reports as JUnit XML, in which all characters are printable."""
    suites = Xml.Element("testsuites", name="kvmtrace")
    for report in reports:
        suites.append(_suite(report))
    Xml.indent(suites, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(suites, encoding="unicode") + "\n"


def _suite(report: Report) -> Xml.Element:
    skipped = sum(check.status is Status.SKIPPED for check in report.checks)
    counts = {"tests": len(report.checks), "failures": len(report.failed), "skipped": skipped, "errors": 0}
    suite = Xml.Element("testsuite", {"name": _text(report.title), **{name: str(n) for name, n in counts.items()}})
    properties = Xml.SubElement(suite, "properties")
    for name, text in (("headline", report.headline), *report.trust):
        Xml.SubElement(properties, "property", name=name, value=_text(text))
    for table in report.tables:
        for number, texts in enumerate(table.texts(rows=table.first), 1):
            for column, text in zip(table.columns, texts, strict=True):
                name = f"{table.query}.{number}.{column.key}"
                Xml.SubElement(properties, "property", name=name, value=_text(text))
    for check in report.checks:
        case = Xml.SubElement(suite, "testcase", classname=f"kvmtrace.{check.kind}", name=_text(check.name))
        if check.status in _TAGS:
            Xml.SubElement(case, _TAGS[check.status], message=_text(check.why), type=check.status.value)
    Xml.SubElement(suite, "system-out").text = _text("\n".join(report.verdict))
    return suite


def _text(text: str) -> str:
    """Replace the characters that XML cannot have by `?`."""
    return "".join(c if c in "\n\t" or (c.isprintable() and c not in "\ufffe\uffff") else "?" for c in text)
