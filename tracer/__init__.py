# SPDX-License-Identifier: Apache-2.0
"""The recorder: BPF probes for the running kernel, their rings, and what takes the events; the live screen; the lab."""
