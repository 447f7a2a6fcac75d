# SPDX-License-Identifier: Apache-2.0
"""Recordings on their way to a store: a bounded directory in which they wait, and the process that uploads them."""
