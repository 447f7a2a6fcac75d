# SPDX-License-Identifier: Apache-2.0
"""Root policies that no kernel has, as examples of what a file for `kvmtrace replay --policy` looks like."""
