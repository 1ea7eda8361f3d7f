"""From pairs to batches: augmentation, collation, and the endless shuffled training set.

All randomness is a function of (seed, position in the endless set), so `training_batches(...)[step]` is the
batch of that step however often training was interrupted before it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from adregnet_jax.config import DataConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.errors import UserError

Batch = dict[str, np.ndarray]
LANDMARK_ROOM = 100  # counts are padded to multiples of it, so that different ones share a compilation


def collate(
    pairs: Sequence[Pair], *, with_labels: bool = False, with_truth: bool = False, with_contrast: bool = False
) -> Batch:
    """Stacks pairs of one shape into the arrays that the model and the losses take.

    Args:
        pairs: b pairs.
        with_labels: add the label maps.
        with_truth: add the true displacement.
        with_contrast: add whether the two scans of each pair have the same contrast.

    Returns:
        fixed, moving and mask [b, x, y, z, 1]; spacing_mm [b, 3]; fixed_landmarks and moving_landmarks
        [b, n, 3], padded with zeros to a multiple of `LANDMARK_ROOM` (to 1 if there are none);
        landmark_valid [b, n], 1 where there is a landmark. All float32. With labels, fixed_labels and
        moving_labels [b, x, y, z, 1], int32. With the truth, displacement [b, x, y, z, 3] in voxels;
        with contrast, same_contrast [b], 1 or 0.

    Raises:
        UserError: the shapes differ, or labels or the true displacement are missing.
    """
    shapes = {pair.name: pair.fixed.shape for pair in pairs}
    if len(set(shapes.values())) > 1:
        raise UserError(f"the pairs of a batch must have one shape, got {shapes}: set optimiser.batch_size=1")
    room = max(1, math.ceil(max(_landmark_count(pair) for pair in pairs) / LANDMARK_ROOM) * LANDMARK_ROOM)
    landmark_valid = [np.arange(room) < _landmark_count(pair) for pair in pairs]
    masks = [np.ones(pair.fixed.shape) if pair.mask is None else pair.mask for pair in pairs]
    batch = {
        "fixed": np.stack([pair.fixed for pair in pairs])[..., None],
        "moving": np.stack([pair.moving for pair in pairs])[..., None],
        "mask": np.stack(masks)[..., None],
        "spacing_mm": np.stack([pair.spacing_mm for pair in pairs]),
        "fixed_landmarks": np.stack([_padded(pair.fixed_landmarks, room) for pair in pairs]),
        "moving_landmarks": np.stack([_padded(pair.moving_landmarks, room) for pair in pairs]),
        "landmark_valid": np.stack(landmark_valid),
    }
    batch = {name: np.asarray(array, np.float32) for name, array in batch.items()}
    if with_truth:
        batch["displacement"] = np.stack([_truth(pair) for pair in pairs])
    if with_contrast:
        batch["same_contrast"] = np.array([pair.same_contrast for pair in pairs], np.float32)
    if with_labels:
        for name in ("fixed_labels", "moving_labels"):
            batch[name] = np.stack([_labels(pair, name) for pair in pairs])[..., None]
    return batch


def augment(pair: Pair, rng: np.random.Generator, config: DataConfig) -> Pair:
    """A random variant of a training pair: mirrored, exchanged, or with changed brightness, as configured.

    When the scans change places, the true displacement becomes unknown and is dropped.
    """
    fixed, moving, mask = pair.fixed, pair.moving, pair.mask
    fixed_labels, moving_labels = pair.fixed_labels, pair.moving_labels
    fixed_landmarks, moving_landmarks = pair.fixed_landmarks, pair.moving_landmarks
    displacement = pair.displacement
    for axis in config.flip_axes:
        if rng.random() < 0.5:
            last = fixed.shape[axis] - 1
            fixed, moving = np.flip(fixed, axis), np.flip(moving, axis)
            mask, fixed_labels, moving_labels = (
                None if volume is None else np.flip(volume, axis)
                for volume in (mask, fixed_labels, moving_labels)
            )
            if displacement is not None:
                displacement = np.flip(displacement, axis) * np.where(np.arange(3) == axis, -1, 1).astype(
                    np.float32
                )
            fixed_landmarks = _mirrored(fixed_landmarks, axis, last)
            moving_landmarks = _mirrored(moving_landmarks, axis, last)
    if config.exchange and rng.random() < 0.5:
        fixed, moving, displacement = moving, fixed, None
        fixed_labels, moving_labels = moving_labels, fixed_labels
        fixed_landmarks, moving_landmarks = moving_landmarks, fixed_landmarks
    if config.intensity_jitter:
        fixed, moving = (
            np.float32(1 + rng.normal(0, config.intensity_jitter)) * image
            + np.float32(rng.normal(0, config.intensity_jitter))
            for image in (fixed, moving)
        )
    return dataclasses.replace(
        pair,
        fixed=fixed,
        moving=moving,
        mask=mask,
        fixed_landmarks=fixed_landmarks,
        moving_landmarks=moving_landmarks,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        displacement=displacement,
    )


def training_batches(
    pairs: Sequence[Pair],
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    make_batch: Callable[[Sequence[Pair]], Batch] = collate,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset[Batch]:
    """The endless training set: `[step]` is the batch of that step, or only its `rows`.

    Each pass over the pairs has its own order, except for synthetic pairs, whose difficulty grows with their
    number. Batches are always full: the last one of a pass is completed from the next pass.
    """
    if not pairs:
        raise UserError("the training split is empty; expected at least 1 pair: check the data settings")
    elements = grain.MapDataset.source(pairs).seed(seed)
    if config.kind != "synthetic":
        elements = elements.shuffle()
    augmented = elements.repeat().random_map(functools.partial(augment, config=config))
    if rows is not None and len(rows) < batch_size:
        augmented, batch_size = grain.MapDataset.source(_Rows(augmented, rows, batch_size)), len(rows)
    return augmented.batch(batch_size, drop_remainder=True, batch_fn=make_batch)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Selects `rows` of each `batch_size` consecutive elements; the others are never generated."""

    elements: grain.MapDataset[Pair]
    rows: Sequence[int]
    batch_size: int

    def __len__(self) -> int:
        return len(self.elements) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        batch, row = divmod(index, len(self.rows))
        return self.elements[batch * self.batch_size + self.rows[row]]


def iterate_from(batches: grain.MapDataset[Batch], step: int, *, workers: int = 1) -> Iterator[Batch]:
    """Iterates over the batches from `step` on; `workers` threads prepare the next ones in the background."""
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(batches[step:].to_iter_dataset(options))


def _landmark_count(pair: Pair) -> int:
    return 0 if pair.fixed_landmarks is None else len(pair.fixed_landmarks)


def _labels(pair: Pair, name: str) -> np.ndarray:
    labels = getattr(pair, name)
    if labels is None:
        raise UserError(
            f"the pair {pair.name} has no labels, which loss.dice needs: set it to 0, or add labels"
        )
    return np.asarray(labels, np.int32)


def _truth(pair: Pair) -> np.ndarray:
    if pair.displacement is None:
        raise UserError(
            f"the true displacement of the pair {pair.name} is not known; loss.field needs it: set it to 0,"
            " or train on synthetic or phantom pairs without data.exchange"
        )
    return np.asarray(pair.displacement, np.float32)


def _padded(points: np.ndarray | None, room: int) -> np.ndarray:
    padded = np.zeros((room, 3), np.float32)
    if points is not None:
        padded[: len(points)] = points
    return padded


def _mirrored(points: np.ndarray | None, axis: int, last: int) -> np.ndarray | None:
    if points is None:
        return None
    points = points.copy()
    points[:, axis] = last - points[:, axis]
    return points
