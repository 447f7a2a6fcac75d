# SPDX-License-Identifier: Apache-2.0
"""The result of reading a source besides its rows, in the same form for text and for the tools' own data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.imports.thread_vms import TextThread
from traces.kernels.printed import Form


@dataclass
class Findings:
    """`kind` is what it was: text, perf.data, trace.dat. `lines` are records of binary data; `odd` ones were not
    understood, `first_odd` is the first. `others` are events that a trace has no kind for, by name. `forms` are
    rows by the form of their text, of `raw` there were fields instead. `vendors`: exits of VMX, of SVM. `cut` says
    why the source ended early, if it did. `watched` are kinds whose events were switched on, as the source says: of
    those without rows there was none. `overrun` events were overwritten before anybody read them; `cut_short` ones
    end in dots, and are among the others. `synced`: it is a guest's, and its times were made its host's.
    """

    kind: str = "text"
    threads: list[TextThread] = field(default_factory=list)
    others: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[Form, int] = field(default_factory=dict)
    lines: int = 0
    raw: int = 0
    odd: int = 0
    first_odd: bytes = b""
    joined: int = 0
    lost: int = 0
    uncounted: int = 0
    backwards: int = 0
    bare: int = 0
    ticks: int = 0
    relative: int = 0
    vendors: NDArray[Any] = field(default_factory=lambda: np.zeros(2, np.int64))
    release: str = ""
    clock: str = ""
    cut: str = ""
    vm_of: Mapping[int, str] = field(default_factory=dict)
    how: list[str] = field(default_factory=list)
    watched: frozenset[str] = frozenset()
    overrun: int = 0
    cut_short: int = 0
    synced: bool = False
