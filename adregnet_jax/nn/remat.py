"""Modules whose inside is computed again for its gradient, instead of being kept, and not before that."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import delayed


def recomputed(module: nn.Module, *arguments: Any) -> Any:
    """`module(*arguments)`, of which a gradient keeps the parameters and the arguments alone.

    As `nn.remat`, whose second computation XLA on CPU is free to begin long before its results are needed:
    the whole network is then in memory at once. Here it waits for the gradient of the result, and what comes
    after waits for all that it gives.

    Args:
      module: one of a parent, without random numbers of its own.
      arguments: arrays, or None.
    """
    unbound = module.clone(parent=None, name=None)

    def forward(module, *arguments):
        return module(*arguments), (module.variables["params"], arguments)

    def backward(saved, gradient):
        params, arguments = saved
        first = jax.tree.leaves(gradient)[0]
        params = jax.tree.map(lambda values: delayed(values, first), params)
        # Large arguments go chunk by chunk through the layers, and would be copied to wait.
        limit = limit_bytes("recomputed_argument")
        arguments = jax.tree.map(lambda a: delayed(a, first) if 4 * a.size <= limit else a, arguments)
        apply = jax.vjp(lambda params, *a: unbound.apply({"params": params}, *a), params, *arguments)[1]
        to_params, *to_arguments = apply(gradient)
        leaves, tree = jax.tree.flatten(to_arguments)
        # What comes after needs the gradients in the arguments: they wait for the others, so that nothing of
        # this module is left over by then. It is enough that one does.
        smallest = min(range(len(leaves)), key=lambda n: leaves[n].size)
        others = [*jax.tree.leaves(to_params), *leaves[:smallest], *leaves[smallest + 1 :]]
        leaves[smallest] = delayed(leaves[smallest], *others)
        return {"params": to_params}, *jax.tree.unflatten(tree, leaves)

    return nn.custom_vjp(lambda module, *a: module(*a), forward, backward)(module, *arguments)
