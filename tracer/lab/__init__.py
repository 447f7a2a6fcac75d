"""The kernel lab: a real kernel, whose own KVM runs nested guests, booted under QEMU's emulation."""
