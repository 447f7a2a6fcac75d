# SPDX-License-Identifier: Apache-2.0
"""A software model of KVM's TDP MMU: it replays a recording and says what
the VMs would have done under another root policy.
"""
