# SPDX-License-Identifier: Apache-2.0
"""The design questions other than the root policy: how aging walks lock, how range zaps do, and how tables are counted.

Each is a what-if: the recorded vCPUs' faults, at their own pace, meet actors that no recording has (agers, range
zaps) or a lock that it does not show, in a small queueing simulation. `kvmtrace replay --aging` and its kin; the
document made of it is docs/design-questions.md (`document`).
"""
