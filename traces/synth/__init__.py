# SPDX-License-Identifier: Apache-2.0
"""Synthetic traces for benchmarks and what-ifs, in the format of recordings.

from traces.synth import Parameters, synthesize
synthesize(Path("storm.parquet"), Parameters(policy="async", smi_rate=1000, events=1_000_000))
"""

from traces.recording.recording_summary import Summary
from traces.synth.parameters import Parameters, SynthCosts
from traces.synth.source import synthesize

__all__ = ["Parameters", "Summary", "SynthCosts", "synthesize"]
