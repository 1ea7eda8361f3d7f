"""Functions of whole volumes and of slabs, compared: values and gradients."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from adregnet_jax.ops.slabs import SPACE


def spec(array):
    """Volumes in slabs along x, everything else on each device."""
    return PartitionSpec(None, SPACE) if np.ndim(array) >= 4 else PartitionSpec()


def in_slabs(function, devices, *arguments):
    """`function(*arguments)` of volumes that are divided among devices."""
    mesh = jax.make_mesh((devices,), (SPACE,), (AxisType.Auto,), devices=jax.devices()[:devices])
    results = jax.eval_shape(function, *arguments)
    divided = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(argument) for argument in arguments),
        out_specs=jax.tree.map(spec, results),
        check_vma=False,
    )
    return divided(*arguments)


def check_slabs(function, devices, *arguments, differentiable=(), rtol=1e-5):
    """`function` of slabs gives what it gives of whole volumes, and so do its gradients.

    `differentiable` are the places of the arguments in which gradients are taken, of a random sum of all
    results. Sums are in another order: `rtol` is of the largest value of each array.
    """

    def with_gradients(run):
        def weighted(*varied):
            placed = list(arguments)
            for place, value in zip(differentiable, varied, strict=True):
                placed[place] = value
            results = run(*placed)
            rng = np.random.default_rng(0)
            weights = [rng.normal(size=x.shape).astype(np.float32) for x in jax.tree.leaves(results)]
            return sum((w * x).sum() for w, x in zip(weights, jax.tree.leaves(results), strict=True)), results

        if not differentiable:
            return jax.jit(run)(*arguments)
        order = tuple(range(len(differentiable)))
        gradient = jax.jit(jax.grad(weighted, argnums=order, has_aux=True))
        return gradient(*(arguments[place] for place in differentiable))

    expected = with_gradients(function)
    found = with_gradients(functools.partial(in_slabs, function, devices))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-30))
