# SPDX-License-Identifier: Apache-2.0
"""Rows further apart than a difference of times can be are refused; one ns less is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.corpus import CORPUS
from traces.errors import Problem
from traces.reader import Trace


def spanning(first: int, last: int) -> Trace:
    return cast(Any, SimpleNamespace(path="t.parquet", metadata=SimpleNamespace(span=(first, last))))


@pytest.mark.parametrize(("first", "last"), [(-1, (1 << 63) - 1), (-(1 << 62), 1 << 62), (-(1 << 63), (1 << 63) - 1)])
def test_more_than_292_years_are_refused(first: int, last: int) -> None:
    with pytest.raises(Problem, match=r"^t\.parquet: damaged: its rows' times are more than 292 years apart$"):
        Trace.check_span(spanning(first, last))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, (1 << 63) - 1), (-(1 << 62), (1 << 62) - 1)])
def test_what_a_difference_can_hold_is_not(first: int, last: int) -> None:
    Trace.check_span(spanning(first, last))


def test_a_recording_passes() -> None:
    Trace.open(CORPUS / "steady-6.1.parquet").check_span()
