# SPDX-License-Identifier: Apache-2.0
"""What a recording could not see, of which a report must never say 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.reading.sources import Recording


def lost_windows(recording: Recording, kind: str, window_ns: int) -> NDArray[np.int64]:
    """Return the windows in which events of this kind were lost or left out, numbered from the first row on.

    If there were more gaps than the metadata lists (16,384), it is not known where they were: then all windows are
    returned.
    """
    meta = recording.metadata
    first, last = recording.span
    found = [_windows(since, until, first, last, window_ns) for since, until in meta.left_out_of(kind)]
    if kind not in meta.loss or not meta.lost_of(kind):
        return np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    if meta.gap_count > len(meta.gaps) or not meta.gaps:
        return np.arange((last - first) // window_ns + 1)
    for gap in meta.gaps:
        since, until, kinds = (gap.get(key) for key in ("since", "until", "kinds"))
        if isinstance(since, int) and isinstance(until, int) and isinstance(kinds, list) and kind in kinds:
            found.append(_windows(since, until, first, last, window_ns))
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


def _windows(since: int, until: int, first: int, last: int, window_ns: int) -> NDArray[np.int64]:
    begin, end = max(since, first), min(until, last)
    return np.arange((begin - first) // window_ns, (end - first) // window_ns + 1)
