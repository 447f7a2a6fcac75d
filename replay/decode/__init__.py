# SPDX-License-Identifier: Apache-2.0
"""From a trace to each VM's operations: what happened that no root policy decides."""
