# SPDX-License-Identifier: Apache-2.0
"""A report before it has a format: its verdict, figures, tables and pictures, and how far they can be trusted."""
