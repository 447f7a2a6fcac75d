# SPDX-License-Identifier: Apache-2.0
"""What an imported trace says of its source, as lines of text: none for a recording of kvmtrace's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from traces.metadata import BY_RELEASE, Metadata
from traces.text import printable
from traces.untrusted import count_at, object_at, text_at

_MOST: Final = 20
_LONGEST: Final = 400


def imported(raw: Mapping[str, Any]) -> bool:
    """Whether another tool recorded it."""
    return raw.get("origin") == "imported"


def origin(raw: Mapping[str, Any]) -> str:
    """Return a text such as `imported from the text trace.txt`."""
    source = object_at(raw, "source")
    return f"imported from the {printable(text_at(source, 'kind') or 'file')} {printable(text_at(source, 'path'))}"


def notes(raw: Mapping[str, Any]) -> list[str]:
    """Return lines on what the source cannot show, what was inferred, and what else a reader must know."""
    if not imported(raw):
        return []
    source = object_at(raw, "source")
    cannot = ", ".join(_lines(source, "cannot_show"))
    lines = [f"{origin(raw)}, which does not show: {cannot}" if cannot else origin(raw)]
    lines += [f"inferred: {line}" for line in _lines(source, "inferred")]
    return lines + _lines(source, "remarks")


def from_text(raw: Mapping[str, Any]) -> bool:
    """Return whether the rows of an imported trace were read from printed text rather than from binary fields."""
    source = object_at(raw, "source")
    return imported(raw) and text_at(source, "kind") == "text" and not count_at(source, "as_fields")


def overrun(raw: Mapping[str, Any]) -> int:
    """Return how many events an import's source says were overwritten before they were read."""
    return count_at(object_at(raw, "source"), "overrun") if imported(raw) else 0


def other_policies(metadata: Metadata) -> list[str]:
    """Return root policies that an import's kernel may have had besides the one that it is taken to have had."""
    given = object_at(metadata.raw, "policy").get("or") if metadata.policy_by == BY_RELEASE else None
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def lacks(probes: tuple[Mapping[str, Any], ...], kind: str, column: str) -> bool:
    """Return whether a source has rows of this kind without this column."""
    columns = next((probe.get("lacks") for probe in probes if probe.get("kind") == kind), None)
    return isinstance(columns, list) and column in columns


def _lines(source: Mapping[str, Any], key: str) -> list[str]:
    found = source.get(key)
    lines = found if isinstance(found, list) else []
    return [printable(line)[:_LONGEST] for line in lines[:_MOST] if isinstance(line, str)]
