"""The operations without any network: warp an image, compose two fields, count the folds.

python examples/ops_alone.py
"""

import jax
import jax.numpy as jnp

import adregnet_jax as adr

SHAPE = (24, 20, 16)

# A ball, [b, x, y, z, c].
grid = adr.identity_grid(SHAPE)  # [x, y, z, 3] voxels
centre = (jnp.array(SHAPE) - 1) / 2
ball = (jnp.linalg.norm(grid - centre, axis=-1) < 6).astype(jnp.float32)[None, ..., None]

# Two displacements in voxels, [b, x, y, z, 3]: warped(p) = moving(p + u(p)).
shift = jnp.broadcast_to(jnp.array([2.5, 0.0, 0.0]), (1, *SHAPE, 3))
velocity = 0.5 * jnp.sin(2 * jnp.pi * grid / jnp.array(SHAPE))[None]
flow = adr.exponential(velocity)  # without folds, whatever the velocity's size

# One warp by the composition is both warps, one after the other, but for one interpolation less.
once = adr.warp(ball, adr.compose(shift, flow))
twice = adr.warp(adr.warp(ball, shift), flow)
print(f"difference of one warp and two: {jnp.abs(once - twice).mean():.4f}")

back = adr.invert(flow)
residual = jnp.linalg.norm(adr.compose(flow, back), axis=-1)[:, 2:-2, 2:-2, 2:-2]
print(f"there and back again: {residual.max():.4f} voxels off at most")

determinant = adr.jacobian_determinant(flow)
print(f"volume ratio {determinant.min():.2f} to {determinant.max():.2f}")
print(f"folded volume: {100 * float(adr.folded_volume(flow)[0]):.3f} %")

# All of it goes under grad: which shift along axis 0 brings the ball back?
step = jax.grad(lambda x: jnp.mean((adr.warp(once, -x * shift) - ball) ** 2))(0.0)
print(f"slope of the squared difference along the way back: {step:.4f}")
