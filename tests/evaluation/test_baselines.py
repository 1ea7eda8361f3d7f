"""The affine row: measurements with a known map, and the recovery of such a map."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from adregnet_jax.config import AffineConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.evaluation import baselines
from adregnet_jax.evaluation.baselines import affine_displacement, affine_scores

SHAPE = (24, 20, 22)
MIDDLE = (np.array(SHAPE) - 1) / 2
SPACING_MM = np.array([2.0, 2.5, 2.0])
# Exchanged and mirrored axes, far from the origin: the map is found in the world.
AFFINE = np.array([[0, -2.5, 0, 300], [-2.0, 0, 0, 100], [0, 0, 2.0, -900], [0, 0, 0, 1]])
MATRIX = np.array([[1.06, 0.05, 0.0], [-0.04, 0.97, 0.03], [0.0, -0.02, 1.03]])  # fixed to moving, in voxels
SHIFT = np.array([-1.5, 1.0, -0.5])
GRID = np.moveaxis(np.indices(SHAPE), 0, -1).astype(float)
TRUTH = ((GRID - MIDDLE) @ MATRIX.T + MIDDLE + SHIFT - GRID).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    """Blobs in the middle of the scan, and the same ones where the map takes them."""
    rng = np.random.default_rng(0)
    centres, heights = rng.uniform(6, 15, (12, 3)), rng.uniform(0.3, 1, 12)

    def scan(points):
        return sum(
            h * np.exp(-((points - c) ** 2).sum(axis=-1) / 12) for h, c in zip(heights, centres, strict=True)
        ).astype(np.float32)

    back = (GRID - MIDDLE - SHIFT) @ np.linalg.inv(MATRIX).T + MIDDLE
    fixed, moving = scan(GRID), scan(back)
    top = max(fixed.max(), moving.max())
    landmarks = rng.uniform(6, 15, (30, 3))
    return Pair(
        "known",
        fixed / top,
        moving / top,
        SPACING_MM,
        AFFINE,
        fixed_landmarks=landmarks,
        moving_landmarks=(landmarks - MIDDLE) @ MATRIX.T + MIDDLE + SHIFT,
        fixed_labels=np.digitize(fixed / top, [0.4, 0.7]),
        moving_labels=np.digitize(moving / top, [0.4, 0.7]),
    )


@pytest.fixture
def scores_of(monkeypatch):
    """The scores of a pair with a given displacement."""

    def scores_of(pair, displacement):
        monkeypatch.setattr(baselines, "affine_displacement", lambda *_, **__: displacement)
        return affine_scores(pair, config=AffineConfig())

    return scores_of


def test_the_true_map_leaves_no_error(pair, scores_of):
    scores = scores_of(pair, TRUTH)
    assert scores.row["tre_affine_mm"] == pytest.approx(0, abs=1e-4)
    assert scores.row["ncc_affine"] > 0.995  # linear interpolation of blobs of 2.4 voxels
    moved = ndimage.map_coordinates(
        pair.moving_labels, np.moveaxis(GRID + TRUTH, -1, 0), order=0, mode="nearest"
    )
    for label in (1, 2):
        a, b = pair.fixed_labels == label, moved == label
        assert scores.dice[label] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert scores.dice[label] > 0.8


def test_at_rest_it_is_before(pair, scores_of):
    scores = scores_of(pair, np.zeros_like(TRUTH))
    before_mm = np.linalg.norm((pair.fixed_landmarks - pair.moving_landmarks) * SPACING_MM, axis=1)
    assert scores.row["tre_affine_mm"] == pytest.approx(before_mm.mean())
    assert scores.row["tre_affine_sd_mm"] == pytest.approx(before_mm.std(ddof=1))
    assert scores.row["ncc_affine"] == pytest.approx(
        np.corrcoef(pair.fixed.ravel(), pair.moving.ravel())[0, 1]
    )
    for label, dice in scores.dice.items():
        a, b = pair.fixed_labels == label, pair.moving_labels == label
        assert dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_what_a_pair_lacks_is_none(pair, scores_of):
    none = dict.fromkeys(("fixed_landmarks", "moving_landmarks", "fixed_labels", "moving_labels"))
    scores = scores_of(dataclasses.replace(pair, **none), TRUTH)
    assert scores.dice == {}
    assert {name for name, value in scores.row.items() if value is None} == {
        "tre_affine_mm", "tre_affine_sd_mm"
    }  # fmt: skip


def test_the_map_is_found_in_the_images(pair):
    config = AffineConfig(voxels=(16,), steps=(80,), rotation_starts_deg=0.0)
    found = affine_displacement(dataclasses.replace(pair, mask=np.ones(SHAPE, bool)), config=config)
    body = pair.fixed > 0.3
    error_mm = np.linalg.norm((found - TRUTH) * SPACING_MM, axis=-1)[body]
    before_mm = np.linalg.norm(TRUTH * SPACING_MM, axis=-1)[body]
    assert before_mm.mean() > 3.5
    assert error_mm.mean() < 0.5  # an eighth of the voxels that are compared
