# SPDX-License-Identifier: Apache-2.0
"""The span of time that ends with each row: what the vCPU's thread did in it, and for how long."""
