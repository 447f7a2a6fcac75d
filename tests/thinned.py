# SPDX-License-Identifier: Apache-2.0
"""Parameters of a test that are many of one sort: `make quick` takes some of them, `make test` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(step: int, values: Iterable[Any]) -> list[Any]:
    """Values of one parameter, of which each `step`-th is taken where time is short; the others are marked `slow`."""
    return [pytest.param(value, marks=pytest.mark.slow if at % step else ()) for at, value in enumerate(values)]
