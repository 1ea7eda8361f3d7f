"""The 3x3x3 convolution made of 2-D convolutions and matrix products, which XLA for CPU is fast at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import (
    chunk,
    delayed,
    from_bits,
    joined,
    slices_a_chunk,
    taps_of_parts,
    to_bits,
    zeros_after,
)

_ONE_PRODUCT_VOXELS = 1024  # volumes of up to this size have their kernel gradient in one product
_EIGEN_CHANNELS = 4  # from this many input channels, Eigen on all cores beats YNNPACK on one


@jax.custom_vjp
def folded_conv3d(
    parts: tuple[Float[Array, "b x y z _"], ...], kernel: Float[Array, "3 3 3 _ out"]
) -> Float[Array, "b x y z out"]:
    """`conv3d` of a tuple of volumes, with the taps along x folded into output channels.

    One 2-D convolution over (y, z) gives what each slice adds to itself and to both of its neighbours; the
    three are added with a shift along x. Large volumes go by groups of slices. The gradient in the kernel is
    a sum of matrix products of a few rows of voxels each.
    """
    b, nx, ny, nz, _ = parts[0].shape
    c, out = kernel.shape[-2:]
    # XLA for CPU converts what it convolves to float32.
    columns = 3 * out + (c if parts[0].dtype == jnp.bfloat16 else 0)
    slice_bytes = 4 * ny * nz * columns
    if b * nx * slice_bytes > limit_bytes("folded_sum"):
        slices = slices_a_chunk(parts[0].shape, slice_bytes, limit_bytes("folded_group"))
        slices = slices or nx  # a single large slice
        return _folded_by_groups(parts, kernel, slices)
    before, here, after = _planes(joined(parts), kernel)
    return here + _pad_in_x(before[:, :-1], 1, 0) + _pad_in_x(after[:, 1:], 0, 1)


def _folded_by_groups(parts: tuple[jax.Array, ...], kernel: jax.Array, slices: int) -> jax.Array:
    """`folded_conv3d` by groups of `slices` slices, each of which is convolved once.

    The contribution of a group's first slice to the slice before it is added to the result at once; that of
    its last slice to the slice after it is passed to the next group.
    """
    b, nx, ny, nz, _ = parts[0].shape
    out, dtype = kernel.shape[-1], jnp.result_type(*parts)

    def add_group(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        written, passed_on = carry
        volume = joined([chunk(part, n, slices) for part in parts])
        before, here, after = (planes[0] for planes in _planes(volume, kernel))
        inside = n % (nx // slices) > 0  # else a new volume of the batch begins here
        first = jnp.where(inside, passed_on, 0)[None]
        group = (
            here
            + jnp.concatenate([first, before[:-1]])
            + jnp.pad(after[1:], ((0, 1), (0, 0), (0, 0), (0, 0)))
        )
        last = jnp.maximum(n * slices - 1, 0)  # of the previous group; the first group overwrites it below
        corrected = from_bits(jax.lax.dynamic_index_in_dim(written, last, keepdims=False), dtype)
        corrected = corrected + jnp.where(inside, after[0], 0)
        written = jax.lax.dynamic_update_index_in_dim(written, to_bits(corrected), last, 0)
        return jax.lax.dynamic_update_slice_in_dim(written, to_bits(group), n * slices, 0), before[-1]

    start = to_bits(zeros_after((b * nx, ny, nz, out), dtype, *parts, kernel))
    nothing = zeros_after((ny, nz, out), dtype, *parts, kernel)
    written, _ = jax.lax.fori_loop(0, b * nx // slices, add_group, (start, nothing))
    return from_bits(written, dtype).reshape(b, nx, ny, nz, out)


def _planes(volume: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Contributions of each slice of [b, x, y, z, c] to the next slice, to itself and to the one before."""
    b, nx, ny, nz, c = volume.shape
    out = kernel.shape[-1]
    # [y taps, z taps, c, x taps * out]
    taps = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(3, 3, c, 3 * out)
    # XLA gives a convolution whose result is no larger than its input to YNNPACK, which runs on one core. A
    # spare column, cut off again, leaves it to Eigen, which runs on all. With few channels YNNPACK is faster.
    spare = int(c >= _EIGEN_CHANNELS)
    slices = jax.lax.conv_general_dilated(
        volume.reshape(b * nx, ny, nz, c),
        taps,
        (1, 1),
        ((1, 1), (1, 1 + spare)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[:, :, :nz].reshape(b, nx, ny, nz, 3 * out)
    return slices[..., :out], slices[..., out : 2 * out], slices[..., 2 * out :]


def _pad_in_x(slices: jax.Array, before: int, after: int) -> jax.Array:
    """Adds slices of zeros. XLA fuses a padding with the sum it feeds, unlike an update of a slice."""
    return jnp.pad(slices, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))


def _folded_backward(
    saved: tuple[tuple[jax.Array, ...], jax.Array], gradient: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    parts, kernel = saved
    to_kernel = _kernel_gradient(parts, gradient).astype(kernel.dtype)
    # Only the optimiser needs the gradient in the kernel: XLA would put it off and keep the parts until then.
    mirrored = delayed(jnp.flip(kernel, (0, 1, 2)), to_kernel)
    own = taps_of_parts(mirrored, parts)
    return tuple(folded_conv3d((gradient,), taps.swapaxes(3, 4)) for taps in own), to_kernel


folded_conv3d.defvjp(lambda parts, kernel: (folded_conv3d(parts, kernel), (parts, kernel)), _folded_backward)


def _kernel_gradient(parts: tuple[jax.Array, ...], gradient: jax.Array) -> jax.Array:
    """[3, 3, 3, c, c'], float32, chunk by chunk where volume and gradient are large."""
    b, nx, ny, nz, _ = parts[0].shape
    c, out = sum(part.shape[-1] for part in parts), gradient.shape[-1]
    slices = slices_a_chunk(gradient.shape, 4 * ny * nz * (c + out), limit_bytes("folded_gradient"))
    if slices is None:  # without the delay, XLA copies the parts in the forward pass and keeps the copies
        return _chunk_kernel_gradient(delayed(joined(parts), gradient), _pad_in_x(gradient, 1, 1))

    def add_chunk(n: jax.Array, total: jax.Array) -> jax.Array:
        volume = joined([chunk(part, n, slices) for part in parts])
        return total + _chunk_kernel_gradient(volume, chunk(gradient, n, slices, halo=1))

    zeros = jnp.zeros((3, 3, 3, c, out), jnp.float32)
    return jax.lax.fori_loop(0, b * nx // slices, add_chunk, zeros)


def _chunk_kernel_gradient(volume: jax.Array, gradient: jax.Array) -> jax.Array:
    """The kernel gradient of a chunk, whose output gradient has one more slice on either side.

    It is the product of nine copies of the volume, shifted in y and z, and three of the gradient, shifted in
    x. Tap i of slice x meets output slice x + 1 - i, which has index x + 2 - i here because of the additional
    slice, so the three are in the order of 2 - i.
    """
    b, nx, ny, nz, c = volume.shape
    out = gradient.shape[-1]
    few = b * nx * ny * nz <= _ONE_PRODUCT_VOXELS
    total = (_one_product if few else _sum_of_products)(volume, gradient)
    return jnp.transpose(total.reshape(3, 3, c, 3, out)[:, :, :, ::-1], (3, 0, 1, 2, 4))


def _one_product(volume: jax.Array, gradient: jax.Array) -> jax.Array:
    """[9 c, 3 c'] from whole copies, for small volumes."""
    nx, ny, nz = volume.shape[1:4]
    padded = jnp.pad(volume, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, :, j : j + ny, k : k + nz] for j in range(3) for k in range(3)]
    outputs = [gradient[:, n : n + nx] for n in range(3)]
    return jnp.einsum(
        "bxyzi,bxyzo->io",
        jnp.concatenate(shifted, axis=-1),
        jnp.concatenate(outputs, axis=-1),
        preferred_element_type=jnp.float32,
    )


def _sum_of_products(volume: jax.Array, gradient: jax.Array) -> jax.Array:
    """[9 c, 3 c'] from a few rows of voxels at a time, planar and flat: [slice, c, y * z], padded by zeros.

    In a flat plane, a shift in y and z is a different start, and a copy is one contiguous run of memory. The
    positions between two rows meet zeros of the gradient; short rows waste a share of the work on them.
    """
    b, nx, ny, nz, c = volume.shape
    out, width = gradient.shape[-1], nz + 2
    copies_bytes = 9 * 4 * c * ny * width  # of one slice, float32
    blocks = max(1, round(copies_bytes / limit_bytes("folded_gradient_rows")))
    rows = -(-ny // blocks)
    blocks = -(-ny // rows)
    spare, length = blocks * rows - ny, rows * width

    def flat(array: jax.Array, in_y: tuple[int, int], in_z: tuple[int, int]) -> jax.Array:
        planar = jnp.moveaxis(array, -1, 2)
        planar = planar.reshape(-1, *planar.shape[2:])
        return jnp.pad(planar, ((0, 0), (0, 0), in_y, in_z)).reshape(*planar.shape[:2], -1)

    slices = flat(volume, (1, 2 + spare), (1, 1))  # one more row, for the last two voxels of the last shift
    outputs = flat(gradient, (0, spare), (0, 2))

    def add_block(total: jax.Array, n: jax.Array) -> tuple[jax.Array, None]:
        x, first = n // blocks, n % blocks * length
        block = jax.lax.dynamic_slice(slices, (x, 0, first), (1, c, length + 2 * width + 2))[0]
        starts = [j * width + k for j in range(3) for k in range(3)]
        columns = jax.lax.dynamic_slice(outputs, (x + 2 * (x // nx), 0, first), (3, out, length))
        product = jax.lax.dot_general(
            jnp.concatenate([block[:, start : start + length] for start in starts]),
            columns.reshape(3 * out, length),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    total, _ = jax.lax.scan(add_block, jnp.zeros((9 * c, 3 * out), jnp.float32), jnp.arange(b * nx * blocks))
    return total
