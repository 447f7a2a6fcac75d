# SPDX-License-Identifier: Apache-2.0
"""Traces of what others recorded: the text of ftrace, trace-cmd and perf, in files, excerpts and mails."""
