# SPDX-License-Identifier: Apache-2.0
"""Named queries: each returns a LazyFrame over a recording or a result."""
