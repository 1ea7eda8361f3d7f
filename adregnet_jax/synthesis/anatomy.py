"""Random anatomies: blobs, shells around paired nuclei like a head, or a trunk with organs.

Coordinates run from -1 to 1. Shapes of arrays are static: as many structures as possible are
computed, and those beyond a random count cover no voxel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from adregnet_jax.synthesis.draw import smooth_noise, uniforms, whole
from adregnet_jax.synthesis.vessels import vessel_trees

MOST_LABELS = 17  # without the background
_MOST_BLOBS = 13
_MOST_SHELLS = _MOST_NUCLEI = 6
_MOST_ORGANS = 8
_SHARES = (0.3, 0.35, 0.35)  # of blobs, shells and trunks


def draw_anatomy(key: PRNGKeyArray, shape: tuple[int, int, int]) -> Int[Array, "x y z"]:
    """Labels of a random anatomy, numbered from 1 in random order; 0 is the background.

    Args:
      key: random key.
      shape: (x, y, z) of the volume.

    Returns:
      [x, y, z] int32, at most `MOST_LABELS`.
    """
    own, numbers = jax.random.split(key)
    kind, order = uniforms(numbers, (0, 1), (0, 1, MOST_LABELS))
    labels = jax.lax.cond(
        kind < _SHARES[0],
        lambda: _blobs(own, shape),
        lambda: _body(own, shape, kind < _SHARES[0] + _SHARES[1]),
    )
    place = jnp.arange(MOST_LABELS)
    order = jnp.argsort(jnp.where(place < labels.max(), order, 1.0 + place))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), 1 + order.astype(jnp.int32)])[labels]


def _blobs(key: PRNGKeyArray, shape: tuple[int, int, int]) -> Array:
    noise, numbers = jax.random.split(key)
    cells, count = map(whole, uniforms(numbers, (3, 9), (5, 1 + _MOST_BLOBS)))
    fields = smooth_noise(noise, shape, cells, most_cells=8, count=_MOST_BLOBS)  # [n, x, y, z]
    taking_part = (jnp.arange(_MOST_BLOBS) < count)[:, None, None, None]
    return jnp.argmax(jnp.where(taking_part, fields, -jnp.inf), axis=0).astype(jnp.int32)


def _body(key: PRNGKeyArray, shape: tuple[int, int, int], shells: Array) -> Array:
    """Shells or a trunk, in coordinates that are bent, so that no organ is an ellipsoid."""
    own, noise, numbers = jax.random.split(key, 3)
    bend, cells = uniforms(numbers, (0.03, 0.12), (2, 5))
    bent = bend * smooth_noise(noise, shape, whole(cells), most_cells=4, count=3)
    axes = jnp.meshgrid(*(jnp.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    x, y, z = (axis + wave for axis, wave in zip(axes, bent, strict=True))
    return jax.lax.cond(shells, _shells, _trunk, own, x, y, z)


def _shells(key: PRNGKeyArray, x: Array, y: Array, z: Array) -> Array:
    """A layered ellipsoid with folded edges, on average more folded with depth, and paired nuclei."""
    noise, numbers = jax.random.split(key)
    half_axes, cells, shells, edges, folding, nuclei, centres, sizes = uniforms(
        numbers,
        (0.6, 0.95, 3),
        (6, 15),
        (3, 1 + _MOST_SHELLS),
        (0, 0.5, _MOST_SHELLS),
        (0, 0.3, _MOST_SHELLS),
        (2, 1 + _MOST_NUCLEI),
        (-0.4, 0.4, 3 * _MOST_NUCLEI),
        (0.06, 0.25, 3 * _MOST_NUCLEI),
    )
    shells, nuclei = whole(shells), whole(nuclei)
    depth = 1 - jnp.sqrt(_radius_squared(x, y, z, jnp.zeros(3), half_axes))
    folds = smooth_noise(noise, x.shape, whole(cells), most_cells=14)[0]
    edges = jnp.sort(jnp.where(jnp.arange(_MOST_SHELLS) < shells, edges, 1.0))
    labels = jnp.zeros(x.shape, jnp.int32)
    for n in range(_MOST_SHELLS):
        beyond = (n < shells) & (depth + folding[n] * edges[n] * folds > edges[n])
        labels = jnp.where(beyond, n + 1, labels)
    # The two of a pair, at either side of x = 0, are one ellipsoid in |x|.
    centres = centres.reshape(-1, 3) * half_axes[None]
    centres = centres.at[:, 0].set(jnp.abs(centres[:, 0]))
    for n, (centre, size) in enumerate(zip(centres, sizes.reshape(-1, 3), strict=True)):
        inside = (n < nuclei) & (_radius_squared(jnp.abs(x), y, z, centre, size) < 1)
        labels = jnp.where(inside, shells + n + 1, labels)
    return labels


def _trunk(key: PRNGKeyArray, x: Array, y: Array, z: Array) -> Array:
    """Chest to pelvis, partly in the field of view."""
    vessel_key, organ_key, *keys = jax.random.split(key, 5)
    zoom, shift, wide, deep, wall = uniforms(
        keys[0], (0.5, 1.0), (-0.6, 0.6), (0.7, 0.95), (0.5, 0.8), (0.12, 0.22)
    )
    z = z * zoom + shift  # the diaphragm is at about 0, the head above
    across = jnp.sqrt((x / wide) ** 2 + (y / deep) ** 2)
    labels = jnp.where(across < 1, 1, 0)
    inside = across < 1 - wall
    labels = jnp.where(inside, 2, labels)

    curve, gap, aside, up, heart, liver_side, liver_end, organs = uniforms(
        keys[1],
        (0.2, 0.5),
        (0.1, 0.2),
        (0, 0.2),
        (0.15, 0.35),
        (0.2, 0.32, 3),
        (0, 0.25),
        (-0.5, -0.2),
        (3, 1 + _MOST_ORGANS),
    )
    dome = 0.15 - curve * ((jnp.abs(x) - 0.35) ** 2 + y**2)
    lungs = inside & (z > dome) & (jnp.abs(x) > gap)
    labels = jnp.where(lungs, 3, labels)
    labels = jnp.where(_radius_squared(x, y, z, jnp.stack([aside, -0.1, up]), heart) < 1, 4, labels)
    below = inside & (z < dome - 0.03)
    labels = jnp.where(below & (x < liver_side) & (z > liver_end), 5, labels)
    organs = whole(organs)
    labels = _add_organs(organ_key, labels, below, x, y, z, organs)

    pitch, slope, thickness, spine_radius, *chances = uniforms(
        keys[2], (0.12, 0.25), (0.2, 0.5), (0.3, 0.5), (0.1, 0.16), *[(0.0, 1.0)] * 3
    )
    ribs = 6 + organs
    height = jnp.mod(z - slope * y, pitch) / pitch
    shell = (across > 1 - 0.7 * wall) & (across < 1 - 0.3 * wall)
    labels = jnp.where(shell & (height < thickness) & (z > -0.35), ribs, labels)
    spine = jnp.hypot(x, y - 0.75 * deep) < spine_radius
    labels = jnp.where(spine, ribs + 1, labels)
    labels = jnp.where(spine & (jnp.mod(z, pitch) < 0.2 * pitch), ribs + 2, labels)  # discs

    chest, belly = (0.3 - shift) / zoom, (-0.2 - shift) / zoom
    starts = jnp.array([[-0.2, 0, chest], [0.2, 0, chest], [0, 0.2, belly]])
    half = (jnp.array(x.shape) - 1) / 2
    origins = jnp.round(half[None] * (1 + jnp.clip(starts, -1, 1)))
    trees = vessel_trees(vessel_key, origins, shape=x.shape)  # [3, x, y, z]
    regions = lungs & (x < 0), lungs & (x > 0), below
    for tree, region, chance in zip(trees, regions, chances, strict=True):
        labels = jnp.where(tree & region & (chance < 0.8), ribs + 3, labels)
    return labels


def _add_organs(
    key: PRNGKeyArray, labels: Array, below: Array, x: Array, y: Array, z: Array, count: Array
) -> Array:
    """Adds ellipsoids below the diaphragm, numbered from 6."""
    *centres, sizes = uniforms(
        key,
        (-0.55, 0.55, _MOST_ORGANS),
        (-0.4, 0.4, _MOST_ORGANS),
        (-0.9, -0.15, _MOST_ORGANS),
        (0.1, 0.3, 3 * _MOST_ORGANS),
    )
    for n, (centre, size) in enumerate(zip(jnp.stack(centres, 1), sizes.reshape(-1, 3), strict=True)):
        inside = below & (n < count) & (_radius_squared(x, y, z, centre, size) < 1)
        labels = jnp.where(inside, 6 + n, labels)
    return labels


def _radius_squared(x: Array, y: Array, z: Array, centre: Array, half_axes: Array) -> Array:
    """1 on the surface of an ellipsoid, 0 in its centre."""
    a, b, c = half_axes
    return ((x - centre[0]) / a) ** 2 + ((y - centre[1]) / b) ** 2 + ((z - centre[2]) / c) ** 2
