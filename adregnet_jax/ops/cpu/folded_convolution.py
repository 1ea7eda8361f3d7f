"""The 3x3x3 convolution on CPU, made of operations that XLA is fast at."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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

_ONE_PRODUCT_VOXELS = 1024  # up to which a kernel gradient is one product
_EIGEN_CHANNELS = 4  # from how many input channels on Eigen on all cores beats YNNPACK on one


@jax.custom_vjp
def folded_conv3d(parts: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """`conv3d` of a tuple of volumes.

    XLA's 3-D convolution on CPU is slow, so the taps along x become output channels of one 2-D convolution
    over (y, z), and three of its slices, shifted along x, are added, of large volumes a group of slices at a
    time. The gradient in the kernel is a sum of matrix products, each of a few rows of voxels.
    """
    b, nx, ny, nz, _ = parts[0].shape
    c, out = kernel.shape[-2:]
    # XLA for CPU makes float32 of what it convolves.
    columns = 3 * out + (c if parts[0].dtype == jnp.bfloat16 else 0)
    slice_bytes = 4 * ny * nz * columns
    if b * nx * slice_bytes > limit_bytes("folded_sum"):
        slices = slices_a_chunk(parts[0].shape, slice_bytes, limit_bytes("folded_group"))
        slices = slices or nx  # a single large slice
        return _folded_by_groups(parts, kernel, slices)
    before, here, after = _planes(joined(parts), kernel)
    return here + _pad_in_x(before[:, :-1], 1, 0) + _pad_in_x(after[:, 1:], 0, 1)


def _folded_by_groups(parts, kernel, slices):
    """As `folded_conv3d`, `slices` slices at a time, each of which is convolved once.

    What a group's first slice adds to the slice before it goes there at once, what its last one adds to the
    slice after it is handed on.
    """
    b, nx, ny, nz, _ = parts[0].shape
    out, dtype = kernel.shape[-1], jnp.result_type(*parts)

    def add_group(n, carry):
        written, handed_on = carry
        volume = joined([chunk(part, n, slices) for part in parts])
        before, here, after = (planes[0] for planes in _planes(volume, kernel))
        inside = n % (nx // slices) > 0  # else a volume of the batch begins here
        first = jnp.where(inside, handed_on, 0)[None]
        group = (
            here
            + jnp.concatenate([first, before[:-1]])
            + jnp.pad(after[1:], ((0, 1), (0, 0), (0, 0), (0, 0)))
        )
        last = jnp.maximum(n * slices - 1, 0)  # of the group before; at first, what is overwritten below
        corrected = from_bits(jax.lax.dynamic_index_in_dim(written, last, keepdims=False), dtype)
        corrected = corrected + jnp.where(inside, after[0], 0)
        written = jax.lax.dynamic_update_index_in_dim(written, to_bits(corrected), last, 0)
        return jax.lax.dynamic_update_slice_in_dim(written, to_bits(group), n * slices, 0), before[-1]

    start = to_bits(zeros_after((b * nx, ny, nz, out), dtype, *parts, kernel))
    nothing = zeros_after((ny, nz, out), dtype, *parts, kernel)
    written, _ = jax.lax.fori_loop(0, b * nx // slices, add_group, (start, nothing))
    return from_bits(written, dtype).reshape(b, nx, ny, nz, out)


def _planes(volume, kernel):
    """What each slice of [b, x, y, z, c] adds to the one after it, to itself and to the one before it."""
    b, nx, ny, nz, c = volume.shape
    out = kernel.shape[-1]
    # [y taps, z taps, c, x taps * out]
    taps = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(3, 3, c, 3 * out)
    # XLA hands a convolution whose result is no larger than its input to YNNPACK, which runs on one core. A
    # column too many, cut off again, leaves it to Eigen, which runs on all; with few channels one is faster.
    spare = int(c >= _EIGEN_CHANNELS)
    slices = jax.lax.conv_general_dilated(
        volume.reshape(b * nx, ny, nz, c),
        taps,
        (1, 1),
        ((1, 1), (1, 1 + spare)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[:, :, :nz].reshape(b, nx, ny, nz, 3 * out)
    return tuple(slices[..., n * out : (n + 1) * out] for n in range(3))


def _pad_in_x(slices, before, after):
    """Zeros before and after: a padding joins the sum that it feeds, an update of a slice would not."""
    return jnp.pad(slices, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))


def _folded_backward(saved, gradient):
    parts, kernel = saved
    to_kernel = _kernel_gradient(parts, gradient).astype(kernel.dtype)
    # Only the optimiser waits for the gradient in the kernel: XLA would put it off, and keep the parts.
    mirrored = delayed(jnp.flip(kernel, (0, 1, 2)), to_kernel)
    own = taps_of_parts(mirrored, parts)
    return tuple(folded_conv3d((gradient,), taps.swapaxes(3, 4)) for taps in own), to_kernel


folded_conv3d.defvjp(lambda parts, kernel: (folded_conv3d(parts, kernel), (parts, kernel)), _folded_backward)


def _kernel_gradient(parts, gradient):
    b, nx, ny, nz, _ = parts[0].shape
    c, out = sum(part.shape[-1] for part in parts), gradient.shape[-1]
    slices = slices_a_chunk(gradient.shape, 4 * ny * nz * (c + out), limit_bytes("folded_gradient"))
    if slices is None:  # XLA would make the planes of the parts in the forward pass, and keep them
        return _chunk_kernel_gradient(delayed(joined(parts), gradient), _pad_in_x(gradient, 1, 1))

    def add_chunk(n, total):
        volume = joined([chunk(part, n, slices) for part in parts])
        return total + _chunk_kernel_gradient(volume, chunk(gradient, n, slices, halo=1))

    zeros = jnp.zeros((3, 3, 3, c, out), jnp.float32)
    return jax.lax.fori_loop(0, b * nx // slices, add_chunk, zeros)


def _chunk_kernel_gradient(volume, gradient):
    """Of a chunk, whose gradient has a slice more on either side.

    It is a product of nine copies of the volume, shifted in y and z, by three of the gradient, shifted in x.
    The tap i of slice x meets the output slice x + 1 - i, which is x + 2 - i with the slice more: so the
    three are in the order of 2 - i.
    """
    b, nx, ny, nz, c = volume.shape
    out = gradient.shape[-1]
    few = b * nx * ny * nz <= _ONE_PRODUCT_VOXELS
    total = (_one_product if few else _sum_of_products)(volume, gradient)
    return jnp.transpose(total.reshape(3, 3, c, 3, out)[:, :, :, ::-1], (3, 0, 1, 2, 4))


def _one_product(volume, gradient):
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


def _sum_of_products(volume, gradient):
    """A few rows of voxels at a time, planar and flat: [slice, c, y * z], with a voxel of zeros around.

    So a shift in y and z is another place to begin at, and a copy is one long run of memory; what runs over
    the end of a row meets zeros of the gradient. Rows of a few voxels waste a share on these.
    """
    b, nx, ny, nz, c = volume.shape
    out, width = gradient.shape[-1], nz + 2
    copies_bytes = 9 * 4 * c * ny * width  # of one slice, float32
    blocks = max(1, round(copies_bytes / limit_bytes("folded_gradient_rows")))
    rows = -(-ny // blocks)
    blocks = -(-ny // rows)
    spare, length = blocks * rows - ny, rows * width

    def flat(array, in_y, in_z):
        planar = jnp.moveaxis(array, -1, 2)
        planar = planar.reshape(-1, *planar.shape[2:])
        return jnp.pad(planar, ((0, 0), (0, 0), in_y, in_z)).reshape(*planar.shape[:2], -1)

    slices = flat(volume, (1, 2 + spare), (1, 1))  # a row more, for the last two voxels of the last shift
    outputs = flat(gradient, (0, spare), (0, 2))

    def add_block(total, n):
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
