# SPDX-License-Identifier: Apache-2.0
"""What KVM does, step by step, and the state of a VM that the steps change."""
