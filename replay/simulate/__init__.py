# SPDX-License-Identifier: Apache-2.0
"""Run operations under a root policy: the reference model in plain
Python, and the compiled engine, which must equal it.
"""
