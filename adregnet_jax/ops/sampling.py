"""Sampling a volume at real-valued voxel coordinates: `sample`, `warp`, `sample_at_points`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Real, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import limit_bytes, traces_for_cpu
from adregnet_jax.ops.cpu.chunks import chunk, for_each_chunk, slices_a_chunk, zeros_after
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.slabs import pass_on, slab_count, slab_index, slab_start, sum_over_slabs, whole_width

Mode = Literal["linear", "nearest"]
Padding = Literal["border", "zeros"]
_MANY_CHANNELS = 5


def sample(
    volume: Shaped[AnyArray, "x y z c"],
    coordinates: Real[AnyArray, "*points 3"],
    *,
    mode: Mode = "linear",
    padding: Padding = "border",
) -> Shaped[Array, "*points c"]:
    """Values of one volume at voxel coordinates.

    Args:
      volume: [x, y, z, c].
      coordinates: [..., 3] in voxels; integers are voxel centres.
      mode: "linear" (trilinear, differentiable in both arguments) or "nearest" (for labels; halves round up).
      padding: "border" repeats the outermost voxels; "zeros" takes everything outside the grid as 0, so that
        a linear sample fades out over the last voxel.

    Returns:
      [..., c] in the dtype of the volume.

    Raises:
      ValueError: wrong rank, last axis not 3, an unknown mode or padding, or whole numbers to interpolate.

    Examples:
      >>> volume = jnp.arange(4.0).reshape(4, 1, 1, 1)
      >>> sample(volume, jnp.array([[1.5, 0, 0], [9, 0, 0]])).ravel().tolist()
      [1.5, 3.0]
    """
    return _sample_part(volume, coordinates, mode, padding, 0, volume.shape[0])


def warp(
    volume: Shaped[AnyArray, "b x y z c"],
    displacement: Float[AnyArray, "b x2 y2 z2 3"],
    *,
    mode: Mode = "linear",
    padding: Padding = "border",
) -> Shaped[Array, "b x2 y2 z2 c"]:
    """Pull volumes back through displacements: `warped(p) = volume(p + u(p))` (eq. 1).

    Of volumes in slabs, each slab visits all devices in turn, and each device takes from it what its
    displacements reach: none holds the whole volume, however long the displacements are.

    Args:
      volume: [b, x, y, z, c], the moving volumes.
      displacement: [b, x', y', z', 3] in voxels; its grid is that of the result.
      mode: see `sample`.
      padding: see `sample`.

    Returns:
      [b, x', y', z', c].

    Raises:
      ValueError: wrong ranks or batch sizes.

    Examples:
      >>> volume = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
      >>> displacement = jnp.zeros((1, 4, 1, 1, 3)).at[..., 0].set(1)
      >>> warp(volume, displacement).ravel().tolist()
      [1.0, 2.0, 3.0, 3.0]
    """
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    coordinates = identity_grid(displacement.shape[1:4])[None] + displacement
    _check_batch(volume, coordinates)
    if slab_count() > 1:
        return _sample_in_turn(jnp.asarray(volume), coordinates, mode, padding)
    return _sample_batch(volume, coordinates, mode, padding, 0, volume.shape[1])


def warp_labels(
    labels: Integer[AnyArray, "b x y z 1"],
    displacement: Float[AnyArray, "b x2 y2 z2 3"],
    classes: Sequence[int] | Integer[AnyArray, " k"],
) -> Integer[Array, "b x2 y2 z2 1"]:
    """Label maps pulled back as images of 0 and 1, one a class, warped trilinearly: the largest one wins.

    One class at a time, so that memory does not grow with their number.

    Args:
      labels: [b, x, y, z, 1], integers.
      displacement: [b, x', y', z', 3] in voxels.
      classes: the labels that take part, background among them; the first one wins a tie.

    Returns:
      [b, x', y', z', 1] in the dtype of the labels.

    Raises:
      ValueError: wrong ranks or batch sizes, or no class.

    Examples:
      >>> labels = jnp.array([0, 0, 5, 5]).reshape(1, 4, 1, 1, 1)
      >>> displacement = jnp.zeros((1, 4, 1, 1, 3)).at[..., 0].set(1)
      >>> warp_labels(labels, displacement, (0, 5)).ravel().tolist()
      [0, 5, 5, 5]
    """
    if len(classes) == 0:
        raise ValueError("classes is empty: at least one label is needed")

    def compare(best: tuple[Array, Array], label: Array) -> tuple[tuple[Array, Array], None]:
        score = warp((labels == label).astype(jnp.float32), displacement)
        return (jnp.maximum(score, best[0]), jnp.where(score > best[0], label, best[1])), None

    shape = (*displacement.shape[:-1], 1)
    first = jnp.asarray(classes, labels.dtype)
    start = (jnp.zeros(shape), jnp.full(shape, first[0]))
    return jax.lax.scan(compare, start, first)[0][1]


def sample_at_points(
    volume: Shaped[AnyArray, "b x y z c"],
    points: Real[AnyArray, "b n 3"],
    *,
    mode: Mode = "linear",
    padding: Padding = "border",
) -> Shaped[Array, "b n c"]:
    """Values of volumes at points, the same on all devices that share a volume.

    Args:
      volume: [b, x, y, z, c].
      points: [b, n, 3] in voxels.
      mode: see `sample`.
      padding: see `sample`.

    Returns:
      [b, n, c].

    Raises:
      ValueError: wrong ranks or batch sizes.

    Examples:
      >>> volume = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
      >>> sample_at_points(volume, jnp.array([[[1.5, 0, 0], [9, 0, 0]]])).ravel().tolist()
      [1.5, 3.0]
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points must be [b, n, 3], got shape {points.shape}")
    _check_batch(volume, points)
    width = volume.shape[1]
    first, whole = slab_start(width), whole_width(width)
    values = _sample_batch(volume, points, mode, padding, first, whole)
    return sum_over_slabs(values)


def _check_batch(volume: AnyArray, coordinates: AnyArray) -> None:
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    if volume.shape[0] != coordinates.shape[0]:
        raise ValueError(f"batch sizes differ: volume {volume.shape[0]}, coordinates {coordinates.shape[0]}")


def _sample_batch(
    volume: AnyArray,
    coordinates: AnyArray,
    mode: Mode,
    padding: Padding,
    first: int | Array,
    whole: int,
) -> Array:
    slices = None
    # Features, not images, whose memory is small, and which keep their derivatives in forward mode.
    features = volume.shape[-1] >= _MANY_CHANNELS and coordinates.ndim == 5 and mode == "linear"
    if features:
        of_slice = 4 * volume.shape[-1] * math.prod(coordinates.shape[2:4])
        slices = slices_a_chunk(coordinates.shape, 8 * of_slice, limit_bytes("warp"))
    if slices is None and features and not traces_for_cpu():
        volume, coordinates = jnp.asarray(volume), jnp.asarray(coordinates, jnp.float32)
        return _sample_features(volume, coordinates, jnp.asarray(first), padding, whole)
    if slices is None:
        return _sample_each(volume, coordinates, mode, padding, first, whole)
    return _sample_in_chunks(
        jnp.asarray(volume),
        jnp.asarray(coordinates, jnp.float32),
        jnp.asarray(first),
        padding,
        slices,
        whole,
    )


def _sample_each(
    volume: AnyArray,
    coordinates: AnyArray,
    mode: Mode,
    padding: Padding,
    first: int | Array,
    whole: int,
) -> Array:
    """`_sample_part` of each volume of a batch."""
    return jax.vmap(lambda v, q: _sample_part(v, q, mode, padding, first, whole))(volume, coordinates)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _sample_in_chunks(
    volume: Array, coordinates: Array, first: Array, padding: Padding, slices: int, whole: int
) -> Array:
    """What volumes or slabs [b, x, y, z, c] add to linear samples at [b, x', y', z', 3], chunk by chunk."""
    b, nx = coordinates.shape[:2]
    each = nx // slices  # chunks of a volume

    def one(n: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(volume, n // each, keepdims=False)
        return _sample_part(own, chunk(coordinates, n, slices)[0], "linear", padding, first, whole)

    found = for_each_chunk(one, b * each, volume, coordinates)
    return found.reshape(b, nx, *found.shape[2:])


def _sample_in_chunks_backward(
    padding: Padding, slices: int, whole: int, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, None]:
    # Autodiff would add up the gradients of the eight corners in a volume of its own each.
    volume, coordinates, first = saved
    b, nx = coordinates.shape[:2]
    each = nx // slices

    def add_chunk(n: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        to_volume, to_coordinates = totals
        batch, start = n // each, n % each * slices
        own = jax.lax.dynamic_index_in_dim(volume, batch, keepdims=False)
        q, g = chunk(coordinates, n, slices)[0], chunk(gradient, n, slices)[0]
        pull_back = jax.vjp(lambda q: _sample_part(own, q, "linear", padding, first, whole), q)[1]
        to_coordinates = jax.lax.dynamic_update_slice(
            to_coordinates, pull_back(g)[0][None], (batch, start, 0, 0, 0)
        )
        for weight, index in _corners(q, padding, own.shape[:3], first, whole):
            share = weight[..., None] * g
            to_volume = to_volume.at[batch, *index].add(share, mode="promise_in_bounds")
        return to_volume, to_coordinates

    nothing = tuple(zeros_after(x.shape, jnp.float32, gradient) for x in (volume, coordinates))
    to_volume, to_coordinates = jax.lax.fori_loop(0, b * each, add_chunk, nothing)
    return to_volume.astype(volume.dtype), to_coordinates, None


_sample_in_chunks.defvjp(
    lambda volume, coordinates, first, *static: (
        _sample_in_chunks(volume, coordinates, first, *static),
        (volume, coordinates, first),
    ),
    _sample_in_chunks_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sample_features(volume: Array, coordinates: Array, first: Array, padding: Padding, whole: int) -> Array:
    """Linear samples of volumes [b, x, y, z, c], or the shares of slabs in them, at [b, x', y', z', 3]."""
    return _sample_each(volume, coordinates, "linear", padding, first, whole)


def _sample_features_backward(
    padding: Padding, whole: int, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, None]:
    # Autodiff would add to a volume of its own for each corner, and add these up, in the dtype of the volume.
    volume, coordinates, first = saved

    def to_volume(q: Array, g: Array) -> Array:
        corners = _corners(q, padding, volume.shape[1:4], first, whole)
        weights, indices = zip(*corners, strict=True)
        index = [jnp.stack(along) for along in zip(*indices, strict=True)]  # [8, x', y', z'] each
        shares = jnp.stack(weights)[..., None] * g[None]
        return jnp.zeros(volume.shape[1:], jnp.float32).at[*index].add(shares, mode="promise_in_bounds")

    pull_back = jax.vjp(lambda q: _sample_each(volume, q, "linear", padding, first, whole), coordinates)[1]
    return jax.vmap(to_volume)(coordinates, gradient).astype(volume.dtype), *pull_back(gradient), None


_sample_features.defvjp(
    lambda volume, coordinates, first, *static: (
        _sample_features(volume, coordinates, first, *static),
        (volume, coordinates, first),
    ),
    _sample_features_backward,
)


def _corners(
    coordinates: Array, padding: Padding, shape: Sequence[int], first: Array, whole: int
) -> Iterator[tuple[Array, list[Array]]]:
    """Of linear samples at coordinates [..., 3]: the weight [...] of each corner, and its index in the slab.

    The weight is 0 of corners in other slabs, as it is of those beyond a border of zeros.
    """
    lower, fraction = _place(coordinates, padding, (whole, *shape[1:]))
    for steps in itertools.product((0, 1), repeat=3):
        weight: Array = jnp.float32(1)
        index: list[Array] = []
        for axis, (low, part, step) in enumerate(zip(lower, fraction, steps, strict=True)):
            size = shape[axis] if axis else whole
            place = low + step
            weight = weight * (part if step else 1 - part)
            if padding == "zeros":
                weight = jnp.where((place >= 0) & (place < size), weight, 0)
            place = jnp.clip(place, 0, size - 1) - (0 if axis else first)
            if not axis:
                weight = jnp.where((place >= 0) & (place < shape[0]), weight, 0)
            index.append(jnp.clip(place, 0, shape[axis] - 1))
        yield weight, index


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sample_in_turn(volume: Array, coordinates: Array, mode: Mode, padding: Padding) -> Array:
    """Values of slabs [b, x, y, z, c] at coordinates [b, ..., 3] of the whole volume."""
    reach = _Reach(volume, coordinates, padding)
    nothing = jnp.zeros((*coordinates.shape[:-1], volume.shape[-1]), volume.dtype)

    def visit(carry: tuple[Array, Array], turn: Array) -> tuple[tuple[Array, Array], None]:
        slab, total = carry
        first = reach.start(turn)
        part = jax.lax.cond(
            reach.any(first),
            lambda: _sample_batch(slab, coordinates, mode, padding, first, reach.whole),
            lambda: nothing,
        )
        return (pass_on(slab), total + part), None

    return jax.lax.scan(visit, (volume, nothing), jnp.arange(reach.devices))[0][1]


def _sample_in_turn_backward(
    mode: Mode, padding: Padding, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, ...]:
    # The gradient of a slab travels with it. Autodiff would keep the slab of every turn: the whole volume.
    volume, coordinates = saved
    reach = _Reach(volume, coordinates, padding)
    nothing = jax.tree.map(jnp.zeros_like, saved)

    def visit(carry: tuple[Array, Array, Array], turn: Array) -> tuple[tuple[Array, Array, Array], None]:
        slab, slab_gradient, coordinate_gradient = carry
        first = reach.start(turn)

        def pull_back() -> tuple[Array, Array]:
            sampled = functools.partial(
                _sample_batch, mode=mode, padding=padding, first=first, whole=reach.whole
            )
            return jax.vjp(sampled, slab, coordinates)[1](gradient)

        more_slab, more_coordinate = jax.lax.cond(reach.any(first), pull_back, lambda: nothing)
        slab, slab_gradient = pass_on((slab, slab_gradient + more_slab))
        return (slab, slab_gradient, coordinate_gradient + more_coordinate), None

    # After as many turns as devices, each slab is at home again.
    (_, *gradients), _ = jax.lax.scan(visit, (volume, *nothing), jnp.arange(reach.devices))
    return tuple(gradients)


_sample_in_turn.defvjp(
    lambda volume, coordinates, *static: (
        _sample_in_turn(volume, coordinates, *static),
        (volume, coordinates),
    ),
    _sample_in_turn_backward,
)


class _Reach:
    """Which slabs the coordinates of this device reach, while slabs go from device to device."""

    def __init__(self, volume: Array, coordinates: Array, padding: Padding) -> None:
        self._width = volume.shape[1]
        self.devices = slab_count()
        self.whole = whole_width(self._width)
        x = coordinates[..., 0]
        self._x = jnp.clip(x, 0, self.whole - 1) if padding == "border" else x

    def start(self, turn: Array) -> Array:
        """The first voxel of the slab that is here in this turn."""
        return (slab_index() - turn) % self.devices * self._width

    def any(self, first: Array) -> Array:
        # A voxel before the slab, its first voxel has weight 0 and a gradient in the coordinate.
        return jnp.any((self._x >= first - 1) & (self._x < first + self._width))


def _sample_part(
    volume: AnyArray,
    coordinates: AnyArray,
    mode: Mode,
    padding: Padding,
    first: int | Array,
    whole: int,
) -> Array:
    """What a slab [x, y, z, c] that begins at voxel `first` of `whole` along x adds to the samples.

    All of the samples, if it is the whole volume; else what the slabs add sums up to them.
    """
    if mode == "linear" and not jnp.issubdtype(volume.dtype, jnp.inexact):
        raise ValueError(f"linear interpolation needs floating-point values, got {volume.dtype}")
    if volume.ndim != 4:
        raise ValueError(f"volume must be [x, y, z, c], got shape {volume.shape}")
    if coordinates.shape[-1:] != (3,):
        raise ValueError(f"coordinates must be [..., 3], got shape {coordinates.shape}")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    if padding not in ("border", "zeros"):
        raise ValueError(f"padding must be 'border' or 'zeros', got {padding!r}")
    # Coordinates stay float32: bfloat16 can't tell voxel 256 from 257.
    coordinates = coordinates.astype(jnp.float32)
    read = functools.partial(_read, volume, padding, first, (whole, *volume.shape[1:3]))
    if mode == "nearest":
        index = jnp.floor(coordinates + 0.5).astype(jnp.int32)
        return read([index[..., k] for k in range(3)])
    return _sample_linear(read, coordinates, padding, (whole, *volume.shape[1:3]), volume.dtype)


def _sample_linear(
    read: Callable[[Sequence[Array]], Array],
    coordinates: AnyArray,
    padding: Padding,
    shape: Sequence[int],
    dtype: np.dtype,
) -> Array:
    first, fraction = _place(coordinates, padding, shape)
    fraction = [part[..., None].astype(dtype) for part in fraction]

    def corner(*step: int) -> Array:
        return read([i + s for i, s in zip(first, step, strict=True)])

    # Along one axis after another: seven products, where the sum over corners of weights takes three times
    # as many, and a gradient in the coordinates that reuses the differences.
    def along(axis: int, *step: int) -> Array:
        if axis == 3:
            return corner(*step)
        near, far = (along(axis + 1, *step, s) for s in (0, 1))
        return near + fraction[axis] * (far - near)

    return along(0)


def _place(coordinates: AnyArray, padding: Padding, shape: Sequence[int]) -> tuple[list[Array], list[Array]]:
    """The voxel before each coordinate along each axis, and how far behind it the coordinate lies."""
    margin = 0 if padding == "border" else 1  # a voxel outside, a linear sample has faded to 0
    position = [jnp.clip(coordinates[..., k], -margin, n - 1 + margin) for k, n in enumerate(shape)]
    lower = [jnp.floor(p) for p in position]
    fraction = [p - low for p, low in zip(position, lower, strict=True)]
    return [low.astype(jnp.int32) for low in lower], fraction


def _read(
    volume: AnyArray, padding: Padding, start: int | Array, shape: Sequence[int], index: Sequence[Array]
) -> Array:
    """Values at indices of the whole volume of `shape`; 0 where they lie in another slab than this one."""
    inside = []
    if padding == "zeros":
        inside = [(i >= 0) & (i < n) for i, n in zip(index, shape, strict=True)]
    if volume.shape[0] != shape[0]:
        x = jnp.clip(index[0], 0, shape[0] - 1) - start
        inside.append((x >= 0) & (x < volume.shape[0]))
        index = [x, *index[1:]]
    value = _gather(volume, index)
    return jnp.where(functools.reduce(jnp.logical_and, inside)[..., None], value, 0) if inside else value


def _gather(volume: AnyArray, index: Sequence[Array]) -> Array:
    """volume[i, j, k] by one flat index, which XLA on CPU gathers faster than three.

    Clipping the integers first makes the promise true whatever the coordinates are, NaN included.
    """
    nx, ny, nz, channels = volume.shape
    i, j, k = (jnp.clip(axis, 0, n - 1) for axis, n in zip(index, (nx, ny, nz), strict=True))
    flat = jnp.asarray(volume).reshape(-1, channels)
    return flat.at[(i * ny + j) * nz + k].get(mode="promise_in_bounds")
