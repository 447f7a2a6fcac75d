# SPDX-License-Identifier: Apache-2.0
"""Virtual time: how long each vCPU would have taken, and when, why and
for how long it would have been in a soft-hang.
"""
