# SPDX-License-Identifier: Apache-2.0
"""An empty place for kernels, and real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.lab import fetch, lab_kernels
from traces.errors import Problem


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel directory, and an empty cache next to it."""
    directory = tmp_path / "kernels"
    directory.mkdir()
    monkeypatch.setenv("KVMTRACE_KERNELS", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory


@pytest.fixture
def lab_kernel(request: pytest.FixtureRequest) -> lab_kernels.Bootable:
    """A kernel of the table, fetched if need be."""
    try:
        return fetch.fetch(request.param)
    except Problem as problem:
        if lab_kernels.KERNELS[request.param].variant:
            pytest.skip(str(problem))
        raise
