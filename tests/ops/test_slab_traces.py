"""What JAX traced of whole volumes doesn't serve slabs, nor the other way round, however it was traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from adregnet_jax.nn.remat import recomputed
from adregnet_jax.ops.slabs import SPACE, slab_axis, slab_count, slab_start

WHOLE = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)


def scaled(slab):
    """Each voxel times its place in the whole volume and the number of slabs: wrong wherever a trace is."""
    return slab * (slab_start(slab.shape[1]) + jnp.arange(1.0, 1 + slab.shape[1]) + 10 * slab_count())[None]


def scan_body(slab, _):
    return scaled(slab), None


def loop_body(_, slab):
    return scaled(slab)


@jax.custom_vjp
def with_backward_rule(slab):
    return scaled(slab)


with_backward_rule.defvjp(
    lambda slab: (scaled(slab), None),
    lambda _, gradient: (scaled(gradient),),
)


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, slab):
        return scaled(slab) * self.param("scale", nn.initializers.ones, ())


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, slab):
        return recomputed(Scaled(name="inner"), slab)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, slab):
        return nn.remat(Scaled)(name="inner")(slab)


def applied(module):
    return lambda slab: module.apply({"params": {"inner": {"scale": jnp.ones(())}}}, slab)


WAYS = {
    "plain": scaled,
    "loop": lambda slab: jax.lax.fori_loop(0, 1, loop_body, slab),
    "scan": lambda slab: jax.lax.scan(scan_body, slab, length=1)[0],
    "branch": lambda slab: jax.lax.cond(True, scaled, jnp.zeros_like, slab),
    "checkpoint": jax.checkpoint(scaled),
    "backward rule": with_backward_rule,
    "recomputed module": applied(Recomputed()),
    "remat module": applied(Remat()),
}


def on_slabs(function, devices):
    """Of slabs that so many devices have; of the whole volume, outside of any mesh, with 0."""
    if not devices:
        return function(WHOLE)
    mesh = jax.make_mesh((devices,), (SPACE,), (AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec(None, SPACE)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(WHOLE)


@pytest.mark.parametrize("order", [(0, 2, 4, 1, 0), (4, 0, 2, 4)], ids=["whole first", "slabs first"])
@pytest.mark.parametrize("way", WAYS)
def test_a_function_looks_anew_for_slabs(way, order):
    function = jax.jit(WAYS[way])
    gradient = jax.jit(jax.grad(lambda slab: jnp.sum(function(slab))))
    for devices in order:
        factor = np.arange(1.0, 9)[None] + 10 * max(devices, 1)
        np.testing.assert_allclose(on_slabs(function, devices), factor * WHOLE, rtol=1e-6)
        np.testing.assert_allclose(on_slabs(gradient, devices), factor, rtol=1e-6)


def test_only_a_divided_manual_axis_makes_slabs():
    found = []

    def look(slab):
        found.append(slab_axis())
        return slab

    on_slabs(look, 0)
    on_slabs(look, 1)
    on_slabs(look, 2)
    other = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    jax.shard_map(look, mesh=other, in_specs=PartitionSpec(), out_specs=PartitionSpec())(WHOLE)
    with jax.set_mesh(jax.make_mesh((2,), (SPACE,), (AxisType.Auto,), devices=jax.devices()[:2])):
        jax.jit(look)(WHOLE)  # the partitioner divides what this sees as whole
    assert found == [None, None, SPACE, None, None]
