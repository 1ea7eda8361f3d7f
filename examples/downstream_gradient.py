"""The registration as a layer of another JAX program: a loss behind it, differentiated through it.

The moving scan has another contrast, intensity ** gamma. Which gamma makes the two scans alike after they are
registered? The registration itself depends on gamma; its steps of Adam are part of what is differentiated.

    python examples/downstream_gradient.py
"""

import jax
import jax.numpy as jnp

from adregnet_jax import InstanceConfig, align, identity_grid

SHAPE, SPACING_MM = (16, 16, 16), (1.5, 1.5, 2.0)
# No discrete search: it has no gradient. No tolerance: a while_loop has none either.
SETTINGS = InstanceConfig(
    factors=(1,), steps=(10,), strides=(3,), smoothness=0.3, search_range_mm=0, similarity="ssd"
)


def blob(centre: tuple[float, float, float]) -> jax.Array:
    """A smooth blob [b, x, y, z, 1] around a centre in voxels."""
    squared = jnp.sum((identity_grid(SHAPE) - jnp.array(centre)) ** 2, axis=-1)
    return jnp.exp(-squared / 30)[None, ..., None]


fixed = blob((8.0, 8.0, 7.0))
moving = blob((6.5, 8.5, 7.5)) ** 0.6  # what gamma has to undo


@jax.jit
@jax.value_and_grad
def downstream_loss(gamma: jax.Array) -> jax.Array:
    registered = align(fixed, moving**gamma, spacing_mm=SPACING_MM, config=SETTINGS)
    return jnp.mean((registered.warped - fixed) ** 2)


_, slope = downstream_loss(jnp.float32(1.0))
by_differences = (downstream_loss(jnp.float32(1.01))[0] - downstream_loss(jnp.float32(0.99))[0]) / 0.02
print(f"slope at gamma 1: {slope:.5f} by grad, {by_differences:.5f} by differences")

gamma = jnp.float32(1.0)
for _ in range(30):
    loss, slope = downstream_loss(gamma)
    gamma -= 20 * slope
print(f"gamma {gamma:.2f} (of 1 / 0.6 = 1.67), loss {loss:.6f}")
