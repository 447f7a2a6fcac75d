# SPDX-License-Identifier: Apache-2.0
"""Decide which policies a replay runs, as which kernel, and which parts of the result the trace does not determine.

From a recording whose kernel frees roots, the outcome under another policy follows: which pages the guest accessed
again is recorded. From a recording whose kernel keeps roots it does not follow, because an access to a mapped page
causes no exit: the outcome lies between no page and every page being accessed again. Each bound is a replay of its own
(`parameters.assume_refault`, `decode.cases.Case`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.simulate.policy_api import Policy
from replay.userfile import load, one_line
from traces import kernels
from traces.errors import Problem
from traces.kernels import Kernel
from traces.kernels.policies import PolicyParameters
from traces.kernels.triggers import OPEN, Trigger

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "kvmtrace.policies"
DEFAULT: Final = ("preserve", "async")


@dataclass(frozen=True)
class Run:
    """One replay of a policy. `bound` is `exact`, or `low` or `high` if the trace leaves an interval."""

    bound: str
    assume_refault: bool
    case: Case


@dataclass(frozen=True)
class Target:
    """A policy to replay. `policy` is the class of a user's own policy, and None for a policy of the kernel.

    `open` says in sentences what the trace does not determine under this policy. `writes` are the triggers which make
    the outcome undetermined if the recording has any of them. With `at_least` the outcome has no upper bound, and its
    runs give the least possible counts.
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
        """The assumption about the host on which the outcome rests, as a sentence; empty if there is none."""
        if self.parameters.mmu == "tdp" or self.recorded:
            return ""
        return (
            "host memory is taken to be there wherever the shadow MMU prefetches, and its page limit not to be reached"
        )

    @property
    def merged(self) -> bool:
        """Whether a run takes role words that differ only in CR0.WP or EFER.NX for one word (`decode.cases.Case`)."""
        return any(run.case.merged for run in self.runs)


@dataclass(frozen=True)
class Refault:
    """The working-set assumption: `none`, `all`, `accessed`, or `recent` with `pages`.

    If `name` is empty, intervals are given.
    """

    name: str = ""
    pages: int = 0

    @property
    def text(self) -> str:
        """The assumption as it is written on the command line."""
        return f"{self.name}:{self.pages}" if self.name == "recent" else self.name


@dataclass(frozen=True)
class Plan:
    """Everything that a replay is to do: the trace's capabilities, the policies, and the working-set assumption."""

    capabilities: Capabilities
    targets: tuple[Target, ...]
    refault: Refault = field(default_factory=Refault)


def refault(text: str) -> Refault:
    """Parse the value of --refault. Raises Problem if it is invalid."""
    if text in ("", "none", "all", "accessed"):
        return Refault(text)
    match = re.fullmatch(r"recent:(\d+)", text)
    if match is None:
        raise Problem(f"--refault {text}: give none, all, accessed or recent:PAGES")
    return Refault("recent", int(match[1]))


def make(capabilities: Capabilities, names: Sequence[str], version: str = "", assumed: Refault | None = None) -> Plan:
    """Return the plan for the policies `names`, replayed as the kernel `version` (or the recorded kernel) would behave.

    Without `names` the policies are the recorded one, preserve and async. With `version` and no `names` they are that
    kernel's own policy and the recorded one.
    """
    kernel = _kernel(version) if version else capabilities.kernel
    own = capabilities.own.name
    wanted = list(names) or ([kernel.policy, own] if version else [own, *(name for name in DEFAULT if name != own)])
    assumed = assumed or Refault()
    targets = tuple(_target(capabilities, name, kernel, bool(version), assumed) for name in dict.fromkeys(wanted))
    return Plan(capabilities, targets, assumed)


def check(names: Sequence[str]) -> None:
    """Raise Problem if one of `names` is not a policy. This needs no trace."""
    for name in names:
        if _own_policy(name) is None:
            kernels.at("6.1").parameters(name)  # raises Problem; every version knows all policies of kernels


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
    # Nothing bounds how often a guest wrote CR0.WP without an exit; on a kernel that intercepts it, each write exits.
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
    """Say which unloads under another policy than the recorded one the recording does not determine."""
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
    """Say which loads under the recorded policy the recording does not determine.

    The tables that were built are recorded.
    """
    if not capabilities.open_resets:
        return []
    return ["resets are not recorded: loads of roots that were there may have been more"]


def _unseen_end(capabilities: Capabilities) -> list[str]:
    """Say what stays undetermined under any policy because the ends of VMs or bits of role words are not recorded."""
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
    """Return the triggers of unknown effect that a recording of this kernel can have, for CR0 and for CR4.

    A kernel that unloads for every write shows resets (RESET); other kernels show nothing for them (SILENT).
    """
    kernel = capabilities.kernel
    if capabilities.open_resets:
        return Trigger.CR0_SILENT, Trigger.CR4_SILENT
    return (
        Trigger.CR0_RESET if Trigger.CR0_WP in kernel.unloads else Trigger.CR0_SILENT,
        Trigger.CR4_RESET if Trigger.CR4_PGE in kernel.unloads else Trigger.CR4_SILENT,
    )


def _own_policy(name: str) -> type[Policy] | None:
    """Return a user's policy, named by a path or an entry point, or None if `name` is neither.

    Raises Problem if it is invalid.
    """
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
    """Return the installed entry points for policies.

    The result is cached: a search looks at every installed distribution and takes 8 ms, which a short replay would
    notice.
    """
    from importlib.metadata import entry_points  # takes 50 ms

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
