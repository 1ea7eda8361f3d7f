"""Batches of synthetic training pairs, drawn from their positions in an endless training set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adregnet_jax.config import DataConfig, SyntheticConfig
from adregnet_jax.data.datasets.synthetic import EASY_SHARE
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.synthesis.draw import normals
from adregnet_jax.synthesis.pairs import SyntheticPair, synthesise


def draw_batch(positions: Int[Array, " b"], config: DataConfig, *, seed: int) -> dict[str, Array]:
    """Draws the pairs at some positions of the endless training set.

    The set repeats `config.synthetic.train_cases` pairs, whose difficulty grows with their number
    (`curriculum_cases`); each repetition is augmented in its own way. So a batch is a function of the
    settings and the positions, on any number of devices.

    Args:
      positions: [b], from 0.
      config: `synthetic` and the settings of augmentation are used. Static under `jit`.
      seed: of the run, for augmentation.

    Returns:
      The arrays of `data.pipeline.collate`, with labels, without landmarks, and with the true displacement,
      unless the scans may change places (`config.exchange`).
    """
    draw = functools.partial(_draw_pair, config=config, seed=seed)
    pairs: SyntheticPair = jax.lax.map(draw, positions) if traces_for_cpu() else jax.vmap(draw)(positions)
    b = len(positions)
    fixed = pairs.fixed[..., None]
    nowhere = jnp.zeros((b, 1, 3))
    batch = {
        "fixed": fixed,
        "moving": pairs.moving[..., None],
        "mask": jnp.ones_like(fixed),
        "spacing_mm": jnp.broadcast_to(jnp.array(config.synthetic.spacing_mm, jnp.float32), (b, 3)),
        "fixed_landmarks": nowhere,
        "moving_landmarks": nowhere,
        "landmark_valid": jnp.zeros((b, 1)),
        "fixed_labels": pairs.fixed_labels[..., None],
        "moving_labels": pairs.moving_labels[..., None],
        "same_contrast": pairs.same_contrast.astype(jnp.float32),
    }
    return batch if config.exchange else batch | {"displacement": pairs.displacement}


def _draw_pair(position: Int[Array, ""], *, config: DataConfig, seed: int) -> SyntheticPair:
    repetition, case = jnp.divmod(position, config.synthetic.train_cases)
    key = jax.random.fold_in(jax.random.key(config.synthetic.seed), case)
    of_pair, of_change = jax.random.split(key)
    pair = synthesise(of_pair, config.synthetic, share=_curriculum_share(config.synthetic, case))
    return _augment(pair, jax.random.fold_in(jax.random.fold_in(of_change, seed), repetition), config)


def _curriculum_share(config: SyntheticConfig, case: Int[Array, ""]) -> float | Float[Array, ""]:
    """Difficulty of a training case, as `data.datasets.synthetic.curriculum_share` of an array."""
    if not config.curriculum_cases:
        return 1.0
    return jnp.minimum(1.0, EASY_SHARE + (1 - EASY_SHARE) * case / config.curriculum_cases)


def _augment(pair: SyntheticPair, key: Array, config: DataConfig) -> SyntheticPair:
    """`data.pipeline.augment` for arrays; where the scans change places, the displacement is wrong."""
    of_sides, of_jitter = jax.random.split(key)
    mirrored = jax.random.bernoulli(of_sides, shape=(4,))
    for axis in config.flip_axes:
        sign = jnp.array([-1.0 if n == axis else 1.0 for n in range(3)])
        flipped: SyntheticPair = jax.tree.map(lambda x: jnp.flip(x, axis) if x.ndim else x, pair)  # noqa: B023
        flipped = flipped._replace(displacement=flipped.displacement * sign)
        pair = _chosen(mirrored[axis], flipped, pair)
    if config.exchange:
        exchanged = pair._replace(
            fixed=pair.moving,
            moving=pair.fixed,
            fixed_labels=pair.moving_labels,
            moving_labels=pair.fixed_labels,
        )
        pair = _chosen(mirrored[3], exchanged, pair)
    if config.intensity_jitter:
        gain, offset = config.intensity_jitter * normals(of_jitter, (2, 2))
        pair = pair._replace(
            fixed=(1 + gain[0]) * pair.fixed + offset[0], moving=(1 + gain[1]) * pair.moving + offset[1]
        )
    return pair


def _chosen(choice: Array, first: SyntheticPair, second: SyntheticPair) -> SyntheticPair:
    return SyntheticPair(*(jnp.where(choice, a, b) for a, b in zip(first, second, strict=True)))
