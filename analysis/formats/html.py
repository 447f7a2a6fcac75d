# SPDX-License-Identifier: Apache-2.0
"""One page for a browser, which works offline: the tables of the other formats, and pictures.

Everything that comes from a file is escaped by the template; besides, the page's content security policy allows no
script but its own, and no fetches. Charts are drawn by Vega-Lite, with one copy of its JavaScript in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from analysis.queries.registry import named
from analysis.reading.sources import Recording
from analysis.report_model.charts import drawn_vms, pictures
from analysis.report_model.picture import Picture
from analysis.report_model.report import Check, Report
from analysis.report_model.report_table import ReportTable
from traces.text import printable
from traces.vm_names import VmNames

_SNIPPET: Final = "window.vegaEmbed = vegaEmbed;"


@dataclass(frozen=True)
class _Figure:
    id: str
    picture: Picture

    @property
    def texts(self) -> list[list[str]]:
        return [
            [column.text(row) for column in self.picture.columns] for row in self.picture.frame.iter_rows(named=True)
        ]


@dataclass(frozen=True)
class _Query:
    name: str
    about: str
    command: str


@dataclass(frozen=True)
class _Page:
    id: str
    report: Report
    figures: list[_Figure]
    lacking: list[str]

    @property
    def vms(self) -> list[tuple[int, str]]:
        """The VMs to choose from, the worst first; empty where there is only one."""
        recording = self.report.recording
        if recording is None or len(recording.metadata.vms) < 2:
            return []
        names = VmNames(recording.metadata)
        order = next((table.frame["vm"].to_list() for table in self.report.tables if table.query == "overview"), [])
        return [(vm, names.vm(vm)) for vm in order]

    def hidden(self, figure: _Figure) -> bool:
        """Whether a picture is hidden until its VM is chosen; at first those of the worst VM are shown."""
        drawn = drawn_vms(self.report)
        return figure.picture.vm is not None and figure.picture.vm not in drawn[:1]

    @property
    def broad_figures(self) -> set[str]:
        """Ids of the pictures over the whole width: broad ones, and those whose row would be half empty."""
        shown = [figure for figure in self.figures if not self.hidden(figure)]
        filled = _filled([figure.picture.broad for figure in shown])
        alone = {figure.id for figure, whole in zip(shown, filled, strict=True) if whole}
        return alone | {figure.id for figure in self.figures if figure.picture.broad}

    @property
    def tables(self) -> list[tuple[ReportTable, list[int | None]]]:
        """Each table with the VM of each of its rows (None: the row belongs to no VM)."""
        return [
            (table, table.frame["vm"].to_list() if "vm" in table.frame.columns else [None] * len(table.frame))
            for table in self.report.tables
        ]

    @property
    def lines(self) -> list[str]:
        return list(self.report.lines)

    @property
    def checks(self) -> list[Check]:
        return [check for check in self.report.checks if check.kind == "gate" or check.fails]

    @property
    def queries(self) -> list[_Query]:
        names = [figure.picture.query for figure in self.figures if figure.picture.source is not None]
        names += [table.query for table in self.report.tables if table.exported]
        return [_query(self.report, name) for name in sorted(set(names))]


def _filled(broad: list[bool]) -> list[bool]:
    """Return which parts of a page take its whole width, so that its two columns leave no row half empty."""
    found, beside = list(broad), 0
    for at, whole in enumerate([*broad, True]):
        if whole and beside % 2:
            found[at - 1] = True
        beside = 0 if whole else beside + 1
    return found


def render(*reports: Report) -> str:
    """Render all reports as one HTML page."""
    pages = []
    for number, report in enumerate(reports, 1):
        found, lacking = pictures(report)
        figures = [_Figure(f"r{number}-{place}", picture) for place, picture in enumerate(found, 1)]
        pages.append(_Page(f"r{number}", report, figures, lacking))
    charts = {figure.id: _spec(figure) for page in pages for figure in page.figures}
    lists = {f"{page.id}-list": _list(page.report.listed) for page in pages if page.report.listed is not None}
    scripts = [_script(_library()), _script(_part("page.js"))] if charts else []
    scripts += [_script(_part("page_list.js"))] if lists else []
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_part("page.html")).render(
        title=f"kvmtrace: {printable(reports[0].headline)}" if reports else "kvmtrace",
        style=Markup(_part("page.css")),
        hashes=Markup(" ".join(map(_hash, scripts)) or "'none'"),
        pages=pages,
        charts=Markup(_json(charts)) if charts else "",
        lists=Markup(_json(lists)) if lists else "",
        scripts=[Markup(script) for script in scripts],
    )


def _spec(figure: _Figure) -> dict[str, Any]:
    document: dict[str, Any] = figure.picture.chart.to_dict()
    document.pop("config", None)  # the page has its own
    return document


def _list(table: ReportTable) -> dict[str, Any]:
    """Return rows as text for the page's script, which makes elements only of the rows that a search finds."""
    return {"right": [column.right for column in table.columns], "rows": table.texts()}


def _query(report: Report, name: str) -> _Query:
    """Return a query with the command that runs it, which replays first where the report made its own replay."""
    query = named(name)
    file = shlex.quote(report.title)
    export = f"kvmtrace export {{}} --csv {name}"
    if query.source is Recording:
        command = export.format(shlex.quote(str(report.recording.path)) if report.recording else file)
    elif report.result is not None and str(report.result.path) == report.title:
        command = export.format(file)
    else:
        command = f"kvmtrace replay {file} -o result.parquet\n{export.format('result.parquet')}"
    return _Query(name, query.about, printable_lines(command))


def printable_lines(text: str) -> str:
    """Replace control characters in the lines of a command, which could steer a terminal it is pasted into."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _part(name: str) -> str:
    return files("analysis.formats").joinpath(name).read_text(encoding="utf-8")


def _json(document: Any) -> str:
    """Return JSON in which no HTML parser sees the end of its script element, or the begin of another."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _library() -> str:
    """Return Vega-Embed and all that it needs, as one script.

    Bundling it takes V8 more than a second and 90 MiB, and always gives the same text. It is therefore kept for the
    next report in $XDG_CACHE_HOME/kvmtrace, under the version of vl-convert.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = base / "kvmtrace" / f"vega-embed-{version('vl-convert-python')}.js"
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    import vl_convert

    text = vl_convert.javascript_bundle(_SNIPPET)
    with suppress(OSError):  # without a writable cache it is bundled anew each time
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        part.replace(kept)
    return text


def _script(text: str) -> str:
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script that cannot stand in a page")
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
