# SPDX-License-Identifier: Apache-2.0
"""Tracepoint formats: a fixture as the kernel prints it, and every format of this machine against its print line."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tracer.probing.tracefs import Field, parse_format, tracefs

PAGE_FAULT = """name: kvm_page_fault
ID: 1234
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long guest_rip;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u64 * sptep;\toffset:24;\tsize:8;\tsigned:0;
\tfield:signed char u;\toffset:32;\tsize:1;\tsigned:1;
\tfield:__u8 insn[15];\toffset:33;\tsize:15;\tsigned:0;

print fmt: "vcpu %u rip 0x%lx", REC->vcpu_id, REC->guest_rip
"""


def test_format() -> None:
    assert parse_format(PAGE_FAULT) == {
        "vcpu_id": Field(8, 4, False),
        "guest_rip": Field(16, 8, False),
        "sptep": Field(24, 8, False),
        "u": Field(32, 1, True),
        "insn": Field(33, 15, False),
    }
    assert parse_format(PAGE_FAULT)["u"].ctype == "s8"


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_every_format_of_this_kernel() -> None:
    root = tracefs()
    assert root is not None
    events = [path for system in ("kvm", "kvmmmu") for path in (root / "events" / system).glob("*/format")]
    assert len(events) > 50
    for path in events:
        text = path.read_text()
        fields = parse_format(text)
        printed = set(re.findall(r"REC->(\w+)", text))
        assert printed - {"__data_loc_msg"} <= fields.keys() | {"__data_loc"}, path
        ends = sorted((field.offset, field.offset + field.size) for field in fields.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(ends)), path
