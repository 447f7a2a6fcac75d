# SPDX-License-Identifier: Apache-2.0
"""Put a question to each VM of a recording.

A VM that cannot answer is named with the reason, and the others still answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from replay.decode.capabilities import Capabilities
from traces.errors import Problem

Answered = TypeVar("Answered")


class UnansweredVm(Problem):
    """The reason why a question has no answer for a VM."""


def ask_each_vm(
    capabilities: Capabilities, ask: Callable[[Mapping[str, Any]], Answered]
) -> tuple[dict[int, Answered], dict[int, str]]:
    """Return by VM the answers of `ask`, and by VM the reasons why there is no answer.

    Raises Problem if no VM has an answer.
    """
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
    """Return one line for each reason, with the VMs to which it applies."""
    by_why: dict[str, list[str]] = {}
    for vm, why in unanswered.items():
        by_why.setdefault(why, []).append(str(vm))
    return [
        f"note: no answer for VM{'s' if len(vms) > 1 else ''} {', '.join(vms)}: {why}" for why, vms in by_why.items()
    ]


def to_dict(unanswered: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the VMs without an answer as they stand in JSON."""
    return [{"vm": vm, "why": why} for vm, why in unanswered.items()]
