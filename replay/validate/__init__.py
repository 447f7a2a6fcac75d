# SPDX-License-Identifier: Apache-2.0
"""The conformance check of `kvmtrace validate`: compare a recording with the model of its kernel, row by row."""
