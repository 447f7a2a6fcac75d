# SPDX-License-Identifier: Apache-2.0
"""The JSON format, for programs: exact values, times in ns, shares of 1; schema 1 of `analysis/REPORT.md`."""

from __future__ import annotations

import json
from typing import Any

from analysis.report_model.report import SCHEMA, Report


def render(*reports: Report) -> str:
    """Return a JSON document with a list of reports, in the order given."""
    document = {"schema": SCHEMA, "reports": [_report(report) for report in reports]}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _report(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "headline": report.headline,
        "verdict": list(report.verdict),
        "trust": [{"name": name, "text": text} for name, text in report.trust],
        "checks": [
            {"kind": check.kind, "name": check.name, "status": check.status.value, "why": check.why}
            for check in report.checks
        ],
        "own_policy": [
            {"vm": each.vm, "agreement": each.agreement.value, "text": each.text, "from_row": each.row}
            for each in (report.result.agreements if report.result is not None else ())
        ],
        "figures": report.figures.to_dict() if report.figures is not None else None,
        "tables": [
            {
                "query": table.query,
                "title": table.title,
                "note": table.note,
                "more": table.more,
                "columns": [
                    {"name": column.key, "title": column.title, "unit": column.unit.value} for column in table.columns
                ],
                "rows": table.values(),
            }
            for table in report.tables
        ],
    }
