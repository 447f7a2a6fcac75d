# SPDX-License-Identifier: Apache-2.0
"""Decode a trace into each VM's inputs, what happened regardless of the
root policy, and these into operations of a kernel.
"""
