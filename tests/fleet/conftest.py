# SPDX-License-Identifier: Apache-2.0
"""One S3 on loopback for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fleet import servers


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of moto's server, with a bucket."""
    with servers.s3() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The same, with this process's environment set for it."""
    for name, value in servers.environment(s3_port).items():
        monkeypatch.setenv(name, value)
    return s3_port
