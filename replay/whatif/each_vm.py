# SPDX-License-Identifier: Apache-2.0
"""Questions put to each VM of a recording: one that cannot be asked is named, and hides no other's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from replay.decode.capabilities import Capabilities
from traces.errors import Problem

Answered = TypeVar("Answered")


class UnansweredVm(Problem):
    """Why a question cannot be put to a VM."""


def ask_each_vm(
    capabilities: Capabilities, ask: Callable[[Mapping[str, Any]], Answered]
) -> tuple[dict[int, Answered], dict[int, str]]:
    """By VM, what `ask` says of it, and of others why there is no answer. A Problem where there is none at all."""
    answers: dict[int, Answered] = {}
    unanswered: dict[int, str] = {}
    for vm in capabilities.trace.metadata.vms:
        number = int(vm["id"])
        try:
            if not vm["vcpus"]:
                raise UnansweredVm("it had no vCPU")
            answers[number] = ask(vm)
        except UnansweredVm as problem:
            unanswered[number] = str(problem)
    if not answers:
        lines = [f"VM {vm}: {why}" for vm, why in unanswered.items()] or ["there is no VM"]
        more = f" ({len(lines) - 1} more VMs have no answer either)" if len(lines) > 1 else ""
        raise Problem(f"{capabilities.trace.path}: {lines[0]}{more}")
    return answers, unanswered


def notes(unanswered: Mapping[int, str]) -> list[str]:
    """A line for each reason, with the VMs that it holds for."""
    by_why: dict[str, list[str]] = {}
    for vm, why in unanswered.items():
        by_why.setdefault(why, []).append(str(vm))
    return [
        f"note: no answer for VM{'s' if len(vms) > 1 else ''} {', '.join(vms)}: {why}" for why, vms in by_why.items()
    ]


def to_dict(unanswered: Mapping[int, str]) -> list[dict[str, Any]]:
    """The same for a document."""
    return [{"vm": vm, "why": why} for vm, why in unanswered.items()]
