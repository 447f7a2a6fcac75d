# SPDX-License-Identifier: Apache-2.0
"""Reports on recordings and replays: named queries in polars, one report model, its formats, gates, comparing."""
