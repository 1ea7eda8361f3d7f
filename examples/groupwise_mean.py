"""The mean of several scans: each is registered to the mean of all, which gets sharper, one program a round.

python examples/groupwise_mean.py
"""

import jax
import jax.numpy as jnp

from adregnet_jax import InstanceConfig, align, exponential, gaussian_filter, warp

SUBJECTS, SHAPE, SPACING_MM, ROUNDS = 4, (16, 16, 12), (2.0, 2.0, 2.5), 3
SETTINGS = InstanceConfig(
    factors=(2, 1), steps=(20, 20), strides=(2, 2), search_range_mm=0, ncc_window=5, smoothness=0.05
)


def make_subjects(key: jax.Array) -> jax.Array:
    """Scans [n, x, y, z, 1] of one anatomy, each in a shape of its own."""
    anatomy_key, shape_key = jax.random.split(key)
    anatomy = gaussian_filter(jax.random.normal(anatomy_key, (1, *SHAPE, 1)), 2.0)
    anatomy = (anatomy - anatomy.min()) / (anatomy.max() - anatomy.min())
    noise = jax.random.normal(shape_key, (SUBJECTS, *SHAPE, 3))
    return warp(jnp.repeat(anatomy, SUBJECTS, 0), exponential(12 * gaussian_filter(noise, 2.5)))


@jax.jit
def refine(mean: jax.Array, subjects: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sharper mean [x, y, z, 1], and the spread of the aligned scans about it."""

    def to_mean(subject: jax.Array) -> jax.Array:
        found = align(mean[None], subject[None], spacing_mm=SPACING_MM, config=SETTINGS)
        return found.warped[0]

    warped = jax.vmap(to_mean)(subjects)  # [n, x, y, z, 1]
    return warped.mean(axis=0), warped.std(axis=0).mean()


subjects = make_subjects(jax.random.key(0))
mean = subjects.mean(axis=0)
print(f"before   spread {subjects.std(axis=0).mean():.4f}")
for number in range(1, ROUNDS + 1):
    mean, spread = refine(mean, subjects)
    print(f"round {number}  spread {spread:.4f}")
