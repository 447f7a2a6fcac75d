# SPDX-License-Identifier: Apache-2.0
"""The two extremes of what a trace leaves undetermined in a replay's inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One extreme of what a trace does not determine; the defaults are the low one."""

    most: bool = False  # writes of CR0 and CR4 whose values are unknown do unload
    hidden: bool = False  # the guest did access the pages that the recorded kernel prefetched
    # CR0.WP and EFER.NX do not distinguish roots. A recorded kernel without these bits in its role words had everything
    # mapped in one root, so a root that is built anew is given all of that (`parameters.assume_refault`).
    merged: bool = False
