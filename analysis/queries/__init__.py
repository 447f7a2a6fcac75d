"""Named queries: each gives a LazyFrame of a recording or a result."""
