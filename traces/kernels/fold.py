# SPDX-License-Identifier: Apache-2.0
"""Makes one `Kernel` of a version and of what was detected, by applying the changes that hold, in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from traces.errors import Problem
from traces.kernels import roles, spte, stored
from traces.kernels.changes import CHANGES, FIRST, Change
from traces.kernels.kernel import Kernel, Version
from traces.kernels.policies import POLICIES, current_name
from traces.kernels.triggers import Trigger
from traces.kernels.vendors import vendor_of
from traces.text import printable
from traces.untrusted import object_at, text_at

if TYPE_CHECKING:
    from traces.metadata import Metadata

_LAST_PATCH: Final = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What was detected on a host or is in a trace, and overrides the version; empty where it is not known."""

    policy: str = ""
    role: Any = None  # {field: [lowest bit, width]}, from BTF
    spte: Any = None  # as `layout.spte` of a trace
    cpu: str = ""  # vendor_id


def at(version: str, facts: Facts | None = None) -> Kernel:
    """Return the kernel of a version such as `5.15`, `6.1.20` or `7.x`; raises Problem for what is no version.

    A version without a patch level means the last of its stable series, which is what distributions have.
    """
    return _with_facts(_folded(parse_version(version)), facts or Facts())


def recorded(metadata: Metadata) -> Kernel:
    """Return the kernel that a trace was recorded on: as it describes it (format 1.1), or folded from what it says.

    Raises Problem where the trace does not say which kernel it is, or where its description is damaged. `policy` is
    what the recorder found; `unknown` where it could not determine it.
    """
    kernel = described(metadata.raw)
    kernel = stored.kernel_of(metadata.raw["kernel"], kernel) if "kernel" in metadata.raw else kernel
    return replace(kernel, policy=metadata.seen_policy) if metadata.seen_policy else kernel


def described(raw: Mapping[str, Any]) -> Kernel:
    """Return the kernel of a recording, folded now by its manifest or metadata. Raises Problem where these lack it."""
    layout, host, policy = (object_at(raw, name) for name in ("layout", "host", "policy"))
    facts = Facts(_known(policy.get("name")), layout.get("role"), layout.get("spte"), text_at(host, "vendor"))
    return at(release_of(raw), facts)


def _known(policy: object) -> str:
    name = current_name(policy) if isinstance(policy, str) else ""
    return name if name in POLICIES else "unknown"


def parse_version(version: str) -> Version:
    """Return a version as three numbers; for `x` or a missing part, one above every real one. Raises Problem."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4}|x)(?:\.(\d{1,5}))?", version)
    if match is None:
        raise Problem(f"{printable(version)}: not a version; write it like 5.15 or 6.1.20")
    major, minor, patch = match[1], match[2], match[3]
    return (
        int(major),
        _LAST_PATCH if minor == "x" else int(minor),
        _LAST_PATCH if patch is None else int(patch),
    )


def release_of(raw: Mapping[str, Any]) -> str:
    """Return the recorded kernel's version. Debian's is taken from the build: its release has the ABI instead."""
    host = object_at(raw, "host")
    release = text_at(host, "kernel")
    exact = re.search(r"Debian (\d{1,4}\.\d{1,4}\.\d{1,5})", text_at(host, "build"))
    match = re.match(r"\d{1,4}\.\d{1,4}(\.\d{1,5})?", release)
    if exact is None and match is None:
        hint = "import it with --kernel" if raw.get("origin") == "imported" else "it cannot be replayed"
        raise Problem(f"the trace does not say which kernel it is of ({release or 'no release'}): {hint}")
    return exact[1] if exact else release


def changes_between(old: Version, new: Version) -> tuple[list[Change], list[Change]]:
    """Return the changes that `new` has and `old` has not, and those that `old` has and `new` has not."""
    gained = [change for change in CHANGES if change.holds(new) and not change.holds(old)]
    return gained, [change for change in CHANGES if change.holds(old) and not change.holds(new)]


def since(name: str, value: object) -> str:
    """Return from which version on a field of `Kernel` had a value, and what made it so."""
    told = [f"{FIRST.version[0]}.{FIRST.version[1]}"] if getattr(FIRST, name) == value else []
    before = getattr(FIRST, name)
    for change in CHANGES:
        now = change.fields.get(name, before)
        if now == value and before != value:
            why = f"{', '.join(change.commits)}: {change.what}" if change.commits else change.what
            told.append(f"{change.since[0]}.{change.since[1]} ({why})")
        before = now
    return " and from ".join(told)


def newer_than_known(version: Version) -> str:
    """Return a remark on a version that is newer than every known change; empty for others."""
    last = max(change.since for change in CHANGES)
    if version[:2] <= last or version[1] == _LAST_PATCH:
        return ""
    newest = f"{last[0]}.{last[1]}"
    return f"newer than all that this kvmtrace knows, which ends with {newest}: taken to do what {newest} does"


@lru_cache(maxsize=256)  # thousands of recordings are of a few kernels
def _folded(version: Version) -> Kernel:
    if version < FIRST.version:
        raise Problem(f"{version[0]}.{version[1]}: there is no TDP MMU before 5.10")
    kernel = replace(FIRST, name=_name(version), version=version)
    for change in CHANGES:
        if change.holds(version):
            kernel = apply(kernel, change)
    return kernel


def apply(kernel: Kernel, change: Change) -> Kernel:
    """Return the kernel with a change applied."""
    for name, value in change.fields.items():
        outer, _, inner = name.partition(".")
        kernel = replace(kernel, **{outer: replace(getattr(kernel, outer), **{inner: value}) if inner else value})
    triggers = ((sign[0], Trigger[sign[1:]]) for sign in change.unloads)
    points = ((sign[0], sign[1:]) for sign in change.points)
    return replace(kernel, unloads=_changed(kernel.unloads, triggers), points=_changed(kernel.points, points))


def _changed(items: frozenset[Any], signs: Any) -> frozenset[Any]:
    for sign, item in signs:
        items = items | {item} if sign == "+" else items - {item}
    return items


def _name(version: Version) -> str:
    """Return a version's name, without the patch level if that makes no difference within the series."""
    major, minor, patch = version
    if minor == _LAST_PATCH:
        return f"{major}.x"
    later = any(first[:2] == (major, minor) and patch < first[2] for change in CHANGES for first in change.backports)
    return f"{major}.{minor}.{patch}" if later else f"{major}.{minor}"


def _with_facts(kernel: Kernel, facts: Facts) -> Kernel:
    if facts.policy:
        kernel = replace(kernel, policy=facts.policy)
    fields = roles.fields_of(facts.role)
    if fields:
        kernel = replace(kernel, layout=replace(kernel.layout, fields=fields))
    words = spte.layout_of(facts.spte, kernel.spte)
    if words is not None:
        kernel = replace(kernel, spte=words)
    return replace(kernel, vendor=vendor_of(facts.cpu)) if facts.cpu else kernel
