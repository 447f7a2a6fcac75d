# SPDX-License-Identifier: Apache-2.0
"""What every verb of the command line has: help, progress, tables and documents, one line for each failure, and ^C."""
