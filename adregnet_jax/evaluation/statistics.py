"""Compares two methods on the same cases: paired signed-rank tests, effect sizes, confidence intervals.

A case is one observation, since landmarks of one scan are not independent. Neither are pairs that share a
subject: the signed-rank test does not apply to them, so there is no p, and the interval is a bootstrap over
the subjects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_PAIRS = 6  # below, no result of a two-sided test can reach p = 0.05


class Comparison(NamedTuple):
    """Our method compared with another, case by case; differences are ours minus theirs."""

    pairs: int
    mean_difference: float
    interval: tuple[float, float] | None  # 95 % of the mean difference, None for fewer than `FEWEST_PAIRS`
    effect: float | None  # matched-pairs rank-biserial correlation, -1 (ours always lower) to 1
    p: float | None  # two-sided Wilcoxon signed-rank test; None with a note
    note: str  # why there is no p


def compare(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    *,
    subjects: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares two methods on the same cases.

    The test is exact if no two differences tie, and leaves out differences of zero, as Wilcoxon did. The
    interval is a bias-corrected bootstrap over the cases (BCa, 10,000 samples). If cases share subjects (not
    counting one in all of them, such as an atlas), there is no test, and `subject_interval` gives the
    interval.

    Args:
        ours: one value per case.
        theirs: one value per case, in the same order.
        subjects: the subjects of each case; None if no subject is in two cases.
        seed: seed of the bootstrap.

    Raises:
        ValueError: lengths differ, there are no cases, or a value is not finite.
    """
    ours_, theirs_ = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours_.shape != theirs_.shape or ours_.ndim != 1 or not ours_.size:
        raise ValueError(f"expected one value per case from both, got {ours_.shape} and {theirs_.shape}")
    if not np.isfinite([ours_, theirs_]).all():
        raise ValueError("expected finite values of both")
    # Published figures have two digits: without rounding, equal differences would not tie.
    difference = np.round(ours_ - theirs_, 9)
    moved = difference[difference != 0]
    ranks = stats.rankdata(np.abs(moved))
    effect = float(np.sum(np.sign(moved) * ranks) / np.sum(ranks)) if moved.size else None
    p, note = None, ""
    shared = shared_subjects(subjects or [])
    if shared:
        note = f"n/a: {shared} subjects are in several pairs, the interval is over subjects"
    elif len(moved) < FEWEST_PAIRS:
        note = f"n/a: {len(moved)} pairs differ, a signed-rank test needs {FEWEST_PAIRS}"
    else:
        p = float(stats.wilcoxon(moved).pvalue)
    if len(difference) < FEWEST_PAIRS:
        interval = None  # a bootstrap of this few values never leaves their range
    elif shared:
        interval = subject_interval(difference, subjects or [], seed=seed)
    else:
        interval = _interval(difference, seed)
    return Comparison(len(difference), float(difference.mean()), interval, effect, p, note)


def shared_subjects(subjects: Sequence[Sequence[str]]) -> int:
    """Number of subjects in more than one case, but not in all of them."""
    counts = Counter(name for case in subjects for name in set(case))
    return sum(1 < count < len(subjects) for count in counts.values())


def subject_interval(
    values: np.ndarray, subjects: Sequence[Sequence[str]], *, seed: int = 0, samples: int = 10_000
) -> tuple[float, float]:
    """95 % interval of a mean over cases that share subjects, by a bootstrap over the subjects (percentiles).

    Subjects are drawn with replacement; a case counts as often as all of its subjects were drawn together,
    the product of their numbers. A subject that is in all cases is not drawn.

    Args:
        values: [n], one per case.
        subjects: the subjects of each case.
        seed: seed of the draws.
        samples: number of draws.

    Reference:
        The pigeonhole bootstrap: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).
    """
    everywhere = set.intersection(*(set(case) for case in subjects))
    names = sorted({name for case in subjects for name in case} - everywhere)
    place = {name: index for index, name in enumerate(names)}
    counts = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), samples)
    weights = np.stack(
        [counts[:, [place[name] for name in set(case) - everywhere]].prod(axis=1) for case in subjects],
        axis=1,
    )
    weights = weights[weights.sum(axis=1) > 0]  # a draw may leave no case
    low, high = np.percentile(weights @ values / weights.sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected by Holm's step-down method; None stays None and isn't counted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[index] = highest
    return corrected


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)
