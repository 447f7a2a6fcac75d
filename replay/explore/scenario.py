# SPDX-License-Identifier: Apache-2.0
"""A scenario: a model in several variants, each with its expected outcome; and the run of one variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from replay.explore import schedule
from replay.explore.model import Model
from replay.explore.ready_model import ReadyModel
from replay.explore.schedule import Schedule
from replay.explore.search import LIMIT, Exploration, explore
from replay.userfile import one_line
from traces.errors import Problem

VIOLATION: Final = "violation"
HOLDS: Final = "holds"

Bounds = Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """A variant of a scenario.

    `expect` is "violation" or "holds"; `about` says in a line what differs and why it matters.
    """

    name: str
    expect: str
    about: str = ""


@dataclass(frozen=True)
class Scenario:
    """A scenario. `build(model, variant, bounds)` describes the model of a variant.

    `bounds` are the numbers that limit its size, such as that of vCPUs, with their defaults.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    build: Callable[[Model, str, Bounds], None]
    bounds: Bounds = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.variants:
            raise Problem(f"scenario {self.name} has no variants")
        for variant in self.variants:
            if variant.expect not in (VIOLATION, HOLDS):
                raise Problem(f"variant {variant.name}: expects {variant.expect!r}; give {VIOLATION} or {HOLDS}")

    def variant(self, name: str) -> Variant:
        """Return the variant of this name. Raises Problem if there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise Problem(f"scenario {self.name} has no variant {name}: it has {known}")

    def bounded(self, given: Bounds) -> Bounds:
        """Return the scenario's bounds, with the values in `given` replacing the defaults.

        Raises Problem if one is invalid.
        """
        for name, count in given.items():
            if name not in self.bounds:
                raise Problem(f"scenario {self.name} has no bound {name}: it has {', '.join(self.bounds) or 'none'}")
            if count < 1:
                raise Problem(f"bound {name}={count}: must be at least 1")
        return MappingProxyType({**self.bounds, **given})

    def model(self, variant: str, bounds: Bounds) -> Model:
        """Return the model of a variant, ready to be explored. Raises Problem if the scenario's code fails."""
        model = Model()
        try:
            self.build(model, variant, bounds)
        except Problem:
            raise
        except Exception as error:
            raise Problem(f"scenario {self.name}, variant {variant}: does not build: {one_line(error)}") from None
        return model


@dataclass(frozen=True)
class ScenarioRun:
    """A variant that was explored; `schedule` leads to the violation, and is None if none was found."""

    scenario: Scenario
    variant: Variant
    bounds: Bounds
    exploration: Exploration
    schedule: Schedule | None

    @property
    def outcome(self) -> str:
        return HOLDS if self.schedule is None else VIOLATION


def run(scenario: Scenario, variant: str, bounds: Bounds, limit: int = LIMIT) -> ScenarioRun:
    """Explore one variant. Raises Problem if it has more than `limit` states."""
    chosen, bounded = scenario.variant(variant), scenario.bounded(bounds)
    model = scenario.model(variant, bounded)
    exploration = explore(model, limit)
    found = exploration.found
    made = schedule.make(ReadyModel(model), found, scenario.name, variant, bounded) if found is not None else None
    return ScenarioRun(scenario, chosen, bounded, exploration, made)
