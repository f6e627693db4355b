"""Counting values into the bins of a `Histogram`; apart from it, so that records are read without numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmq.results.record import Histogram

Values = Sequence[float] | NDArray[np.floating]


def histogram(values: Values, unit: str, *, per_decade: int) -> Histogram:
    """Count values that are not negative in bins of equal width on a logarithmic axis.

    Args:
        values: finite, 0 or more.
        unit: theirs.
        per_decade: bins between 1 and 10; the edges are 10 ** (i / per_decade), the same for all values of a unit, so that
            histograms can be laid over one another.
    """
    array = np.asarray(values, dtype=np.float64)
    positive = array[array > 0]
    if not positive.size:
        return Histogram(unit=unit, edges=[], counts=[], zeros=int(array.size))
    first = int(np.floor(np.log10(positive.min()) * per_decade)) - 1
    last = int(np.ceil(np.log10(positive.max()) * per_decade)) + 2
    edges = np.array([10 ** (index / per_decade) for index in range(first, last)])
    counts, _ = np.histogram(positive, edges)
    used = np.flatnonzero(counts)
    kept = slice(int(used[0]), int(used[-1]) + 1)
    return Histogram(
        unit=unit,
        edges=edges[kept.start : kept.stop + 1].tolist(),
        counts=counts[kept].tolist(),
        zeros=int(array.size - positive.size),
    )
