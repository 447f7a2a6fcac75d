"""Decodes one VM once: measures what things cost in it, and keeps its inputs for whoever runs a clock with that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replay.decode.capabilities import Capabilities
from replay.decode.vm_inputs import VmInputs
from replay.simulate.engine import Engine
from replay.simulate.reference import Happened
from replay.spool import Spool
from replay.timing.measure import Measured, Measurement, SpanTimes


def measure_vm(
    capabilities: Capabilities, vm: Mapping[str, Any], spool: Spool | None, times: SpanTimes | None = None
) -> tuple[VmInputs, Measured]:
    """The VM's inputs (all taken: they are in `spool`, if there is one), and what was measured."""
    times = times or SpanTimes(capabilities, vm)
    inputs = VmInputs(capabilities, vm, times=times)
    measurement = Measurement(capabilities, inputs, times)
    engine = Engine(capabilities.own, measurement.words, max(len(inputs.vcpus), 1))
    done = tables = 0
    for part in inputs:
        block = measurement.take(part).block
        engine.feed(block, part.ranges, done)
        done += len(block)
        log = engine.take_log()
        tables += int(log.tables[log.event == Happened.FREED].sum())
        if spool is not None:
            spool.append(part)
    return inputs, measurement.result(engine.vcpus.faults, tables)
