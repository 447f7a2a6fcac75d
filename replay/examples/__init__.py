# SPDX-License-Identifier: Apache-2.0
"""Examples of files for `kvmtrace replay --policy` and `kvmtrace
explore`: policies that no kernel has, and a scenario.
"""
