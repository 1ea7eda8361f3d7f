"""Pairs drawn by JAX obey the laws of synthetic pairs, and have the distribution of those made by NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from adregnet_jax import SyntheticConfig, jacobian_determinant, synthesise, warp
from adregnet_jax.data import preprocessing
from adregnet_jax.data.datasets.synthetic import EASY_SHARE, LEAST_DETERMINANT, synthetic_pair
from adregnet_jax.errors import UserError
from adregnet_jax.synthesis import contrast
from adregnet_jax.synthesis.anatomy import MOST_LABELS
from adregnet_jax.synthesis.appearance import blur, rescale_percentiles
from adregnet_jax.synthesis.draw import smooth_noise

match_contrast = jax.jit(contrast.match_contrast)
SMALL = SyntheticConfig(shape=(28, 24, 26), spacing_mm=(3.0, 4.0, 3.5))
COUNT = 40


MATCHED = dataclasses.replace(SMALL, match_contrast=True)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), COUNT)


@pytest.fixture(scope="module")
def draw_many():
    return jax.jit(jax.vmap(functools.partial(synthesise, config=MATCHED)))


@pytest.fixture(scope="module")
def draw_one():
    """The only other program, without matched contrasts; compiling one takes seconds."""
    return jax.jit(lambda key, share: synthesise(key, SMALL, share=share))


@pytest.fixture(scope="module")
def pairs(draw_many):
    return draw_many(keys())


def test_arrays_have_the_format_of_a_pair(pairs):
    shape = (COUNT, *SMALL.shape)
    assert pairs.fixed.shape == pairs.moving.shape == shape
    assert pairs.fixed_labels.shape == pairs.moving_labels.shape == shape
    assert pairs.displacement.shape == (*shape, 3) and pairs.same_contrast.shape == (COUNT,)
    for array, dtype in zip(pairs, (*["float32"] * 2, *["int32"] * 2, "float32", "bool"), strict=True):
        assert array.dtype == dtype
    for images in (pairs.fixed, pairs.moving):
        assert images.min() >= 0 and images.max() <= 1
        assert jnp.std(images, axis=(1, 2, 3)).min() > 0.01
    assert pairs.moving_labels.min() == 0 and pairs.moving_labels.max() <= MOST_LABELS


def test_the_same_key_gives_the_same_pair_bit_for_bit(draw_one):
    pair, again, other = (draw_one(key, 1.0) for key in (keys()[0], keys()[0], keys(seed=1)[0]))
    jax.tree.map(np.testing.assert_array_equal, pair, again)
    assert jnp.abs(pair.fixed - other.fixed).mean() > 0.02


def test_vmap_draws_the_pairs_of_a_loop(draw_one, pairs):
    for n, key in enumerate(keys()[:12]):
        alone = draw_one(key, 1.0)
        alone = alone._replace(moving=match_contrast(alone.moving, alone.fixed))
        for name, array in alone._asdict().items():
            # Rounding may move a voxel from one label to another, and so give it another value.
            different = jnp.abs(1.0 * array - getattr(pairs, name)[n]) > 1e-3
            assert jnp.mean(different) < 1e-3, name


def test_the_displacement_is_the_truth(pairs):
    pulled_back = warp(pairs.moving_labels[..., None], pairs.displacement, mode="nearest")[..., 0]
    np.testing.assert_array_equal(pulled_back, pairs.fixed_labels)
    warped = warp(pairs.moving[..., None], pairs.displacement)[..., 0]
    gains = [
        np.corrcoef(f.ravel(), w.ravel())[0, 1] - np.corrcoef(f.ravel(), m.ravel())[0, 1]
        for f, w, m, same in zip(pairs.fixed, warped, pairs.moving, pairs.same_contrast, strict=True)
        if same
    ]
    # Each image has its own crop and noise, so that a small motion may gain nothing.
    assert len(gains) > 10 and np.mean(gains) > 0.03 and np.median(gains) > 0.02 and min(gains) > -0.05


def test_motion_has_its_size_and_never_folds(pairs):
    assert jacobian_determinant(pairs.displacement).min() > LEAST_DETERMINANT - 1e-3  # float32
    lengths = jnp.linalg.norm(pairs.displacement * jnp.array(SMALL.spacing_mm), axis=-1).max(axis=(1, 2, 3))
    assert lengths.max() <= SMALL.largest_motion_mm * 1.001
    assert lengths.max() > 0.5 * SMALL.largest_motion_mm and lengths.min() > 0.1


def statistics(pairs):
    """A row of numbers for each of some pairs."""
    rows = []
    for pair in pairs:
        length = np.linalg.norm(pair.displacement * np.array(SMALL.spacing_mm), axis=-1)
        rows.append(
            {
                "foreground": np.mean(pair.moving_labels > 0),
                "labels": len(np.unique(pair.moving_labels)),
                "largest label": np.bincount(pair.moving_labels.ravel()).max() / pair.moving_labels.size,
                "mean motion": length.mean(),
                "largest motion": length.max(),
                "mean intensity": pair.fixed.mean(),
                "SD of intensity": pair.fixed.std(),
                "empty voxels": np.mean(pair.moving == 0),
                "step to the next voxel": np.abs(np.diff(pair.moving, axis=0)).mean(),
                "correlation": np.corrcoef(pair.fixed.ravel(), pair.moving.ravel())[0, 1],
                "same contrast": float(pair.same_contrast),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_pairs_have_the_distribution_of_those_made_by_numpy(pairs):
    """Means differ by less than three standard errors of their difference, and no rank test objects."""
    drawn = [jax.tree.map(lambda array, n=n: np.asarray(array[n]), pairs) for n in range(COUNT)]
    made = [synthetic_pair(MATCHED, case) for case in range(COUNT)]
    for (name, ours), theirs in zip(statistics(drawn).items(), statistics(made).values(), strict=True):
        error = np.sqrt((ours.var() + theirs.var()) / COUNT)
        assert abs(ours.mean() - theirs.mean()) < 3 * error, name
        assert stats.ks_2samp(ours, theirs).pvalue > 0.003, name


def test_difficulty_grows_with_the_share(draw_one, pairs):
    own_contrast = np.flatnonzero(~pairs.same_contrast)[:4]
    for n in own_contrast:
        easy, hard = draw_one(keys()[n], EASY_SHARE), draw_one(keys()[n], 1.0)
        assert easy.same_contrast and not hard.same_contrast
        np.testing.assert_array_equal(easy.moving_labels, hard.moving_labels)
        lengths = [jnp.linalg.norm(pair.displacement, axis=-1).max() for pair in (easy, hard)]
        assert lengths[0] < lengths[1]


def test_noise_has_mean_0_and_sd_1():
    draw = jax.jit(lambda cells: smooth_noise(jax.random.key(0), (20, 18, 16), cells, most_cells=4, count=5))
    for cells in (1, 4):
        noise = draw(cells)
        np.testing.assert_allclose(noise.mean(axis=(1, 2, 3)), 0, atol=1e-5)
        np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_blur_is_that_of_scipy():
    image = np.random.default_rng(0).random((20, 18, 16), np.float32)
    for sigma in ([0.3, 0.9, 2.4], [0.5, 0.5, 0.5]):
        expected = ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=2.5)
        np.testing.assert_allclose(jax.jit(blur)(image, jnp.array(sigma)), expected, atol=1e-6)


def test_percentiles_are_those_of_numpy():
    image = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)
    for values in (image, np.maximum(image, 0), np.where(np.arange(16) == 5, image, 0), 2 + 0 * image):
        ours = jax.jit(rescale_percentiles)(values)
        if values.std() == 0:
            assert ours.max() == 0  # NumPy's raises an error
            continue
        # NumPy interpolates between neighbouring voxels.
        np.testing.assert_allclose(ours, preprocessing.rescale_percentiles(values, "an image"), atol=0.02)


def test_contrast_is_matched_as_by_numpy(draw_one):
    changed = 0
    for key in keys()[:12]:
        pair = draw_one(key, 1.0)
        ours = np.asarray(match_contrast(pair.moving, pair.fixed))
        expected = preprocessing.match_contrast(np.asarray(pair.moving), np.asarray(pair.fixed))
        np.testing.assert_allclose(ours, expected, atol=2e-3)
        changed += not np.array_equal(expected, pair.moving)
    assert 0 < changed < 12


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="at least 16 voxels"):
        synthesise(jax.random.key(0), dataclasses.replace(SMALL, shape=(8, 40, 40)))
