# SPDX-License-Identifier: Apache-2.0
"""Object stores and local folders, one way to both: where recordings of many hosts are, and results go."""
