# SPDX-License-Identifier: Apache-2.0
"""One VM under one policy as `run` drives it: the engine for kernels' policies, the reference model for users' own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from replay.simulate import dispatch
from replay.simulate.engine import RootLog, Vcpus
from replay.simulate.operations import Block, Ranges, Word
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Counters, Logged, Vm


class Simulator(Protocol):
    """What both implementations offer."""

    @property
    def vcpus(self) -> Vcpus:
        """Counts by vCPU, as they are now."""

    @property
    def counters(self) -> Counters:
        """Counts of the VM, as they are now."""

    def feed(self, block: Block, ranges: Ranges, first: int = 0) -> None:
        """Do a block's operations; `first` is the number of its first one in the stream."""

    def take_log(self) -> RootLog:
        """What the root log holds since it was last taken."""


class Reference:
    """The reference model with the engine's manners; `policy` may be a user's."""

    def __init__(self, policy: Policy, assume_refault: bool, words: list[Word], vcpus: int) -> None:
        self._vm: Vm = dispatch.begin(replace(policy.parameters, assume_refault=assume_refault), words, vcpus, policy)

    def feed(self, block: Block, ranges: Ranges, first: int = 0) -> None:
        """Do a block's operations; `first` is the number of its first one in the stream."""
        dispatch.feed(self._vm, block, ranges, first)

    @property
    def vcpus(self) -> Vcpus:
        """Counts by vCPU, as they are now."""
        return Vcpus(**{
            field.name: np.array([getattr(vcpu, field.name) for vcpu in self._vm.vcpus], np.int64)
            for field in fields(Vcpus)
        })  # fmt: skip

    @property
    def counters(self) -> Counters:
        """Counts of the VM, as they are now."""
        return self._vm.counters

    def take_log(self) -> RootLog:
        """What the root log holds since it was last taken."""
        log, self._vm.log = self._vm.log, []
        return RootLog(**{field.name: _column(log, field.name) for field in fields(RootLog)})


def _column(log: Iterable[Logged], name: str) -> NDArray[Any]:
    return np.array([int(getattr(row, name)) for row in log], np.int64)
