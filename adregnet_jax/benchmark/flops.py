"""Model FLOPs of a network, counted from the shapes of its layers.

Counted are the convolutions, the dense layers and the two products of every attention, queries with keys and
weights with values: two operations, a multiplication and an addition, for each pair of numbers that meet.
Voxels at the border count as any other, though some of their neighbours are padding. Not counted is all that
grows with the number of values alone: norms, activations, softmax, positions in attention, resampling, warps.

The count depends on the equations, not on the program that carries them out: two implementations of the same
network have the same one, which makes their rates comparable. (One exception: VoxelMorph's convolutions of
stride 2 count in full, as `nn.voxelmorph` computes them.) By the usual convention a training step takes
three times as many: the gradients in the inputs and in the weights are one such product each, and what is
computed twice to save memory is counted once (Chowdhery et al., PaLM, appendix B).
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

GRADIENTS = 2  # products of a training step for each one of the forward pass


class Call(NamedTuple):
    """A module as a network calls it."""

    path: tuple[str, ...]
    module: nn.Module  # without its parameters
    arguments: tuple[Any, ...]  # jax.ShapeDtypeStruct, or None
    flops: int  # forward, of its own products: those of the modules inside it are in their own calls


def module_calls(network: nn.Module, *inputs: Any) -> list[Call]:
    """Every module that `network(*inputs)` calls, the inner ones first; nothing is computed.

    Args:
      network: without `remat`, whose modules belong to a transformation.
      inputs: arrays or shapes, `jax.ShapeDtypeStruct`.
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
            # Queries, keys and values of both images; with one map for queries and keys one of these less.
            projections = 4 if config.shared_projection else 6
            return projections * 2 * b * voxels * c**2 + 2 * _attention_flops(b, voxels, keys, c)
        case RegionalAttention(region=region):
            regions = math.prod(-(-n // region) for n in shape)
            return _attention_flops(b, regions, regions, c)
    return 0


def _attention_flops(b: int, queries: int, keys: int, channels: int) -> int:
    """Queries with keys, then weights with values; heads divide the channels and change nothing."""
    return b * queries * keys * 2 * (channels + channels)
