# SPDX-License-Identifier: Apache-2.0
"""A picture of a report: a chart, and the figures and words that stand for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from analysis.report_model.report_table import Column


@dataclass(frozen=True)
class Picture:
    """A chart with the text that stands for it.

    `about` says in words what it shows; `frame` and `columns` show it in figures, which come from the query named
    `query` of `source`. In a report on a fleet `source` is None, and `query` is only a name. A `broad` picture deserves
    the whole width of a page. `vm` is the VM that it shows, None for all of them.
    """

    query: str
    source: Recording | Result | None
    title: str
    about: str
    chart: Any
    frame: pl.DataFrame
    columns: tuple[Column, ...]
    broad: bool = False
    vm: int | None = None
