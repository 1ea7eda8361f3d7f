"""Splits, augmentation and batches: training data don't depend on the step at which a run starts."""

import dataclasses
import itertools

import numpy as np
import pytest

from adregnet_jax.config import DataConfig, PhantomConfig
from adregnet_jax.data.pair import Pair, PairMaker
from adregnet_jax.data.pipeline import augment, collate, iterate_from, training_batches
from adregnet_jax.data.splits import LazyPairs, load_splits
from adregnet_jax.errors import UserError

LABELS = np.random.default_rng(1).integers(0, 3, (2, 5, 6, 7))
AUGMENTED = DataConfig(flip_axes=(0, 2), exchange=True, intensity_jitter=0.1)


def make_pair(name="a", shape=(5, 6, 7), landmarks=3, seed=0) -> Pair:
    rng = np.random.default_rng(seed)
    points = [rng.integers(0, shape, (landmarks, 3)).astype(float) for _ in range(2)]
    return Pair(
        name=name,
        fixed=rng.random(shape, np.float32),
        moving=rng.random(shape, np.float32),
        spacing_mm=np.array([1.0, 2.0, 3.0]),
        mask=rng.random(shape) < 0.8,
        fixed_landmarks=points[0],
        moving_landmarks=points[1],
        displacement=np.zeros((*shape, 3), np.float32),
    )


def at(volume, points):
    return volume[tuple(points.astype(int).T)]


def test_no_case_is_in_two_splits():
    config = DataConfig(
        phantom=PhantomConfig(shape=(16, 16, 16), spacing_mm=(20.0, 20.0, 20.0), landmarks=4, test_cases=1)
    )
    config.phantom.train_cases, config.phantom.validation_cases = 2, 1
    splits = load_splits(config)
    assert [len(split) for split in splits] == [2, 1, 1]
    pairs = list(itertools.chain(*splits))
    assert all(not np.array_equal(a.fixed, b.fixed) for a, b in itertools.combinations(pairs, 2))
    assert len({pair.name for pair in pairs}) == 4


def noted_maker(n, made):
    """Makes pair `n` and appends its number to `made`."""

    def make():
        made.append(n)
        return make_pair(str(n), seed=n)

    return PairMaker(str(n), str(n), make)


def test_pairs_are_made_once_and_only_when_asked_for(monkeypatch):
    made: list[int] = []
    pairs = LazyPairs([noted_maker(n, made) for n in range(3)])
    assert (len(pairs), made) == (3, [])
    assert pairs[1] is pairs[1] and made == [1]
    monkeypatch.setattr("adregnet_jax.data.splits.CACHE_BYTES", 0)
    assert pairs[2] is not pairs[2] and made == [1, 2, 2]  # too large to keep: made again


def test_unknown_kind():
    with pytest.raises(UserError, match="'fantom': expected phantom, synthetic, dirlab, files or ixi"):
        load_splits(DataConfig(kind="fantom"))


def test_collate_pads_landmarks_and_marks_them():
    without = make_pair("b", landmarks=0)
    batch = collate([make_pair(landmarks=3), without])
    assert batch["fixed"].shape == batch["mask"].shape == (2, 5, 6, 7, 1)
    assert batch["fixed_landmarks"].shape == (2, 100, 3)
    np.testing.assert_array_equal(batch["landmark_valid"].sum(1), [3, 0])
    assert all(array.dtype == np.float32 for array in batch.values())
    assert collate([without])["landmark_valid"].tolist() == [[0]]
    with pytest.raises(UserError, match=r"one shape.*batch_size=1"):
        collate([make_pair(), make_pair("c", shape=(4, 4, 4))])


@pytest.mark.parametrize("seed", range(6))
def test_augmentation_keeps_landmarks_on_their_voxels(seed):
    """Fixed landmarks keep their fixed intensities when mirrored or exchanged, and so do moving ones."""
    pair = make_pair()
    config = DataConfig(flip_axes=(0, 1, 2), exchange=True)
    after = augment(pair, np.random.default_rng(seed), config)
    values = [at(after.fixed, after.fixed_landmarks), at(after.moving, after.moving_landmarks)]
    before = [at(pair.fixed, pair.fixed_landmarks), at(pair.moving, pair.moving_landmarks)]
    assert np.array_equal(values, before) or np.array_equal(values, before[::-1])
    np.testing.assert_array_equal(at(after.mask, after.fixed_landmarks).shape, (3,))
    assert after.mask.sum() == pair.mask.sum()
    assert (after.displacement is None) == np.array_equal(values, before[::-1])


def test_a_mirrored_displacement_still_leads_from_fixed_to_moving():
    """Each fixed voxel holds the number of the moving voxel that the displacement sends it to."""
    shape = (5, 6, 7)
    rng = np.random.default_rng(0)
    target = np.stack([rng.integers(0, n, shape) for n in shape], axis=-1)
    displacement = (target - np.moveaxis(np.indices(shape), 0, -1)).astype(np.float32)
    moving = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    fixed = moving[tuple(np.moveaxis(target, -1, 0))]
    pair = dataclasses.replace(make_pair(), fixed=fixed, moving=moving, displacement=displacement)
    variants = set()
    for seed in range(20):
        after = augment(pair, np.random.default_rng(seed), DataConfig(flip_axes=(0, 1, 2)))
        there = np.moveaxis(after.displacement, -1, 0) + np.indices(shape)
        np.testing.assert_array_equal(after.moving[tuple(there.astype(int))], after.fixed)
        variants.add(after.moving.tobytes())
    assert len(variants) > 4


def test_the_true_displacement_is_included_on_request():
    pair = dataclasses.replace(make_pair(), same_contrast=False)
    batch = collate([pair, make_pair()], with_truth=True, with_contrast=True)
    assert batch["displacement"].shape == (2, 5, 6, 7, 3)
    assert batch["same_contrast"].tolist() == [0, 1]
    with pytest.raises(UserError, match="true displacement of the pair a is not known"):
        collate([dataclasses.replace(pair, displacement=None)], with_truth=True)


def test_synthetic_pairs_come_in_the_order_of_their_numbers():
    pairs = [make_pair(str(n), seed=n) for n in range(6)]
    batches = training_batches(pairs, DataConfig(kind="synthetic"), batch_size=2, seed=0)
    for step, first in enumerate((0, 2, 4, 0)):
        np.testing.assert_array_equal(batches[step]["fixed"][0, ..., 0], pairs[first].fixed)


def test_augmentation_draws_every_variant():
    pair, config = make_pair(), DataConfig(flip_axes=(0, 2), exchange=True)
    variants = {augment(pair, np.random.default_rng(n), config).fixed.tobytes() for n in range(100)}
    assert len(variants) == 8  # 2 mirrors x 2 mirrors x exchange


def test_batch_is_a_function_of_seed_and_step():
    pairs = [make_pair(str(n), seed=n) for n in range(5)]
    batches = training_batches(pairs, AUGMENTED, batch_size=2, seed=3)
    resumed = iterate_from(training_batches(pairs, AUGMENTED, batch_size=2, seed=3), 7, workers=3)
    for step in (7, 8, 9):
        for name, array in next(resumed).items():
            np.testing.assert_array_equal(array, batches[step][name])
    other = training_batches(pairs, AUGMENTED, batch_size=2, seed=4)
    assert any(not np.array_equal(batches[n]["fixed"], other[n]["fixed"]) for n in range(3))


@pytest.mark.usefixtures("unchecked_types")  # a check of the pairs would make one more
def test_rows_of_a_batch_are_made_alone():
    made: list[int] = []
    pairs = LazyPairs([noted_maker(n, made) for n in range(4)])
    whole = training_batches([make_pair(str(n), seed=n) for n in range(4)], AUGMENTED, batch_size=4, seed=3)
    part = training_batches(pairs, AUGMENTED, batch_size=4, seed=3, rows=[1, 2])
    for name, array in part[0].items():
        np.testing.assert_array_equal(array, whole[0][name][1:3])
    assert len(made) == 2  # the pairs of the other rows are not read
    for step in (1, 5):
        for name, array in part[step].items():
            np.testing.assert_array_equal(array, whole[step][name][1:3])


def test_every_pass_sees_every_pair_in_its_own_order():
    pairs = [make_pair(str(n), seed=n) for n in range(6)]
    batches = training_batches(pairs, DataConfig(), batch_size=1, seed=0)
    first_voxel = {float(pair.fixed[0, 0, 0]): n for n, pair in enumerate(pairs)}
    order = [first_voxel[float(batches[step]["fixed"][0, 0, 0, 0, 0])] for step in range(12)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]


def test_augmentation_differs_between_passes():
    batches = training_batches([make_pair()], AUGMENTED, batch_size=1, seed=0)
    assert len({batches[step]["fixed"].tobytes() for step in range(4)}) == 4


def test_no_training_pair_is_an_error():
    with pytest.raises(UserError, match="training split is empty"):
        training_batches([], DataConfig(), batch_size=1, seed=0)


def test_labels_go_with_their_images():
    pair = dataclasses.replace(make_pair(), fixed_labels=LABELS[0], moving_labels=LABELS[1])
    batch = collate([pair, pair], with_labels=True)
    assert batch["fixed_labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["moving_labels"][1, ..., 0], LABELS[1])
    assert "fixed_labels" not in collate([pair])
    # Images equal to the labels: the augmentation must treat both alike.
    fixed, moving = (labels.astype(np.float32) for labels in LABELS)
    pair = dataclasses.replace(pair, fixed=fixed, moving=moving)
    without_jitter = dataclasses.replace(AUGMENTED, intensity_jitter=0.0)
    for seed in range(8):
        other = augment(pair, np.random.default_rng(seed), without_jitter)
        np.testing.assert_array_equal(other.fixed, other.fixed_labels)
        np.testing.assert_array_equal(other.moving, other.moving_labels)
    with pytest.raises(UserError, match="has no labels"):
        collate([make_pair()], with_labels=True)
