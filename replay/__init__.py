# SPDX-License-Identifier: Apache-2.0
"""A software TDP MMU: what a recording's VMs would have done under another root policy."""
