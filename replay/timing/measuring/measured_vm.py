# SPDX-License-Identifier: Apache-2.0
"""Decode one VM once: measure the costs of its actions, and keep its operations
for a virtual clock that runs with these costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replay.decode.capabilities import Capabilities
from replay.decode.row_counts import RowCounts
from replay.decode.vm_inputs import VmInputs
from replay.simulate.engine import Engine
from replay.simulate.model_state import Happened
from replay.spool import Spool
from replay.timing.measuring.measure import Measured, Measurement, SpanTimes


@dataclass(frozen=True)
class MeasuredVm:
    """A VM's decoded inputs, which are used up, what was measured, and the
    engine after the replay of the recorded policy.
    """

    inputs: VmInputs
    measured: Measured
    engine: Engine


def measure_vm(
    capabilities: Capabilities,
    vm: Mapping[str, Any],
    spool: Spool | None,
    times: SpanTimes | None = None,
    row_counts: RowCounts | None = None,
) -> MeasuredVm:
    """Measure a VM. `row_counts` counts its rows on the way.

    The operations of the recorded kernel are added to `spool` if there is one.
    """
    times = times or SpanTimes(capabilities, vm)
    inputs = VmInputs(capabilities, vm, times=times, row_counts=row_counts)
    measurement = Measurement(capabilities, inputs, times)
    engine = Engine(capabilities.own, measurement.own.words, max(len(inputs.vcpus), 1))
    done = tables = 0
    for part in inputs:
        timed = measurement.take(part)
        engine.feed(timed.block, part.ranges, done)
        done += len(timed)
        log = engine.take_log()
        tables += int(log.tables[log.event == Happened.FREED].sum())
        if spool is not None:
            spool.append(timed, part.ranges)
    return MeasuredVm(inputs, measurement.result(engine.vcpus.faults, tables), engine)
