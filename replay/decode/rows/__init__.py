# SPDX-License-Identifier: Apache-2.0
"""A VM's rows in, its inputs out: a compiled state machine of the VM and its vCPUs that takes one row at a time."""
