"""Is one method better than another on the same cases? Paired signed-rank tests, effect sizes, intervals.

Pure functions around `scipy.stats`. A case is one observation: landmarks of one scan are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_PAIRS = 6  # below, no result of a two-sided test can reach p = 0.05


class Comparison(NamedTuple):
    """Ours against another method, case by case; differences are ours minus theirs."""

    pairs: int
    mean_difference: float
    interval: tuple[float, float] | None  # 95 % of the mean difference, None for fewer than 2 cases
    effect: float | None  # matched-pairs rank-biserial correlation, -1 (ours always lower) to 1
    p: float | None  # two-sided Wilcoxon signed-rank test; None with a note
    note: str  # why there is no p


def compare(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Comparison:
    """Compares two methods on the same cases.

    The test is exact where no two differences tie, and leaves out differences of zero (Wilcoxon's own way).
    The interval is a bias-corrected bootstrap over the cases (BCa, 10,000 samples).

    Args:
        ours: one value a case.
        theirs: of the same cases, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths that differ, or no cases.
    """
    ours_, theirs_ = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours_.shape != theirs_.shape or ours_.ndim != 1 or not ours_.size:
        raise ValueError(f"expected one value a case from both, got {ours_.shape} and {theirs_.shape}")
    # Published figures have two digits: without rounding, equal differences would not tie.
    difference = np.round(ours_ - theirs_, 9)
    moved = difference[difference != 0]
    ranks = stats.rankdata(np.abs(moved))
    effect = float(np.sum(np.sign(moved) * ranks) / np.sum(ranks)) if moved.size else None
    p, note = None, ""
    if len(moved) < FEWEST_PAIRS:
        note = f"n/a: {len(moved)} pairs differ, a signed-rank test takes {FEWEST_PAIRS}"
    else:
        p = float(stats.wilcoxon(moved).pvalue)
    return Comparison(len(difference), float(difference.mean()), _interval(difference, seed), effect, p, note)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by Holm's step-down method; None stays None and doesn't count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[index] = highest
    return corrected


def _interval(values: np.ndarray, seed: int) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)
