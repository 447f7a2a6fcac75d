# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.vmm`: build the program where it is missing or out of date, and say where it is."""

from __future__ import annotations

import sys

from tracer.vmm import binary
from traces.errors import Problem

try:
    print(binary())
except Problem as problem:
    print(f"kvmtrace: {problem}", file=sys.stderr)
    sys.exit(problem.code)
