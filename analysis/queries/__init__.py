# SPDX-License-Identifier: Apache-2.0
"""Named queries: each gives a LazyFrame of a recording or a result."""
