# SPDX-License-Identifier: Apache-2.0
"""The table of root policies: each kernel that the reference dates, by the facts that tell it."""

from __future__ import annotations

import pytest

from traces.kernels.detect import RunningKernel, root_policy
from traces.kernels.policies import POLICIES


class Types:
    """A kernel's BTF as far as the table asks: which functions and page fields it has."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def has_function(self, name: str) -> bool:
        return name in self.names

    def member(self, _struct: str, path: str) -> object | None:
        return object() if path in self.names else None


WORKER, INLINE = "tdp_mmu_zap_root_work", "tdp_mmu_scheduled_root_to_zap"


@pytest.mark.parametrize(
    ("version", "types", "parameters", "expected"),
    [
        ((5, 10), (), {"kvm": {"tdp_mmu": "Y"}}, "sync"),
        ((5, 10), (), {"kvm": {"tdp_mmu": "N"}}, "shadow"),
        ((5, 15), (), {"kvm": {"tdp_mmu": "Y"}}, "sync"),
        ((5, 18), (WORKER,), {"kvm": {"tdp_mmu": "Y"}}, "async"),
        ((6, 1), (INLINE,), {"kvm": {"tdp_mmu": "Y"}}, "preserve"),
        ((6, 1), (WORKER, INLINE), {"kvm": {"tdp_mmu": "Y"}}, "async"),
        ((6, 4), (WORKER,), {"kvm": {"tdp_mmu": "Y"}}, "preserve-worker"),
        ((6, 12), (INLINE,), {"kvm": {"tdp_mmu": "Y"}}, "preserve"),
        ((6, 12), (INLINE,), {"kvm": {"tdp_mmu": "N"}}, "shadow"),
        ((6, 12), (INLINE,), {"kvm": {"tdp_mmu": "Y"}, "kvm_amd": {"npt": "N"}}, "shadow"),
        ((6, 12), (INLINE,), {"kvm": {"tdp_mmu": "Y"}, "kvm_intel": {"ept": "0"}}, "shadow"),
        ((8, 0), (), {"kvm": {"tdp_mmu": "Y"}}, "unknown"),
    ],
)
def test_policies(
    version: tuple[int, int], types: tuple[str, ...], parameters: dict[str, dict[str, str]], expected: str
) -> None:
    found = root_policy(RunningKernel(version, Types(*types), parameters))
    assert found["name"] == expected
    assert found["why"]
    assert found["name"] in {*POLICIES, "unknown"}
