# SPDX-License-Identifier: Apache-2.0
"""What reports are made from: rows of traces and of results, as lazy frames or counted, and names."""
