"""The registration as bytes that JAX runs elsewhere, without this package."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.export
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from adregnet_jax.config import InstanceConfig
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.registration.instance import align
from adregnet_jax.registration.network import register
from adregnet_jax.registration.scans import preset_scale, scale_lengths


def export_register(
    shape: tuple[int, int, int],
    spacing_mm: Sequence[float],
    *,
    model: nn.Module | None = None,
    params: PyTree[AnyArray] = None,
    instance: InstanceConfig | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
) -> bytes:
    """Exports the registration of pairs on one grid as a program, with the network's parameters inside.

    Args:
      shape: (x, y, z) of the scans.
      spacing_mm: three numbers, of the grid.
      model: the network; None: instance optimisation alone.
      params: parameters of `model`.
      instance: settings of the instance optimisation; None: the network alone.
      platforms: where the program is to run: "cpu", "cuda", "rocm", "tpu".

    Returns:
      The program, a function of fixed and moving [b, x, y, z, 1], float32 in [0, 1], for any b. It gives the
      displacement [b, x, y, z, 3] in voxels and the warped moving images [b, x, y, z, 1].

    Raises:
      ValueError: neither a network nor instance optimisation, or settings that make no sense.

    Examples:
      >>> Path("register.bin").write_bytes(export_register(
      ...     (160, 192, 224), (1, 1, 1), instance=InstanceConfig()))

      Elsewhere, with nothing but JAX (and flatbuffers):

      >>> program = jax.export.deserialize(Path("register.bin").read_bytes())
      >>> displacement, warped = jax.jit(program.call)(fixed, moving)
    """
    if instance is not None:
        scale = preset_scale(spacing_mm)
        instance, spacing_mm = scale_lengths(instance, scale), [scale * size for size in spacing_mm]
    if model is not None:
        one_batch = functools.partial(
            register, params, model=model, instance=instance, spacing_mm=tuple(spacing_mm)
        )
    elif instance is not None:
        one_batch = functools.partial(align, spacing_mm=tuple(spacing_mm), config=instance)
    else:
        raise ValueError("expected a model, instance settings or both, got neither")

    def one_pair(
        fixed: Float[Array, "x y z 1"], moving: Float[Array, "x y z 1"]
    ) -> tuple[Float[Array, "x y z 3"], Float[Array, "x y z 1"]]:
        registration = one_batch(fixed[None], moving[None])
        return registration.displacement[0], registration.warped[0]

    # The batch is a symbol, which Python can't count with: pairs are traced one by one.
    batch = jax.export.symbolic_shape("b")
    scan = jax.ShapeDtypeStruct((*batch, *shape, 1), jnp.float32)
    program = jax.export.export(jax.jit(jax.vmap(one_pair)), platforms=tuple(platforms))(scan, scan)
    return bytes(program.serialize())
