# SPDX-License-Identifier: Apache-2.0
"""The engine's compiled loops: a VM's memory pools, its trees, its roots, its operations, and its virtual clock."""
