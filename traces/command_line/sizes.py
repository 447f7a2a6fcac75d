# SPDX-License-Identifier: Apache-2.0
"""Sizes as they are written on a command line."""

from __future__ import annotations

from traces.errors import Problem


def size_of(text: str) -> int:
    """Return the bytes that '64M', '1G' or '4096' means. Raises Problem."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text and text[-1].upper() in units else (text, 1)
    if not digits.isdigit() or not int(digits):
        raise Problem(f"{text}: not a size; write it like 64M or 1G")
    return int(digits) * unit
