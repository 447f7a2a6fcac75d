# SPDX-License-Identifier: Apache-2.0
"""What every vCPU does, second by second, of this host or of a recording."""
