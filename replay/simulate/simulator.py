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
from replay.simulate.model_state import Counters, Logged
from replay.simulate.operations import Block, Ranges, Word
from replay.simulate.policy_api import Policy
from replay.simulate.reference import Vm


class Simulator(Protocol):
    """The interface that the engine and the reference model share."""

    @property
    def vcpus(self) -> Vcpus:
        """The counts of vCPUs so far."""

    @property
    def counters(self) -> Counters:
        """The counts of the VM so far."""

    def feed(self, block: Block, ranges: Ranges, first: int = 0) -> None:
        """Run a block's operations; `first` is the position of the block's first operation in the whole stream."""

    def take_log(self) -> RootLog:
        """Return the rows of the root log since the last call, and empty the log."""


class Reference:
    """The reference model behind the engine's interface; `policy` may be a user's own."""

    def __init__(self, policy: Policy, assume_refault: bool, words: list[Word], vcpus: int) -> None:
        self._vm: Vm = dispatch.begin(replace(policy.parameters, assume_refault=assume_refault), words, vcpus, policy)

    def feed(self, block: Block, ranges: Ranges, first: int = 0) -> None:
        """Run a block's operations; `first` is the position of the block's first operation in the whole stream."""
        dispatch.feed(self._vm, block, ranges, first)

    @property
    def vcpus(self) -> Vcpus:
        """The counts of vCPUs so far."""
        return Vcpus(**{
            field.name: np.array([getattr(vcpu, field.name) for vcpu in self._vm.vcpus], np.int64)
            for field in fields(Vcpus)
        })  # fmt: skip

    @property
    def counters(self) -> Counters:
        """The counts of the VM so far."""
        return self._vm.counters

    def take_log(self) -> RootLog:
        """Return the rows of the root log since the last call, and empty the log."""
        log, self._vm.log = self._vm.log, []
        return RootLog(**{field.name: _column(log, field.name) for field in fields(RootLog)})


def _column(log: Iterable[Logged], name: str) -> NDArray[Any]:
    return np.array([int(getattr(row, name)) for row in log], np.int64)
