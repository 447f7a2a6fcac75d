# SPDX-License-Identifier: Apache-2.0
"""Reports on a fleet: the results of `kvmtrace fleet replay` on many recordings, added up and compared."""
