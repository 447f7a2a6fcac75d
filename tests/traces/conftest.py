# SPDX-License-Identifier: Apache-2.0
"""What the tests of damaged and of forged files begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import streams
from tests.traces.making import trace


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed") / "seed.parquet"
    trace(path, streams.interleave([streams.smi_storm(40, vm=1), streams.emulator_storm(30, vm=2)]))
    return path
