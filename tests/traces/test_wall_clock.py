# SPDX-License-Identifier: Apache-2.0
"""Boot time as wall-clock time, and the moments that options name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.make import HERE
from traces.errors import Problem
from traces.metadata import Metadata
from traces.reader import Trace
from traces.wall_clock import moment, wall_ns, wall_text

GOLDEN = Trace.open(HERE / "trace-1.0.parquet").metadata
BEGAN = 1_700_000_000 * 10**9  # 2023-11-14 22:13:20 UTC


def clocked(*samples: Any) -> Metadata:
    return replace(GOLDEN, raw={**GOLDEN.raw, "clock": {"samples": list(samples)}})


def test_a_clock_that_was_set_counts_from_there_on() -> None:
    meta = clocked({"boot": 100, "real": BEGAN}, {"boot": 1_000, "real": BEGAN + 10**9})
    assert wall_ns(meta, 50) == BEGAN - 50
    assert wall_ns(meta, 999) == BEGAN + 899
    assert wall_ns(meta, 1_001) == BEGAN + 10**9 + 1


@pytest.mark.parametrize("samples", [(), ("x",), ({"boot": "1", "real": 2},), ({"boot": 0, "real": 1 << 80},)])
def test_without_a_clock_nothing_is_made_up(samples: tuple[Any, ...]) -> None:
    meta = clocked(*samples)
    assert wall_ns(meta, 5) is None
    assert wall_text(meta, 5) == ""
    assert moment(meta, "1.5s", "--from") == meta.span[0] + 1_500_000_000
    with pytest.raises(Problem, match="no wall clock"):
        moment(meta, "22:13:20", "--from")


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("0", 0), ("1.5", 1_500_000_000), ("1.5s", 1_500_000_000), ("200ms", 200_000_000), ("0.001us", 1), ("7ns", 7),
        ("2m", 120 * 10**9), ("1h", 3600 * 10**9), ("22:13:21", 10**9), ("22:13:20.25", 250_000_000),
        ("2023-11-14T22:13:22", 2 * 10**9), ("2023-11-14 22:13:22", 2 * 10**9),
        ("2023-11-14T23:13:22+01:00", 2 * 10**9),
        ("22:14", 40 * 10**9),
    ],
)  # fmt: skip
def test_moments(text: str, since: int) -> None:
    first = GOLDEN.span[0]
    meta = clocked({"boot": first, "real": BEGAN})
    assert moment(meta, text, "--from") == first + since


@pytest.mark.parametrize("text", ["", "soon", "1.5x", "-1s", "25:00:00", "2023-13-01", "1e3", "\x1b[2J"])
def test_what_is_no_moment_is_one_line(text: str) -> None:
    with pytest.raises(Problem, match=r"--to .*give a time since") as caught:
        moment(GOLDEN, text, "--to")
    assert str(caught.value).isprintable()


@given(st.integers(0, 10**15))
def test_a_wall_clock_time_reads_back(since: int) -> None:
    first = GOLDEN.span[0]
    meta = clocked({"boot": first, "real": BEGAN})
    back = moment(meta, wall_text(meta, first + since).replace(" ", "T"), "--from")
    assert back == first + since // 10**6 * 10**6
