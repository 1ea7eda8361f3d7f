"""Modules whose inside is computed again for its gradient, instead of being kept, and not before that."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def recomputed(module: nn.Module, *arguments: Any) -> Any:
    """`module(*arguments)`, of which a gradient keeps the parameters and the arguments alone.

    As `nn.remat`, whose second computation XLA on CPU is free to begin long before its results are needed:
    the whole network is then in memory at once. Here its parameters wait for the gradient of the result.

    Args:
      module: one of a parent, without random numbers of its own.
      arguments: arrays, or None.
    """
    unbound = module.clone(parent=None, name=None)

    def forward(module, *arguments):
        return module(*arguments), (module.variables["params"], arguments)

    def backward(saved, gradient):
        params, arguments = saved
        # A sum with nothing, which XLA can't know, since infinity times 0 isn't nothing.
        nothing = 0 * jax.tree.leaves(gradient)[0].ravel()[0]
        params = jax.tree.map(lambda values: values + nothing.astype(values.dtype), params)
        apply = jax.vjp(lambda params, *a: unbound.apply({"params": params}, *a), params, *arguments)[1]
        to_params, *to_arguments = apply(gradient)
        return {"params": to_params}, *to_arguments

    return nn.custom_vjp(lambda module, *a: module(*a), forward, backward)(module, *arguments)
