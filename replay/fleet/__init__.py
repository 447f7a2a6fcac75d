# SPDX-License-Identifier: Apache-2.0
"""Many recordings in a store: a catalogue of them, their replay as tasks that any executor runs, and the results."""
