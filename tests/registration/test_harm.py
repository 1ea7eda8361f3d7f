"""Stages that do harm are taken back: laws of the likeness, and of a registration with a bad stage."""

import numpy as np
import pytest
from scipy import ndimage

from adregnet_jax.config import AffineConfig, InstanceConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.errors import UserError
from adregnet_jax.registration import scans as registration
from adregnet_jax.registration.harm import coarse_scans, likeness, weigh_stage
from adregnet_jax.registration.options import RegistrationOptions
from adregnet_jax.registration.result_files import as_text
from adregnet_jax.registration.scans import register_scans

SHAPE = (44, 40, 36)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
INSTANCE = InstanceConfig(factors=(2,), steps=(2,), strides=(2,), search_range_mm=0.0)


def body(shape=SHAPE, seed=0):
    """A bright textured ellipsoid on black."""
    grid = np.moveaxis(np.indices(shape), 0, -1)
    inside = np.linalg.norm((grid - np.divide(shape, 2)) / np.divide(shape, 2.6), axis=-1) < 1
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return (ndimage.gaussian_filter(inside * 1.0, 0.7) * (4 + noise / noise.std()) / 8).astype(np.float32)


SCAN = Image(body(), AFFINE, "scan")


def linear(scale=1.0, shift_mm=0.0):
    """[4, 4], around the middle of the scan."""
    matrix = np.diag([scale, scale, scale, 1.0])
    matrix[:3, 3] = (1 - scale) * np.array(SHAPE) + [shift_mm, 0, 0]
    return matrix


def folds():
    noise = np.random.default_rng(1).normal(size=(*SHAPE, 3))
    smooth = ndimage.gaussian_filter(noise, (1.5, 1.5, 1.5, 0))
    return (6 * smooth / smooth.std()).astype(np.float32)


def looked_at(displacement=None, matrix=None, *, moving=SCAN):
    scans = coarse_scans((SCAN, moving), (SCAN.values, moving.values), (None, None))
    return likeness(scans, displacement, np.eye(4) if matrix is None else matrix)


def test_equal_scans_are_fully_alike():
    found = looked_at()
    assert found.mean > 0.95
    assert found.implausible == 0


@pytest.mark.parametrize(
    ("displacement", "matrix", "words"),
    [
        (None, linear(scale=0.6), "more alike before"),
        (None, linear(scale=2.0), "more alike before"),
        (None, linear(shift_mm=12), "more alike before"),
        (None, linear(scale=0.05), "shrinks or grows 20-fold"),
        (folds(), np.eye(4), "folded"),
    ],
    ids=["shrunk", "blown up", "shifted", "collapsed", "folded"],
)
def test_harm_is_taken_back_and_said(displacement, matrix, words):
    before, after = looked_at(), looked_at(displacement, matrix)
    outcome = weigh_stage("affine", before, after)
    assert words in outcome.taken_back
    assert outcome.similarity_before > outcome.similarity
    assert weigh_stage("affine", after, before).taken_back is None


def test_what_one_scan_alone_shows_counts_as_unlike():
    half = Image(SCAN.values[:22], AFFINE, "half")
    seen = looked_at(moving=half)
    assert 0.4 < seen.mean < 0.75 * looked_at().mean


def test_chance_takes_nothing_back():
    noisy = Image(SCAN.values + np.random.default_rng(2).normal(0, 0.05, SHAPE), AFFINE, "noisy")
    before, after = looked_at(moving=noisy), looked_at(matrix=linear(shift_mm=0.05), moving=noisy)
    assert weigh_stage("affine", before, after).taken_back is None


def test_a_bad_affine_map_gives_way_to_the_headers(monkeypatch):
    monkeypatch.setattr(registration, "align_affine_on_rungs", lambda *_, **__: linear(shift_mm=12))
    found = register_scans(SCAN, SCAN, affine=AffineConfig(), instance=None, modality="mono")
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    np.testing.assert_allclose(found.field.displacement, 0, atol=1e-6)
    summary = found.summary()
    assert [stage["stage"] for stage in summary["stages"]] == ["affine"]
    assert "taken back" in as_text(summary["results"])
    assert "affine: the scans were more alike before" in as_text(summary["results"])


def test_an_implausible_affine_map_gives_way_to_a_rigid_one(monkeypatch):
    far = Image(SCAN.values, linear(shift_mm=12) @ AFFINE, "far")

    def aligned(*_, config, **__):
        return linear(shift_mm=12) if config.kind == "rigid" else linear(scale=0.7)

    monkeypatch.setattr(registration, "align_affine_on_rungs", aligned)
    found = register_scans(SCAN, far, affine=AffineConfig(), instance=None, modality="mono")
    np.testing.assert_array_equal(found.matrix, linear(shift_mm=12))
    assert "0.34-fold, beyond 0.5 to 2" in found.summary()["results"]["taken_back"]
    wider = AffineConfig(determinants=(0.1, 10.0))
    again = register_scans(SCAN, far, affine=wider, instance=None, modality="mono")
    np.testing.assert_array_equal(again.matrix, linear(scale=0.7))


def test_a_bad_deformation_gives_way_to_its_start(monkeypatch):
    monkeypatch.setattr(registration, "align_on_rungs", lambda *_, **__: (folds(), None))
    found = register_scans(SCAN, SCAN, affine=None, instance=INSTANCE, modality="mono", adaptive=False)
    np.testing.assert_allclose(found.field.displacement, 0, atol=1e-6)
    np.testing.assert_allclose(found.inverse.displacement, 0, atol=1e-4)
    assert found.outcomes[-1].stage == "instance"
    assert "folded" in found.outcomes[-1].taken_back
    kept = register_scans(SCAN, SCAN, affine=None, instance=INSTANCE, adaptive=False, keep=True)
    np.testing.assert_allclose(kept.field.displacement, folds(), atol=1e-4)
    assert kept.outcomes[-1].taken_back is None


def test_good_stages_are_kept():
    moved = Image(ndimage.shift(SCAN.values, (1, 0, 0), order=1), AFFINE, "moved")
    found = register_scans(SCAN, moved, affine=None, instance=INSTANCE, modality="mono", adaptive=False)
    (outcome,) = found.outcomes
    assert outcome.taken_back is None
    assert outcome.similarity > outcome.similarity_before
    assert found.summary()["results"]["taken_back"] is None
    assert "taken back" not in as_text(found.summary()["results"])


def test_determinants_are_checked():
    with pytest.raises(UserError, match="two factors, above 0 to 1 and from 1"):
        RegistrationOptions(settings={"affine.determinants": (2.0, 3.0)})
