# SPDX-License-Identifier: Apache-2.0
"""How the kernel is watched: where each event shows, the BPF programs, and where structures have what they read."""
