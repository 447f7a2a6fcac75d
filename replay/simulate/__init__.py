# SPDX-License-Identifier: Apache-2.0
"""Operations run under a root policy: the reference model in plain Python, and the compiled engine that equals it."""
