# SPDX-License-Identifier: Apache-2.0
"""The trace format: how traces are stored, read, checked, imported and made up, and what each kernel's KVM does."""

import os
import sys

# Of Arrow's allocators this one gives memory back soonest: a third less at the peak of a report than with the default.
# Arrow reads it when it is loaded; what `pyarrow.set_memory_pool` says later does not hold for its Parquet reader.
if "pyarrow" not in sys.modules:
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")
