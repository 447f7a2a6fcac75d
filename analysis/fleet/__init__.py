# SPDX-License-Identifier: Apache-2.0
"""Reports on a fleet: what `kvmtrace fleet replay` made of many recordings, added up and compared."""
