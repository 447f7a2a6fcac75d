# SPDX-License-Identifier: Apache-2.0
"""Compiled passes over the rows for what a report asks: counts by group, how long things last, what removed pages."""
