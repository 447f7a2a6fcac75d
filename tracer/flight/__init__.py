# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: the last seconds are always in memory, and become a trace when something happens."""
