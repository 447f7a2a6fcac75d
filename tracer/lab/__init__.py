# SPDX-License-Identifier: Apache-2.0
"""The kernel lab: a real kernel, whose own KVM runs nested guests, booted under QEMU's emulation."""
