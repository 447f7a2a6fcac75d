# SPDX-License-Identifier: Apache-2.0
"""What every verb's `--help` and man page ends with: examples, each on lines of its own."""

from __future__ import annotations

_KEPT = "\b"  # click wraps no paragraph that begins with this on a line of its own


def examples(*lines: str, note: str = "") -> str:
    """Return a verb's epilog: a note, if any, and examples, whose own line ends are kept."""
    head = "Example:" if len(lines) == 1 else "Examples:"
    shown = [f"  {part}" for line in lines for part in line.splitlines()]
    return "\n".join([*([note, ""] if note else []), _KEPT, head, *shown])


def examples_of(epilog: str) -> tuple[str, list[str]]:
    """Return the note and the examples of an epilog that `examples` made."""
    note, _, rest = epilog.partition(_KEPT)
    found: list[str] = []
    for line in rest.splitlines():
        if line.startswith("  "):
            goes_on = found and found[-1].endswith("\\")
            found[-1:] = [f"{found[-1]}\n{line[2:]}"] if goes_on else [*found[-1:], line[2:]]
    return note.strip(), found
