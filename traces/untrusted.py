# SPDX-License-Identifier: Apache-2.0
"""Values under a key of a JSON object from elsewhere, or an empty value where they have another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def object_at(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key; an empty one where there is none."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def text_at(raw: Mapping[str, Any], key: str) -> str:
    """Return the text under a key; an empty one where there is none."""
    value = raw.get(key)
    return value if isinstance(value, str) else ""


def count_at(raw: Mapping[str, Any], key: str) -> int:
    """Return the count under a key; 0 where there is none."""
    value = raw.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else 0
