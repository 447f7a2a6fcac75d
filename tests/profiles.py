# SPDX-License-Identifier: Apache-2.0
"""How many examples Hypothesis tries: `quick` for `make quick`, `full` for `make test`, `ci` where CI is set.

No profile has a deadline, and none fails for slowness: a busy machine is not a defect.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import HealthCheck, settings

SLOW: Final = (HealthCheck.too_slow, HealthCheck.data_too_large)
_FULL: Final = 100  # examples of a test that asks for no number

settings.register_profile("full", deadline=None, suppress_health_check=SLOW, max_examples=_FULL)
settings.register_profile("quick", settings.get_profile("full"), max_examples=_FULL // 10)
settings.register_profile("ci", settings.get_profile("full"), max_examples=2 * _FULL, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "full")


def examples(count: int, *suppressed: HealthCheck) -> settings:
    """Settings of a test that needs another number: `count` in the profile `full`, and in proportion elsewhere."""
    return settings(
        max_examples=max(1, count * settings().max_examples // _FULL), suppress_health_check=(*SLOW, *suppressed)
    )
