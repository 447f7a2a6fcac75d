# SPDX-License-Identifier: Apache-2.0
"""What a trace says about itself: the JSON under the Parquet key `kvmtrace`, checked before anyone relies on it.

The recorder's manifest is carried through; compaction adds what it found in the rows. Keys that this version does not
know are kept in `Metadata.raw` untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from traces.errors import Problem
from traces.kernels.policies import current_name
from traces.outputs import TRACE_KEY
from traces.schema import FORMAT_MAJOR
from traces.text import count, events_lost
from traces.untrusted import object_at, text_at

KEY: Final = TRACE_KEY
BY_ROWS: Final = "its rows"
BY_TYPES: Final = "the kernel's types"
BY_USER: Final = "--recorded-policy"
BY_RELEASE: Final = "its release"
MAX_BYTES: Final = 64 << 20  # Arrow reads no longer strings than 100 MB from a footer


@dataclass(frozen=True)
class RowGroup:
    """One row group: its VM (None: rows of no known VM), how many rows, where its bytes lie, and their CRC-32.

    `constants` are the columns that have one value (None: null) in all rows; a reader need not decode them.
    """

    vm: int | None
    rows: int
    first_seq: int
    last_seq: int
    first_time: int
    last_time: int
    offset: int
    size: int
    crc32: int
    constants: Mapping[str, int | None]


@dataclass(frozen=True)
class Metadata:
    """Typed view of a trace's metadata; `raw` is all of it, unknown keys included."""

    raw: Mapping[str, Any]
    format: tuple[int, int]
    events: int
    kinds: Mapping[str, int]
    complete: bool
    discrepancies: tuple[str, ...]
    vms: tuple[Mapping[str, Any], ...]
    threads: tuple[Mapping[str, Any], ...]
    probes: tuple[Mapping[str, Any], ...]
    gaps: tuple[Mapping[str, Any], ...]
    gap_count: int
    root_count: int
    uncreated_roots: tuple[Mapping[str, Any], ...]
    loss: Mapping[str, Mapping[str, Mapping[str, int]]]
    row_groups: tuple[RowGroup, ...]
    left_out: tuple[Mapping[str, Any], ...] = ()  # stretches of time in which some kinds were not recorded, on purpose
    seen_policy: str = ""  # a root policy other than the recorder's: shown by rows of a 1.0 trace, or given
    policy_by: str = BY_TYPES  # how the policy is known

    @property
    def emitted(self) -> int:
        """The number of events that the probes met, stored or lost."""
        return self.events + self.lost

    @property
    def lost(self) -> int:
        return sum(self.lost_of(kind) for kind in self.loss)

    @property
    def lost_text(self) -> str:
        """How many events were lost, as text."""
        return f"{events_lost(self.lost)} in {count(self.gap_count, 'gap')}"

    def lost_of(self, kind: str) -> int:
        """Return how many events of one kind the rings refused."""
        return sum(self.loss[kind].get("lost", {}).values())

    def left_out_of(self, kind: str) -> list[tuple[int, int]]:
        """Return the intervals (boot ns) in which events of this kind were neither recorded nor counted."""
        end = self.span[1]
        return [
            (each["since"], end if each["until"] is None else each["until"])
            for each in self.left_out
            if kind in each["kinds"]
        ]

    def may_lack(self, kind: str) -> bool:
        """Whether the rows may lack events of this kind, because some were left out or lost."""
        return bool(self.left_out_of(kind)) or (kind in self.loss and self.lost_of(kind) > 0)

    @property
    def missed(self) -> dict[str, int]:
        """The number of runs that the kernel skipped, by probe; empty where a file has something else there."""
        missed = self.raw.get("missed")
        return {str(k): v for k, v in missed.items() if isinstance(v, int)} if isinstance(missed, dict) else {}

    @cached_property
    def span(self) -> tuple[int, int]:
        """Boot ns of the first and the last row; 0 where there is none."""
        groups = self.row_groups
        first, last = (group.first_time for group in groups), (group.last_time for group in groups)
        return min(first, default=0), max(last, default=0)

    @cached_property
    def spans(self) -> Mapping[int, tuple[int, int]]:
        """Boot ns of each VM's first and last row."""
        found: dict[int, tuple[int, int]] = {}
        for group in self.row_groups:
            if group.vm is not None:
                first, last = found.get(group.vm, (group.first_time, group.last_time))
                found[group.vm] = min(first, group.first_time), max(last, group.last_time)
        return found

    @property
    def kernel(self) -> str:
        """The recorded kernel's release, empty where the recorder did not say."""
        return text_at(object_at(self.raw, "host"), "kernel")

    @property
    def policy_text(self) -> str:
        """The root policy as text, with what decides it."""
        return f"{self.policy}, by {self.policy_by}" if self.policy else "unknown"

    @property
    def policy(self) -> str:
        """The root policy of the kernel, by today's name: the recorder's, unless rows show another; empty: unknown."""
        return self.seen_policy or current_name(text_at(object_at(self.raw, "policy"), "name"))


def parse(text: bytes, where: str) -> Metadata:
    """Check and read the JSON. Raises a Problem of one line where it is not what a trace of this version has."""
    if len(text) > MAX_BYTES:
        raise Problem(f"{where}: metadata of {len(text):,} bytes is too large")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise Problem(f"{where}: damaged: its metadata is not JSON") from None
    if not isinstance(raw, dict):
        raise Problem(f"{where}: damaged: its metadata is not an object")
    version = raw.get("format")
    if not isinstance(version, dict) or not _is_count(version.get("major")) or not _is_count(version.get("minor")):
        raise Problem(f"{where}: damaged: its metadata has no format version")
    if version["major"] > FORMAT_MAJOR:
        raise Problem(
            f"{where}: format {version['major']}.{version['minor']} is newer than this kvmtrace reads "
            f"({FORMAT_MAJOR}.x): upgrade kvmtrace"
        )
    try:
        return _view(raw, (version["major"], version["minor"]))
    except (_Malformed, KeyError, TypeError, OverflowError) as error:
        raise Problem(f"{where}: damaged: metadata {error}") from None


class _Malformed(Exception):
    pass


def _view(raw: dict[str, Any], version: tuple[int, int]) -> Metadata:
    kinds = _expect(raw, "kinds", lambda v: isinstance(v, dict) and all(map(_is_count, v.values())))
    loss = _expect(raw, "loss", _is_loss)
    return Metadata(
        raw=raw,
        format=version,
        events=_expect(raw, "events", _is_count),
        kinds=kinds,
        complete=_expect(raw, "complete", lambda v: isinstance(v, bool)),
        discrepancies=tuple(_expect(raw, "discrepancies", lambda v: _is_list(v, str))),
        vms=tuple(_expect(raw, "vms", _is_vms)),
        threads=tuple(_expect(raw, "threads", lambda v: _is_list(v, dict))),
        gaps=tuple(_expect(raw, "gaps", _is_gaps)),
        probes=tuple(raw["probes"] if _is_list(raw.get("probes"), dict) else ()),
        gap_count=_expect(raw, "gap_count", _is_count),
        root_count=_expect(_expect(raw, "roots", _is_object), "count", _is_count),
        uncreated_roots=tuple(_expect(_expect(raw, "roots", _is_object), "uncreated", _is_roots)),
        loss=loss,
        row_groups=tuple(_row_group(group) for group in _expect(raw, "row_groups", lambda v: _is_list(v, dict))),
        left_out=tuple(_expect(raw, "left_out", _is_left_out) if "left_out" in raw else ()),
    )


def _row_group(group: dict[str, Any]) -> RowGroup:
    vm = group["vm"]
    if vm is not None and not _is_count(vm):
        raise _Malformed("`row_groups` has a bad `vm`")
    names = ("rows", "first_seq", "last_seq", "first_time", "last_time", "offset", "size", "crc32")
    numbers = {name: group[name] for name in names}
    if not all(isinstance(value, int) and -(1 << 63) <= value < 1 << 63 for value in numbers.values()):
        raise _Malformed("`row_groups` has a bad number")
    constants = group["constants"]
    if not isinstance(constants, dict) or not all(v is None or isinstance(v, int) for v in constants.values()):
        raise _Malformed("`row_groups` has bad `constants`")
    return RowGroup(vm=vm, **numbers, constants=constants)


def _expect(raw: Mapping[str, Any], key: str, fits: Callable[[Any], bool]) -> Any:
    if key not in raw:
        raise _Malformed(f"`{key}` is missing")
    if not fits(raw[key]):
        raise _Malformed(f"`{key}` is not what the format says")
    return raw[key]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def _is_list(value: Any, item: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, item) for entry in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_roots(value: Any) -> bool:
    bounds = {"id": 31, "vm": 31, "table": 63, "role": 32}
    return _is_list(value, dict) and all(
        (name == "vm" and root.get(name, 0) is None) or (_is_count(root.get(name)) and root[name] >> bits == 0)
        for root in value
        for name, bits in bounds.items()
    )


def _is_loss(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(kind, dict)
        and all(isinstance(cpus, dict) and all(map(_is_count, cpus.values())) for cpus in kind.values())
        for kind in value.values()
    )


def _is_vms(value: Any) -> bool:
    return _is_list(value, dict) and all(
        _is_count(vm.get("id"))
        and _is_count(vm.get("pid"))
        and all(isinstance(vm.get(key), str) for key in ("comm", "origin"))
        and all(vm.get(key) is None or _is_count(vm[key]) for key in ("since", "until"))
        and _has_counts(vm.get("vcpus"), "id", "tid")
        and _has_counts(vm.get("slots"), "slot", "as_id", "gfn", "pages", "hva")
        and all(slot.get(key) is None or _is_time(slot[key]) for slot in vm["slots"] for key in ("since", "until"))
        for vm in value
    )


def _is_gaps(value: Any) -> bool:
    return _is_list(value, dict) and all(_is_time(gap.get(key)) for gap in value for key in ("since", "until"))


def _is_left_out(value: Any) -> bool:
    return _is_list(value, dict) and all(
        _is_time(each.get("since"))
        and "until" in each
        and (each["until"] is None or _is_time(each["until"]))
        and _is_list(each.get("kinds"), str)
        for each in value
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 64


def _has_counts(rows: Any, *names: str) -> bool:
    return _is_list(rows, dict) and all(_is_count(row.get(name)) for row in rows for name in names)
