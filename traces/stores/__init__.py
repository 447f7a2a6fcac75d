# SPDX-License-Identifier: Apache-2.0
"""Object stores and local folders behind one interface: they have recordings of many hosts, and take results."""
