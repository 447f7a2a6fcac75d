# SPDX-License-Identifier: Apache-2.0
"""Design questions other than the root policy: how aging walks and range zaps lock, and how tables are accounted.

Each question is a what-if. In a small queueing simulation the faults of the recorded vCPUs, at their own pace, meet
actors that no recording has (agers, range zaps) or a lock that it does not show. `kvmtrace replay` answers them
(--aging, --zap-lock, --apicv, --tdp-pages), and docs/design-questions.md is generated from the answers.
"""
