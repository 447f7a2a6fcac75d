# SPDX-License-Identifier: Apache-2.0
"""The bounds of what a trace leaves undetermined in a replay's inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One bound of what a trace does not determine."""

    most: bool = False  # writes of CR0 and CR4 of unknown value unload
    hidden: bool = False  # prefetched pages were needed
    # CR0.WP and EFER.NX make no roots of their own: of a kernel whose words have neither, all that it had mapped in the
    # one root is what a root built anew is given (`parameters.assume_refault`).
    merged: bool = False
