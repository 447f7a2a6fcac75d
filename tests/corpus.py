# SPDX-License-Identifier: Apache-2.0
"""The recordings that ship, and what tests of all of them run over: a few of each kernel where time is short."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).parents[1] / "traces" / "corpus"
RECORDINGS = sorted(CORPUS.glob("*.parquet"))
# Recordings of shadow paging: the guest's page tables decide what they show, so `replay` refuses them
# (test_validate_paging has that), and `validate` has a model of its own for them.
PAGED = [path for path in RECORDINGS if path.stem.endswith(("-npt0", "-ept0"))]
REPLAYED = [path for path in RECORDINGS if path not in PAGED]
# SMM on every kernel, under each of its MMUs; memslots with asynchronous roots and on the newest, as notifiers are.
FEW = ("smi-storm-5.", "smi-storm-6.", "smi-storm-7.", "slot-delete-6.1-async", "slot-delete-7.", "notifier-7.")


def each(paths: Iterable[Path]) -> list[Any]:
    """Parameters of a test of each recording; those that `make quick` leaves out are marked `corpus`."""
    return [pytest.param(path, id=path.stem, marks=() if _is_few(path.stem) else pytest.mark.corpus) for path in paths]


def _is_few(name: str) -> bool:
    """On Intel one of each policy: the model is the same, and what differs shows in any."""
    intel = "-ept" in name or name.endswith("-pml")
    return name.startswith(FEW) and (not intel or name in ("smi-storm-6.1-ept", "smi-storm-6.1-async-ept"))
