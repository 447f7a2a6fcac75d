# SPDX-License-Identifier: Apache-2.0
"""Waiting for what has to happen, as long as a busy machine may need for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0  # seconds; what has not happened by then will not


def until(holds: Callable[[], Any]) -> Any:
    """What `holds` gives once that is true; false where that never happened."""
    give_up = time.monotonic() + PATIENCE
    while not (found := holds()) and time.monotonic() < give_up:
        time.sleep(0.01)
    return found
