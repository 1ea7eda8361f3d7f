"""The parts of a network and of its training, each as a function with the shapes of its arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from adregnet_jax.benchmark.flops import Call, module_calls
from adregnet_jax.config import Config, LossConfig
from adregnet_jax.losses import total_loss
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import warp

LANDMARKS = 300  # per pair, if their loss is in use
LOSS_TERMS = (  # fields of `LossConfig`, and names of `total_loss`
    "ncc",
    "ssim",
    "mind",
    "mutual_information",
    "smoothness",
    "jacobian",
    "bending",
    "landmark",
    "field",
    "dice",
)
Shapes = dict[str, Any]  # of a batch: jax.ShapeDtypeStruct by name


class Part(NamedTuple):
    """A part of a registration or training step: `function(params, inputs, constants)`.

    The arguments are arrays, or their shapes.
    """

    name: str
    function: Callable[..., Any]
    params: Any  # the same on every device
    inputs: Any  # divided over the devices along the first axis, as are the results
    constants: Any = ()  # divided like the inputs; no gradients
    flops: int | None = None  # model FLOPs of the forward pass
    in_forward: bool = True  # False: only training needs it
    paths: tuple[tuple[str, ...], ...] = ()  # paths of its modules in the network


def network_parts(config: Config, params: Any, batch: Shapes) -> Iterator[Part]:
    """The modules of the network for the shapes of a batch, the alignment of its levels, and the warp."""
    # Rematerialisation concerns the whole network, not its parts.
    model = make_model(dataclasses.replace(config.model, remat=False))
    images = _images(batch)
    calls = module_calls(model, *images)
    of_part: dict[str, list[Call]] = {}
    for call in calls:
        # Modules that only hold the parameters of another one are called without arguments.
        if _is_of_a_part(call.path) and call.arguments and _at(call.path, params):
            of_part.setdefault(part_name(call.path), []).append(call)
    for name, members in of_part.items():
        yield Part(
            name,
            functools.partial(_call_modules, [call.module for call in members]),
            [_at(call.path, params) for call in members],
            [call.arguments for call in members],
            flops=sum(call.flops for call in calls if any(_is_inside(call, member) for member in members)),
            paths=tuple(call.path for call in members),
        )
    aligned: dict[str, list[tuple[Any, ...]]] = {}
    for call in calls:
        if len(call.path) == 1 and call.path[0].startswith("level_") and call.arguments[2] is not None:
            aligned.setdefault(call.path[0].removeprefix("level_"), []).append(call.arguments[1:])
    align = functools.partial(_align, with_features=config.model.align_features)
    for level, inputs in aligned.items():
        yield Part(f"alignment, level {level}", align, (), inputs)
    prediction = jax.eval_shape(model.apply, {"params": params}, *images)
    yield Part("warp", _warp, (), prediction.pyramid[-1], images[1])


def part_name(path: tuple[str, ...]) -> str:
    """Name of the part that a module belongs to, from its path in the network."""
    if not path[0].startswith("level_"):
        named = {"backbone": "backbone", "ascent": "ascent", "ascent_context": "ascent"}
        return named.get(path[0], "layers")
    kinds = {"cross_attention": "cross-attention", "regional_attention": "regional attention"}
    return f"{kinds.get(path[1], 'field synthesis')}, level {path[0].removeprefix('level_')}"


def loss_parts(config: LossConfig, batch: Shapes) -> Iterator[Part]:
    """Each term of the loss in use, on its own."""
    image = batch["moving"]
    displacement = jax.ShapeDtypeStruct((*image.shape[:-1], 3), jnp.float32)
    _, in_use = jax.eval_shape(functools.partial(total_loss, config=config), batch, displacement, image)
    for term in (term for term in LOSS_TERMS if term in in_use):
        others: dict[str, Any] = {other: 0.0 for other in LOSS_TERMS if other != term}
        function = functools.partial(_loss, dataclasses.replace(config, **others))
        yield Part(f"loss: {term}", function, (), (displacement, image), batch, in_forward=False)


def register_part(model: nn.Module, params: Any, batch: Shapes, *, flops: int) -> Part:
    """The whole network and the warp of the moving image."""
    return Part("total", functools.partial(_register, model), params, (), _images(batch), flops)


def batch_shapes(config: Config, shape: tuple[int, int, int]) -> Shapes:
    """Shapes of a batch of pairs of that shape, as `data.pipeline.collate` returns it."""
    b, n = config.optimiser.batch_size, LANDMARKS if config.loss.landmark else 1
    shapes = dict.fromkeys(("fixed", "moving", "mask"), (b, *shape, 1)) | {
        "spacing_mm": (b, 3),
        "fixed_landmarks": (b, n, 3),
        "moving_landmarks": (b, n, 3),
        "landmark_valid": (b, n),
    }
    batch = {name: jax.ShapeDtypeStruct(sizes, jnp.float32) for name, sizes in shapes.items()}
    if config.loss.dice:
        labels = jax.ShapeDtypeStruct((b, *shape, 1), jnp.int32)
        batch |= {"fixed_labels": labels, "moving_labels": labels}
    if config.loss.field:
        batch["displacement"] = jax.ShapeDtypeStruct((b, *shape, 3), jnp.float32)
    if config.data.kind == "synthetic":
        batch["same_contrast"] = jax.ShapeDtypeStruct((b,), jnp.float32)
    return batch


def _call_modules(modules: Sequence[nn.Module], params: Any, inputs: Any, _constants: Any) -> Any:
    return [
        module.apply({"params": own}, *arguments)
        for module, own, arguments in zip(modules, params, inputs, strict=True)
    ]


def _align(_params: Any, inputs: Any, _constants: Any, *, with_features: bool) -> Any:
    """Resizes the displacement and warps the features, as a `Level` does before each match."""
    results = []
    for moving, coarser in inputs:
        start = resize_displacement(coarser, moving.shape[1:4])
        results.append((start, warp(moving, jax.lax.stop_gradient(start)) if with_features else None))
    return results


def _warp(_params: Any, displacement: jax.Array, moving: jax.Array) -> jax.Array:
    return warp(moving, resize_displacement(displacement, moving.shape[1:4]))


def _loss(config: LossConfig, _params: Any, inputs: Any, batch: Any) -> jax.Array:
    displacement, warped = inputs
    return total_loss(batch, displacement, warped, config)[0][None]  # one number per device


def _register(model: nn.Module, params: Any, _inputs: Any, images: Any) -> tuple[jax.Array, jax.Array]:
    fixed, moving = images
    displacement = cast(Prediction, model.apply({"params": params}, fixed, moving)).displacement
    return displacement, warp(moving, displacement)


def _images(batch: Shapes) -> tuple[Any, Any]:
    return batch["fixed"], batch["moving"]


def _at(path: tuple[str, ...], params: Any) -> Any:
    """The parameters of the module with that path; empty if it has none."""
    for name in path:
        params = params.get(name, {})
    return params


def _is_of_a_part(path: tuple[str, ...]) -> bool:
    return bool(path) and len(path) == (2 if path[0].startswith("level_") else 1)


def _is_inside(call: Call, outer: Call) -> bool:
    return call.path[: len(outer.path)] == outer.path
