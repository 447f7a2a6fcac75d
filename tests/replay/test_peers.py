# SPDX-License-Identifier: Apache-2.0
"""What the engine is measured against does the same work: the same counts on the benchmark's own streams."""

from __future__ import annotations

import pytest

from benchmarks import replay_peers, replay_streams
from benchmarks.replay import POLICIES
from traces.kernels.policies import PolicyParameters


@pytest.mark.parametrize("parameters", POLICIES, ids=lambda parameters: parameters.name)
def test_the_c_program_and_the_reference_count_what_the_engine_counts(parameters: PolicyParameters) -> None:
    baseline = replay_peers.Baseline()
    streams = [*replay_streams.mixed(100_000), replay_streams.storm(2000, 512, 64)]
    assert len(streams) == 7
    for stream in streams:
        _, counts, _ = replay_peers.run_engine(stream, parameters)
        assert sum(counts) > 1000
        assert baseline.run(stream, parameters)[1] == counts, stream.name
        begin = stream.first(2000)
        assert replay_peers.run_reference(begin, parameters)[1] == replay_peers.run_engine(begin, parameters)[1]


def test_the_streams_run_in_virtual_time() -> None:
    assert replay_peers.run_timed(replay_streams.storm(2000, 512, 64), POLICIES[0]) > 0
