# SPDX-License-Identifier: Apache-2.0
"""Durations as people read them."""

from __future__ import annotations

import numpy as np
import pytest

from traces.command_line.durations import duration


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (7, "7 ns"),
        (7.4, "7.40 ns"),
        (999, "999 ns"),
        (999.6, "1.00 us"),
        (1500, "1.50 us"),
        (9_996, "10.0 us"),
        (99_960, "100 us"),
        (999_600, "1.00 ms"),
        (12_345_678, "12.3 ms"),
        (2.5e9, "2.50 s"),
        (12_345_678_000_000, "12346 s"),
        (-1500, "-1.50 us"),
        (np.int64(17), "17 ns"),
    ],
)
def test_three_figures_in_the_unit_that_fits(ns: float, text: str) -> None:
    assert duration(ns) == text
