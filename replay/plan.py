# SPDX-License-Identifier: Apache-2.0
"""Which policies a replay runs, on which kernel's triggers, and what of the answer the trace does not determine.

From a recording whose kernel frees roots, another policy's outcome follows: what the guest accessed again is recorded.
From one that keeps roots it does not, for accesses to mapped pages cause no exit: the outcome lies between no page
accessed again and every one. Both ends are replays too (`parameters.assume_refault`, `decode.cases.Case`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.simulate.policy_api import Policy
from replay.userfile import load, one_line
from traces import kernels
from traces.errors import Problem
from traces.kernels import Kernel
from traces.kernels.policies import PolicyParameters
from traces.kernels.triggers import OPEN, Trigger

GROUP: Final = "kvmtrace.policies"
DEFAULT: Final = ("preserve", "async")


@dataclass(frozen=True)
class Run:
    """One replay: `bound` is exact, low or high."""

    bound: str
    assume_refault: bool
    case: Case


@dataclass(frozen=True)
class Target:
    """A policy to replay. `policy` is a user's own, a kernel's otherwise.

    `open` says what such a trace does not determine; `writes` are triggers that matter for it only if there are any.
    With `at_least` the outcome has no upper end: its runs give the least that it can be.
    """

    name: str
    kernel: Kernel
    parameters: PolicyParameters
    policy: type[Policy] | None
    recorded: bool
    open: tuple[str, ...]
    runs: tuple[Run, ...]
    writes: frozenset[Trigger] = frozenset()
    at_least: bool = False

    @property
    def assumes(self) -> str:
        """What is taken to be so of the host, without which the outcome would be another; empty where nothing is."""
        if self.parameters.mmu == "tdp" or self.recorded:
            return ""
        return (
            "host memory is taken to be there wherever the shadow MMU prefetches, and its page limit not to be reached"
        )

    @property
    def merged(self) -> bool:
        """Whether its ends are of different role words (`decode.cases.Case`)."""
        return any(run.case.merged for run in self.runs)


@dataclass(frozen=True)
class Refault:
    """The working-set assumption: none, all, accessed, or recent with `pages`; empty: the interval is given."""

    name: str = ""
    pages: int = 0

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}:{self.pages}" if self.name == "recent" else self.name


@dataclass(frozen=True)
class Plan:
    """All that a replay is to do."""

    capabilities: Capabilities
    targets: tuple[Target, ...]
    refault: Refault = field(default_factory=Refault)


def refault(text: str) -> Refault:
    """Parse --refault; raises Problem if it is invalid."""
    if text in ("", "none", "all", "accessed"):
        return Refault(text)
    match = re.fullmatch(r"recent:(\d+)", text)
    if match is None:
        raise Problem(f"--refault {text}: give none, all, accessed or recent:PAGES")
    return Refault("recent", int(match[1]))


def make(capabilities: Capabilities, names: Sequence[str], version: str = "", assumed: Refault | None = None) -> Plan:
    """The plan for these policies (none: the recorded kernel's own, preserve and async), with a kernel's habits.

    Of another kernel, where no policy is named: its own, and the recorded one with that kernel's habits.
    """
    kernel = _kernel(version) if version else capabilities.kernel
    own = capabilities.own.name
    wanted = list(names) or ([kernel.policy, own] if version else [own, *(name for name in DEFAULT if name != own)])
    assumed = assumed or Refault()
    targets = tuple(_target(capabilities, name, kernel, bool(version), assumed) for name in dict.fromkeys(wanted))
    return Plan(capabilities, targets, assumed)


def check(names: Sequence[str]) -> None:
    """Raise a Problem where one of these is no policy, before there is a trace to replay."""
    for name in names:
        if _own_policy(name) is None:
            kernels.at("6.1").parameters(name)  # any version has all of the kernel's


def _kernel(version: str) -> Kernel:
    try:
        return kernels.at(version)
    except Problem as problem:
        raise Problem(f"--kernel {problem}") from None


def _target(capabilities: Capabilities, name: str, kernel: Kernel, other: bool, assumed: Refault) -> Target:
    policy = _own_policy(name)
    parameters = policy.parameters if policy else kernel.parameters(name)
    label = policy.name or policy.__name__ if policy else name
    recorded = policy is None and not other and name == capabilities.own.name
    if recorded and not capabilities.own_or:
        left_out = bool(capabilities.trace.metadata.left_out)
        unseen = (*_unseen_loads(capabilities), *_unseen_end(capabilities))
        unseen = (*_unseen_unloads(capabilities), *unseen) if left_out else unseen
        once = (Run("exact", False, Case()),)
        return Target(label, kernel, capabilities.own, None, True, unseen, once, at_least=left_out)
    keeps = any(each.own_reference for each in (capabilities.own, *capabilities.own_or)) or capabilities.shadow
    refaults = keeps and not (parameters.own_reference or parameters.mmu == "shadow")
    hidden = capabilities.shadow and parameters.mmu == "tdp"
    writes = frozenset(
        trigger
        for trigger in _may_show(capabilities)
        if (OPEN[trigger][0] in kernel.unloads) != (OPEN[trigger][1] in kernel.unloads)
    )
    open_resets = capabilities.open_resets and not capabilities.unbounded
    most = bool(writes) or open_resets
    # Nothing bounds how often a guest may have written it between two exits, each of which would have been an exit.
    hides_wp = capabilities.hides_wp and (Trigger.CR0_WP in kernel.unloads or kernel.layout.guest_bits)
    open_ = [
        *(
            [
                f"with EPT a guest of {capabilities.kernel.name} writes CR0.WP without an exit, and each write would "
                f"unload on {kernel.name}: taken to be never done, so that counts and times are the least"
            ]
            if hides_wp
            else []
        ),
        *_unseen_unloads(capabilities),
        *_unseen_end(capabilities),
        *_unknown_policy(capabilities),
        *(["the recorded kernel kept its roots: what the guest accessed again is not recorded"] if refaults else []),
        *(["the shadow MMU prefetched: which of those pages the guest needed is not in the trace"] if hidden else []),
    ]
    low = Run("low", False, Case())
    refaults = refaults or (most and not parameters.own_reference and parameters.mmu == "tdp")
    merged = refaults and kernel.layout.guest_bits and not capabilities.kernel.layout.guest_bits
    high = Run("high", refaults, Case(most, hidden, merged))
    at_least = hides_wp or bool(capabilities.unbounded)
    if not (refaults or hidden or most):
        runs: tuple[Run, ...] = (low if at_least else replace(low, bound="exact"),)
    elif assumed.name in ("none", "all"):
        runs = (low,) if assumed.name == "none" else (high,)
    else:
        runs = (low, high)
    return Target(label, kernel, parameters, policy, recorded, tuple(open_), runs, writes, at_least)


def _unknown_policy(capabilities: Capabilities) -> list[str]:
    if not capabilities.own_or:
        return []
    names = " or ".join(each.name for each in (capabilities.own, *capabilities.own_or))
    return [
        f"which stable update {capabilities.trace.metadata.kernel} is, is not known: its roots may have been {names} "
        "(import --kernel with the update tells, or --recorded-policy)"
    ]


def _unseen_unloads(capabilities: Capabilities) -> list[str]:
    """What a recording does not determine of how often its vCPUs gave up roots under another policy than its own."""
    if capabilities.unbounded:
        why = "; ".join(capabilities.unbounded)
        return [f"{why}: taken to have unloaded nothing more, so that counts and times are the least"]
    if capabilities.open_resets:
        return [
            "resets are not recorded: there may have been one whenever userspace had the vCPU, and at each write of a "
            "register whose value before is not known"
        ]
    return []


def _unseen_loads(capabilities: Capabilities) -> list[str]:
    """The same under its own policy, of which the tables that were built are shown."""
    if not capabilities.open_resets:
        return []
    return ["resets are not recorded: loads of roots that were there may have been more"]


def _unseen_end(capabilities: Capabilities) -> list[str]:
    """What follows from how VMs end, and from role words, under any policy."""
    return [*_of_ends(capabilities), *_of_roles(capabilities)]


def _of_roles(capabilities: Capabilities) -> list[str]:
    if not capabilities.open_roles:
        return []
    return [
        "a text does not print CR0.WP and EFER.NX, which are in this kernel's role words: where they may have changed, "
        "which roots were shared is not known"
    ]


def _of_ends(capabilities: Capabilities) -> list[str]:
    if capabilities.has("vm_destroy"):
        return []
    return [
        "the end of VMs is not recorded: roots freed, tables removed, SPTEs zapped and flushes are the least that "
        "there were"
    ]


def _may_show(capabilities: Capabilities) -> tuple[Trigger, Trigger]:
    """The open triggers that a recording of a kernel can have: resets where it unloads for all, silence elsewhere."""
    kernel = capabilities.kernel
    if capabilities.open_resets:
        return Trigger.CR0_SILENT, Trigger.CR4_SILENT
    return (
        Trigger.CR0_RESET if Trigger.CR0_WP in kernel.unloads else Trigger.CR0_SILENT,
        Trigger.CR4_RESET if Trigger.CR4_PGE in kernel.unloads else Trigger.CR4_SILENT,
    )


def _own_policy(name: str) -> type[Policy] | None:
    """A user's policy, by path or entry point; None for a name of a kernel's."""
    if name.endswith(".py") or "/" in name:
        return _from_file(Path(name))
    found = [entry for entry in _entries() if entry.name == name]
    if not found:
        return None
    try:
        policy = found[0].load()
    except Exception as error:
        raise Problem(f"--policy {name}: entry point {found[0].value} does not load: {one_line(error)}") from None
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise Problem(f"--policy {name}: entry point {found[0].value} is no subclass of policy_api.Policy")
    return policy


@cache
def _entries() -> tuple[EntryPoint, ...]:
    """Of policies. To find them every installed distribution is looked at: 8 ms, which a short replay would notice."""
    return tuple(entry_points(group=GROUP))


def _from_file(path: Path) -> type[Policy]:
    module = load(path, f"--policy {path}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        what = "has no subclass" if not found else f"has {len(found)} subclasses"
        raise Problem(f"--policy {path}: {what} of replay.simulate.policy_api.Policy: it must have one")
    return found[0]
