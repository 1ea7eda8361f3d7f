"""The uncertainty at the landmarks, and its correlation with the error."""

import math
from typing import Any

import numpy as np

from adregnet_jax.data.pair import Pair
from adregnet_jax.evaluation.figures import summary_figures
from adregnet_jax.evaluation.uncertainty import landmark_rows, rank_correlations, sparsify

SHAPE = (16, 14, 12)


def test_the_uncertainty_of_a_landmark_is_that_of_its_voxel():
    points = np.array([[0.0, 0.0, 0.0], [15.4, 3.0, 11.0], [7.6, 13.0, 4.0]])
    volume = np.zeros(SHAPE, np.float32)
    pair = Pair("case", volume, volume, np.ones(3), fixed_landmarks=points, moving_landmarks=points)
    level = np.arange(8 * 8 * 6, dtype=np.float32).reshape(8, 8, 6)  # one axis was padded from 14 to 16
    displacement = np.random.default_rng(0).normal(size=(*SHAPE, 3)).astype(np.float32)
    scatter_mm = np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    rows = landmark_rows(
        pair, displacement, match_entropy=[np.zeros((4, 4, 3)), level], dropout_sd_mm=scatter_mm
    )
    assert [row["match_entropy"] for row in rows] == [level[0, 0, 0], level[7, 1, 5], level[4, 6, 2]]
    voxels = [(0, 0, 0), (15, 3, 11), (8, 13, 4)]
    assert [row["dropout_sd_mm"] for row in rows] == [scatter_mm[voxel] for voxel in voxels]
    figures = summary_figures(rows, {})
    calibrations = ["calibration_of_the_uncertainty", "calibration_of_the_dropout_uncertainty"]
    assert list(figures) == ["landmark_distances", *calibrations]
    axes = [figures[name].axes[0] for name in calibrations]
    assert all("rank correlation" in ax.get_title() for ax in axes)
    assert ["nats" in ax.get_xlabel() for ax in axes] == [True, False]
    assert "SD by dropout, mm" in axes[1].get_xlabel()
    assert all("area between the curves" in figures[name].axes[1].get_title() for name in calibrations)


def test_rank_correlations_of_both_uncertainties():
    rows: list[dict[str, Any]] = [
        {"name": "a", "after_mm": error_mm, "match_entropy": -error_mm, "dropout_sd_mm": error_mm**2}
        for error_mm in (0.5, 3.0, 1.0, 2.0)
    ]
    entropy, dropout = rank_correlations(rows)
    assert (
        "entropy" in entropy and "-1.00 over all landmarks; within a case -1.00 (-1.00 to -1.00)" in entropy
    )
    assert "SD by dropout, mm" in dropout and "+1.00 over all landmarks" in dropout
    assert rank_correlations([row | {"dropout_sd_mm": None} for row in rows]) == [entropy]

    # A case of larger errors and larger entropy: between the cases they go together, within them they don't.
    worse = [
        row | {"name": "b", "after_mm": row["after_mm"] + 9, "match_entropy": 9 + row["match_entropy"]}
        for row in rows
    ]
    (both, _) = rank_correlations([*rows, *worse])
    assert "+0.52 over all landmarks; within a case -1.00 (-1.00 to -1.00)" in both


def test_sparsification_against_a_loop_and_its_bounds():
    random = np.random.default_rng(0)
    error = random.gamma(2.0, size=200)
    estimate = error + random.normal(size=200)
    found = sparsify(estimate, error)
    by_estimate = sorted(range(200), key=lambda n: estimate[n])
    for removed, share in zip(found.removed, found.error, strict=True):
        kept = by_estimate[: round((1 - removed) * 200)]
        np.testing.assert_allclose(share, np.mean([error[n] for n in kept]) / error.mean())
    assert found.error[0] == found.ideal[0] == 1
    assert 0 == sparsify(error, error).area < found.area < sparsify(-error, error).area
    np.testing.assert_allclose(sparsify(np.exp(estimate), error).area, found.area)  # of the ranks alone
