# SPDX-License-Identifier: Apache-2.0
"""A recording from its first record to the trace: segments that survive a kill, and their compaction into one file."""
