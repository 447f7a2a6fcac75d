# SPDX-License-Identifier: Apache-2.0
"""The engine's loops, compiled: a VM's pools, its trees, its roots, what happens to it, and its clock."""
