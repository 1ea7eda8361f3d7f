"""Rematerialisation: activations of a module are recomputed for its gradient, and not earlier."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import delayed


def recomputed(module: nn.Module, *arguments: Any) -> Any:
    """Calls `module(*arguments)` so that its gradient keeps only the parameters and the arguments.

    With `nn.remat`, XLA for CPU may start to recompute long before the activations are needed, and the whole
    network is then in memory at once. Here, recomputing waits for the gradient of the result, and later
    operations wait for all gradients of the module.

    Args:
      module: a submodule that draws no random numbers.
      arguments: arrays, or None.
    """
    unbound = module.clone(parent=None, name=None)

    def forward(module: nn.Module, *arguments: Any) -> tuple[Any, Any]:
        return module(*arguments), (module.variables["params"], arguments)

    def backward(saved: Any, gradient: Any) -> tuple[Any, ...]:
        params, arguments = saved
        first = jax.tree.leaves(gradient)[0]
        params = jax.tree.map(lambda values: delayed(jnp.asarray(values), first), params)
        # Layers read large arguments chunk by chunk; a delay would copy them as a whole.
        limit = limit_bytes("recomputed_argument")
        arguments = jax.tree.map(lambda a: delayed(a, first) if 4 * a.size <= limit else a, arguments)
        apply = jax.vjp(lambda params, *a: unbound.apply({"params": params}, *a), params, *arguments)[1]
        to_params, *to_arguments = apply(gradient)
        leaves, tree = jax.tree.flatten(to_arguments)
        # Later operations need the gradients in the arguments. One of these waits for all other gradients, so
        # that nothing of this module is left to compute by then.
        smallest = min(range(len(leaves)), key=lambda n: leaves[n].size)
        others = [*jax.tree.leaves(to_params), *leaves[:smallest], *leaves[smallest + 1 :]]
        leaves[smallest] = delayed(leaves[smallest], *others)
        return {"params": to_params}, *jax.tree.unflatten(tree, leaves)

    return nn.custom_vjp(lambda module, *a: module(*a), forward, backward)(module, *arguments)
