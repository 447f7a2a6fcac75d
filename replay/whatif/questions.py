# SPDX-License-Identifier: Apache-2.0
"""Put the design questions to the VMs of a trace, and render the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from replay.decode.capabilities import Capabilities
from replay.whatif import aging, apicv_inhibits, each_vm, range_zaps, table_accounting
from replay.whatif.answers import VARIANTS, Answer, Asked, parse
from replay.whatif.workload import FAULTS, Workload, workload
from traces.command_line.durations import duration
from traces.command_line.layout import TextColumn
from traces.command_line.progress import Progress
from traces.command_line.screen import VMS_SHOWN, Page
from traces.kernels import Kernel
from traces.text import vms_text

_ANSWER: Final[Mapping[str, Callable[[Workload, Asked, str], Answer]]] = {
    "aging": aging.answer, "zap_lock": range_zaps.answer, "apicv": apicv_inhibits.answer,
    "tdp_pages": table_accounting.answer,
}  # fmt: skip


def asked(**given: str) -> list[Asked]:
    """Parse the options that were given.

    The names of the arguments are those of `VARIANTS`, and empty texts are ignored.
    """
    return [parse(axis, text) for axis, text in given.items() if text]


def answer(
    capabilities: Capabilities, questions: Sequence[Asked]
) -> tuple[list[tuple[Workload, list[Answer]]], dict[int, str]]:
    """Return each VM's workload with one answer per question, and by VM the reasons why there is no answer.

    The recorded kernel's own variant is always among those that are compared.
    """
    stands = capabilities.kernel
    with Progress("simulating", len(capabilities.trace.metadata.vms) * (len(questions) + 1)) as progress:

        def ask(vm: Mapping[str, Any]) -> tuple[Workload, list[Answer]]:
            work = workload(capabilities, vm)
            return work, _answers(work, stands, questions, progress)

        answers, unanswered = each_vm.ask_each_vm(capabilities, ask)
    return list(answers.values()), unanswered


def _answers(work: Workload, stands: Kernel, questions: Sequence[Asked], progress: Progress) -> list[Answer]:
    answers = []
    progress.at(progress.done + 1)
    for question in questions:
        own = getattr(stands, question.axis)
        wanted = {own, *question.variants}
        variants = tuple(name for name in VARIANTS[question.axis] if name in wanted)
        whole = Asked(question.axis, variants, question.rate, question.pages)
        label = f"{own}{', counted' if question.axis == 'zap_lock' and stands.zap_counted else ''}"
        answers.append(_ANSWER[question.axis](work, whole, label))
        progress.at(progress.done + 1)
    return answers


def to_dict(found: Sequence[tuple[Workload, list[Answer]]]) -> list[dict[str, Any]]:
    """Return the answers as they stand in the JSON document; times are in ns."""
    return [
        {
            "vm": work.vm,
            "hold": work.hold,
            "hold_measured": work.measured,
            "window": work.window,
            "costs": {"scale": work.scale, **vars(work.locks)},
            "recorded_vcpus": work.recorded,
            "questions": [
                {"axis": each.axis, "recorded": each.own, "rows": each.rows, "notes": each.notes} for each in answers
            ],
        }
        for work, answers in found
    ]


def render(found: Sequence[tuple[Workload, list[Answer]]], unanswered: Mapping[int, str]) -> str:
    """Return the answers as text, for the VMs with most faults, since they have most to wait for."""
    page = Page()
    ranked = sorted(found, key=lambda each: _faults(each[0]), reverse=True)
    notes: dict[str, list[int]] = {}
    for work, answers in ranked[:VMS_SHOWN]:
        for each in answers:
            page.say(f"VM {work.vm}, {each.axis.replace('_', '-')}: this kernel's way is {each.own}", "bold")
            headers, cells = each.table
            page.table([TextColumn(name, right=i > 0) for i, name in enumerate(headers)], cells)
            for line in each.notes:
                notes.setdefault(line, []).append(work.vm)
        for line in trust(work):
            notes.setdefault(line, []).append(work.vm)
    page.more(len(found) - VMS_SHOWN, "VMs, with fewer faults than these")
    for line, vms in notes.items():
        page.say(line if len(vms) == len(found) else f"{vms_text(vms)}: {line}")
    for line in each_vm.notes(unanswered):
        page.say(line)
    return page.text


def _faults(work: Workload) -> int:
    return sum(len(program.gap) for program in work.programs)


def trust(work: Workload) -> list[str]:
    """Return the assumptions on which all tables of a VM rest, one line each."""
    how = "measured" if work.measured else "0.23 of a fault, assumed"
    shared = "shared with" if work.faults_share else "not with"
    return [
        f"a fault has mmu_lock for {duration(work.hold)} ({how}), {shared} others; {FAULTS:,} faults of each recorded "
        "vCPU are simulated, the first ones",
        f"vCPUs beyond the {work.recorded} recorded do what a recorded one did, on CPUs of their own, and begin within "
        "the time between two faults: as when all start at once",
        f"what agers, zaps and links themselves cost is the dated table's, times {work.scale:.2g} as this machine's "
        "faults are; in brackets with half and with twice of it",
    ]
