# SPDX-License-Identifier: Apache-2.0
"""The conformance check: a recording against the model, row by row (`kvmtrace validate`)."""
