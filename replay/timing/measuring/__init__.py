# SPDX-License-Identifier: Apache-2.0
"""What a VM's recording says of time: the costs of its actions, steal time, and waits for mmu_lock."""
