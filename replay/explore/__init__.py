# SPDX-License-Identifier: Apache-2.0
"""Small-step models of concurrent kernel paths, and a search through all their interleavings: `kvmtrace explore`.

A scenario of your own needs only these names; docs/explore.md shows how to write one.
"""

from replay.explore.memory import Thing, free, freed
from replay.explore.model import Model, Mutex, Rcu, RwLock, Steps, require, until
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant

__all__ = [
    "HOLDS", "VIOLATION", "Bounds", "Model", "Mutex", "Rcu", "RwLock", "Scenario", "Steps", "Thing", "Variant", "free",
    "freed", "require", "until",
]  # fmt: skip
