"""Synthetic pairs obey their laws: exact labels, no folds, a true displacement that aligns the images."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage, stats

from adregnet_jax.config import DataConfig, SyntheticConfig
from adregnet_jax.data.datasets.synthetic import (
    EASY_SHARE,
    LEAST_DETERMINANT,
    curriculum_share,
    main,
    synthetic_pair,
)
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError

SMALL = SyntheticConfig(shape=(40, 32, 36), spacing_mm=(3.0, 4.0, 3.5))


@pytest.fixture(scope="module")
def pairs():
    return [synthetic_pair(SMALL, case) for case in range(24)]


def pulled_back(volume, displacement, order):
    positions = np.indices(volume.shape) + np.moveaxis(displacement, -1, 0)
    return ndimage.map_coordinates(volume, positions, order=order, mode="nearest")


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_the_same_case_is_the_same_pair_bit_for_bit():
    first, second = synthetic_pair(SMALL, 3), synthetic_pair(SMALL, 3)
    for name in ("fixed", "moving", "fixed_labels", "moving_labels", "displacement"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    for other in (synthetic_pair(SMALL, 4), synthetic_pair(dataclasses.replace(SMALL, seed=1), 3)):
        assert np.abs(first.fixed - other.fixed).mean() > 0.02


def test_arrays_have_the_format_of_a_pair(pairs):
    for pair in pairs:
        assert pair.fixed.shape == pair.moving.shape == pair.fixed_labels.shape == SMALL.shape
        assert pair.displacement.shape == (*SMALL.shape, 3)
        for image in (pair.fixed, pair.moving):
            assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
        assert pair.displacement.dtype == np.float32
        labels = np.unique(pair.moving_labels)
        assert len(labels) >= 3 and labels.max() < 64


def test_fixed_labels_are_the_moving_ones_pulled_back(pairs):
    for pair in pairs:
        expected = pulled_back(pair.moving_labels, pair.displacement, order=0)
        assert np.mean(pair.fixed_labels == expected) > 0.999  # halves are rounded either way


def test_motion_has_its_size_and_never_folds(pairs):
    lengths = []
    for pair in pairs:
        gradient = [np.stack(np.gradient(pair.displacement[..., n].astype(float)), -1) for n in range(3)]
        assert np.linalg.det(np.eye(3) + np.stack(gradient, -2)).min() > LEAST_DETERMINANT - 1e-3  # float32
        lengths.append(np.linalg.norm(pair.displacement * pair.spacing_mm, axis=-1).max())
    assert max(lengths) <= SMALL.largest_motion_mm * 1.001
    assert max(lengths) > 0.5 * SMALL.largest_motion_mm and min(lengths) > 0.1


def test_the_truth_aligns_images_of_one_contrast(pairs):
    gains = [
        correlation(pair.fixed, pulled_back(pair.moving, pair.displacement, order=1))
        - correlation(pair.fixed, pair.moving)
        for pair in pairs
        if pair.same_contrast
    ]
    # Each image has its own crop and noise, so that a small motion may gain nothing.
    assert len(gains) > 5 and np.mean(gains) > 0.03 and np.median(gains) > 0.02 and min(gains) > -0.05


def test_contrasts_are_independent_where_they_are_not_the_same():
    """The mean intensities of the labels correlate within one contrast, but not between two."""

    def rank_correlation(pair):
        labels = [n for n in np.unique(pair.moving_labels) if n and (pair.fixed_labels == n).sum() > 50]
        means = [
            ndimage.mean(image, of, labels)
            for image, of in ((pair.fixed, pair.fixed_labels), (pair.moving, pair.moving_labels))
        ]
        return stats.spearmanr(*means).statistic

    same, own = (
        [
            rank_correlation(synthetic_pair(dataclasses.replace(SMALL, same_contrast=share), n))
            for n in range(16)
        ]
        for share in (1.0, 0.0)
    )
    assert np.mean(same) > 0.8 and abs(np.mean(own)) < 0.35


def test_motion_grows_with_the_number_of_the_case():
    config = dataclasses.replace(SMALL, curriculum_cases=100)
    assert [curriculum_share(config, n) for n in (0, 50, 100, 10_000)] == pytest.approx([0.3, 0.65, 1, 1])
    assert curriculum_share(dataclasses.replace(SMALL, curriculum_cases=0), 0) == 1
    easy, hard = (synthetic_pair(SMALL, 5, share=share).displacement for share in (0.3, 1.0))
    np.testing.assert_allclose(easy, 0.3 * hard, atol=1e-4)  # this one is short enough not to fold


def test_contrasts_are_matched_where_they_differ():
    own = dataclasses.replace(SMALL, same_contrast=0.0)
    gains = []
    for n in range(12):
        raw, matched = (
            synthetic_pair(dataclasses.replace(own, match_contrast=on), n) for on in (False, True)
        )
        np.testing.assert_array_equal(matched.fixed, raw.fixed)
        np.testing.assert_array_equal(matched.displacement, raw.displacement)
        gains.append(correlation(raw.fixed, matched.moving) - correlation(raw.fixed, raw.moving))
    assert min(gains) >= 0 and np.mean(gains) > 0.05


def test_contrasts_come_with_the_curriculum():
    config = dataclasses.replace(SMALL, same_contrast=0.0)
    for share, expected in ((EASY_SHARE, 1.0), (1.0, 0.0)):
        assert {synthetic_pair(config, n, share=share).same_contrast for n in range(4)} == {expected}


def test_splits_have_disjoint_cases_and_only_training_grows():
    data = DataConfig(kind="synthetic", synthetic=dataclasses.replace(SMALL, train_cases=3, test_cases=2))
    splits = load_splits(data)
    assert [len(split) for split in splits] == [3, 20, 2]
    assert not splits.train.subjects & (splits.validation.subjects | splits.test.subjects)
    easy = synthetic_pair(SMALL, 0, share=EASY_SHARE)
    np.testing.assert_array_equal(splits.train[0].displacement, easy.displacement)
    assert splits.train[0] is not splits.train[0]  # not needed again, so not kept
    whole = synthetic_pair(SMALL, 1_000_000)
    np.testing.assert_array_equal(splits.validation[0].displacement, whole.displacement)


def test_breaths_go_in_both_directions(pairs):
    """A breath moves everything in one direction along its main axis; the direction is random."""
    means = np.array([pair.displacement.mean(axis=(0, 1, 2)) for pair in pairs])
    main_axis = np.abs(means).argmax(axis=1)
    signs = np.sign(means[np.arange(len(means)), main_axis])
    assert 4 < (signs > 0).sum() < len(signs) - 4


def test_cases_are_printed_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["synthetic", "--cases", "2", "--picture", str(tmp_path / "cases.png")])
    main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert (tmp_path / "cases.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("config", "case", "message"),
    [
        (SMALL, -1, "numbered from 0"),
        (dataclasses.replace(SMALL, shape=(8, 40, 40)), 0, "at least 16 voxels"),
    ],
)
def test_bad_settings_are_refused(config, case, message):
    with pytest.raises(UserError, match=message):
        synthetic_pair(config, case)
