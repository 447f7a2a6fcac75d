# SPDX-License-Identifier: Apache-2.0
"""Virtual time: how long each vCPU would have stood still, when and why."""
