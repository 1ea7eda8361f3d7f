import itertools

import numpy as np
import pytest

from adregnet_jax.evaluation.published import DIRLAB_TRE_MM
from adregnet_jax.evaluation.statistics import compare, holm, subject_interval


def slow_signed_rank_p(differences):
    """Two-sided and exact: every assignment of signs to the ranks is as likely. No ties, no zeros."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    observed = np.sum(ranks[np.asarray(differences) > 0])
    sums = [sum(r for r, up in zip(ranks, signs, strict=True) if up)
            for signs in itertools.product((0, 1), repeat=len(ranks))]  # fmt: skip
    centre = np.sum(ranks) / 2
    return np.mean(np.abs(np.array(sums) - centre) >= abs(observed - centre))


@pytest.mark.parametrize("seed", range(3))
def test_p_is_that_of_all_assignments_of_signs(seed):
    ours, theirs = np.random.default_rng(seed).normal(size=(2, 8))
    assert compare(ours, theirs).p == pytest.approx(slow_signed_rank_p(ours - theirs))


@pytest.mark.parametrize(
    ("method", "p"),
    [("De Vos", 0.002), ("Eppenhof", 0.002), ("Hering", 0.002), ("Fang", 0.008), ("Zhang", 0.010),
     ("Jiang", 0.010)],
)  # fmt: skip
def test_p_values_of_the_paper_follow_from_its_table(method, p):
    """p values of the signed-rank test on the published columns, which differ from those in the paper."""
    comparison = compare(DIRLAB_TRE_MM["AD-RegNet (paper)"], DIRLAB_TRE_MM[method])
    assert comparison.p == pytest.approx(p, abs=5e-4)


@pytest.mark.parametrize(
    ("method", "mean"),
    [("De Vos", 2.69), ("Fang", 1.89), ("Jiang", 1.66), ("AD-RegNet (paper)", 1.51), ("pTVreg", 0.92)],
)
def test_published_columns_have_their_means(method, mean):
    # Table I prints 2.64 for De Vos, and 1.84 where Zhang's column gives it.
    assert np.mean(DIRLAB_TRE_MM[method]) == pytest.approx(mean, abs=6e-3)


def test_the_effect_size_says_which_way_and_how_consistently():
    values = np.arange(10.0)
    assert compare(values, values + 1 + values).effect == -1
    assert compare(values + 1 + values, values).effect == 1
    assert compare(values, values + (-1) ** values * (1 + values // 2)).effect == pytest.approx(0)


def test_the_interval_holds_the_mean_and_narrows_with_the_spread():
    rng = np.random.default_rng(0)
    wide, narrow = (compare(rng.normal(1, sd, 30), np.zeros(30)) for sd in (1.0, 0.1))
    for comparison in (wide, narrow):
        low, high = comparison.interval
        assert low < comparison.mean_difference < high
    assert np.ptp(narrow.interval) < np.ptp(wide.interval) / 5
    assert compare([1.0] * 6, [0.5] * 6).interval == (0.5, 0.5)


def test_too_few_pairs_have_no_p_and_a_reason():
    comparison = compare([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 6])
    assert comparison.p is None
    assert "5 pairs differ" in comparison.note
    assert compare([1.0], [2.0]).interval is None
    assert compare([1.0, 2, 3, 4, 5], [2.0, 2, 2, 2, 2]).interval is None
    with pytest.raises(ValueError, match="finite"):
        compare([1.0, float("nan")], [1.0, 2.0])
    assert compare([1.0, 2.0], [1.0, 2.0]).effect is None
    with pytest.raises(ValueError, match="one value per case"):
        compare([1.0], [1.0, 2.0])


def shared_pairs(subjects, rng, effect_sd):
    """Each subject with the next five: a difference that is a sum of both subjects' own, and noise."""
    own = rng.normal(0, effect_sd, subjects)
    pairs = [(i, (i + k) % subjects) for i in range(subjects) for k in range(1, 6)]
    values = np.array([own[i] + own[j] for i, j in pairs]) + rng.normal(0, 1, len(pairs))
    return values, [(f"s{i}", f"s{j}") for i, j in pairs]


def test_pairs_that_share_subjects_have_an_interval_over_subjects_and_no_p():
    """The interval holds the true mean, 0, as often as it says; one over the pairs would not."""
    rng = np.random.default_rng(0)
    over_subjects = over_pairs = 0
    for _ in range(60):
        values, subjects = shared_pairs(20, rng, effect_sd=1.0)
        low, high = subject_interval(values, subjects, samples=1000)
        over_subjects += low < 0 < high
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        over_pairs += abs(values.mean()) < half
    assert over_subjects >= 54 and over_pairs < 48  # of 60, 57 are expected

    comparison = compare(values, np.zeros(len(values)), subjects=subjects)
    assert comparison.p is None and comparison.interval is not None
    assert "20 subjects are in several pairs" in comparison.note


def test_an_atlas_that_is_in_all_pairs_makes_none_of_them_depend_on_another():
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    atlas = [(f"s{n}", "atlas") for n in range(30)]
    assert compare(values, np.zeros(30), subjects=atlas) == compare(values, np.zeros(30))
    low, high = subject_interval(values, atlas)
    standard_error = values.std() / 30**0.5
    assert (high - low) / 2 / 1.96 == pytest.approx(standard_error, rel=0.05)


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
