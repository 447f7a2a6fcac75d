# SPDX-License-Identifier: Apache-2.0
"""Recordings of many hosts in a store: a catalogue of them, their replay as tasks for any executor, and the results."""
