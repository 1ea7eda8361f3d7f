"""Model FLOPs of a network, counted from the shapes of its layers.

The count covers convolutions, dense layers and the two products of every attention, queries with keys and
weights with values, as two operations (a multiplication and an addition) per product of two numbers. Voxels
at the border count like any other, though some of their neighbours are padding. Operations that only grow
with the number of values are not counted: norms, activations, softmax, positions in attention, resampling,
warps.

The count depends on the equations, not on the program that evaluates them: two implementations of the same
network have the same count, which makes their rates comparable. (One exception: VoxelMorph's convolutions of
stride 2 count in full, as `nn.voxelmorph` computes them.) By the usual convention a training step takes
three times as many: the gradients with respect to inputs and weights are one such product each, and values
recomputed to save memory are counted once (Chowdhery et al., PaLM, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.linen.module import InterceptorContext

from adregnet_jax.nn.cross_attention import CrossAttention
from adregnet_jax.nn.layers import Conv, Downsample, JoinedDense, Upsample
from adregnet_jax.nn.regional_attention import RegionalAttention

GRADIENTS = 2  # additional products in a training step for each one in the forward pass


class Call(NamedTuple):
    """A call of a module by a network."""

    path: tuple[str, ...]
    module: nn.Module  # without its parameters
    arguments: tuple[Any, ...]  # jax.ShapeDtypeStruct, or None
    flops: int  # forward, without those of inner modules, which have their own calls


def module_calls(network: nn.Module, *inputs: Any) -> list[Call]:
    """Every module that `network(*inputs)` calls, inner ones first, found without computing anything.

    Args:
      network: a network without `remat`, which would wrap its modules in a transformation.
      inputs: arrays or shapes (`jax.ShapeDtypeStruct`).
    """
    calls = []

    def record(
        call_module: Callable[..., Any], arguments: Any, named_arguments: Any, context: InterceptorContext
    ) -> Any:
        result = call_module(*arguments, **named_arguments)
        if context.method_name == "__call__":
            module = context.module
            shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
            calls.append(Call(module.path, module.clone(parent=None), shapes, own_flops(module, shapes)))
        return result

    with nn.intercept_methods(record):
        jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return calls


def model_flops(network: nn.Module, *inputs: Any) -> int:
    """Model FLOPs of one forward pass."""
    return sum(call.flops for call in module_calls(network, *inputs))


def own_flops(module: nn.Module, arguments: tuple[Any, ...]) -> int:
    """Model FLOPs of a layer or of the products of an attention; 0 for other modules."""
    if not isinstance(
        module, Conv | nn.Dense | JoinedDense | Downsample | Upsample | CrossAttention | RegionalAttention
    ):
        return 0
    b, *shape, c = arguments[0].shape
    if isinstance(module, Conv | JoinedDense):
        c = sum(argument.shape[-1] for argument in arguments)
    match module:
        case Downsample():  # eight voxels to one
            return 2 * b * math.prod(shape) * c * module.features
        case Upsample():  # one to eight
            return 2 * b * math.prod(shape) * c * 8 * module.features
        case Conv():
            return 2 * 27 * b * math.prod(shape) * c * module.features
        case nn.Dense() | JoinedDense():
            return 2 * b * math.prod(shape) * c * module.features
        case CrossAttention(config=config):
            voxels = math.prod(shape)
            exact = voxels <= config.global_attention_tokens
            keys = voxels if exact else (2 * config.neighbourhood_radius + 1) ** 3
            # Queries, keys and values of both images; one less if queries and keys share a map.
            projections = 4 if config.shared_projection else 6
            return projections * 2 * b * voxels * c**2 + 2 * _attention_flops(b, voxels, keys, c)
        case RegionalAttention(region=region):
            regions = math.prod(-(-n // region) for n in shape)
            return 3 * 2 * b * regions * c**2 + _attention_flops(b, regions, regions, c)
    return 0


def _attention_flops(b: int, queries: int, keys: int, channels: int) -> int:
    """Queries with keys, then weights with values; heads divide the channels and don't change the count."""
    return b * queries * keys * 2 * (channels + channels)
