"""Compares the speed of the network with the same one in PyTorch, forward and in training.

    python benchmarks/against_torch.py [--shape 64 64 64] [--channels 16 32 64 128 256] [--rounds 5] [--parts]
        [--torch-compile] [--onednn] [--json FILE]

The default network and its default loss except landmarks (local NCC, smoothness, folds), float32, on one pair
of the phantom; a training step is loss, gradients, clipping and Adam. PyTorch gets the same parameters and as
many threads as cores. `benchmarks/torch_adregnet.py` describes its implementation, which takes the fastest of
the available ways. It computes neither the entropy of the match, which no loss reads, nor the mask, which our
loss applies. Contiguous and channels-last volumes are separate routes; with --torch-compile both are also
compiled by TorchInductor, which needs a C++ compiler. Its Adam is the fused one. With --onednn our
convolutions are oneDNN's, as PyTorch's are (`ops.cpu.onednn`).

Before timing, our displacement, warped image and loss are checked against those of PyTorch's model in
float64, with all parameters nonzero. A difference of more than 1e-4 of the largest displacement, intensity or
loss is refused, and so are gradients that differ by more than 1e-2 of the norm of the gradient of that
parameter, for up to 64^3 voxels with 16 channels (float64 needs too much memory beyond). PyTorch's float32
outputs must agree to 1e-2: its group norm of channels-last volumes subtracts the squared mean from the mean
of squares, which loses more digits the more voxels there are. The last line has the error of each route's
displacement as a fraction of the largest.

Prints a row for each pass and route. "times ours" is PyTorch's median over ours: above 1, ours is faster.
--parts adds the modules of the network, the warp and the terms of the loss one by one, with the gradients of
their parameters and inputs, on random features; their results are checked. Without PyTorch only ours is
timed. The package doesn't depend on it: pip install torch --index-url https://download.pytorch.org/whl/cpu
"""

import dataclasses
import math
from typing import Any

import comparison
import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.benchmark.measure import fill, steps
from adregnet_jax.benchmark.parts import loss_parts, network_parts
from adregnet_jax.config import Config, LossConfig, ModelConfig, OptimiserConfig, PhantomConfig
from adregnet_jax.data.datasets.phantom import phantom_pair
from adregnet_jax.data.pipeline import collate
from adregnet_jax.launch import process
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.nn.cross_attention import Match
from adregnet_jax.ops.sampling import warp
from adregnet_jax.training.sharding import along_data, make_mesh, replicated
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import make_optimiser, make_train_step, registration_loss

PASSES = ("forward", "training step")
TERMS = ("ncc", "smoothness", "jacobian")  # of the loss
SPREAD = 0.1  # of the noise added to the initial parameters, in SDs of a variance-preserving kernel


def everywhere_not_zero(params):
    """Adds random numbers to the initial parameters, so that no bias or gradient escapes comparison."""
    rng = np.random.default_rng(0)

    def moved(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return np.float32(leaf + SPREAD * rng.normal(size=leaf.shape) / fan_in**0.5)

    return jax.tree.map(moved, params)


def ours(config, state, batch, mesh):
    """The forward pass and the training step."""
    model = AdRegNet(config.model)

    @jax.jit
    def forward(params, fixed, moving):
        prediction: Any = model.apply({"params": params}, fixed, moving)
        return prediction.displacement, warp(moving, prediction.displacement)

    params = jax.tree.map(jnp.copy, state.params)  # those of the state are donated to the training step
    optimiser = make_optimiser(config.optimiser, steps_per_epoch=1)
    train_step = make_train_step(model, optimiser, config.loss, mesh)
    return (
        lambda: forward(params, batch["fixed"], batch["moving"]),
        steps(train_step, state, batch),
    )


def our_results(config, params, batch):
    """Displacement and warped image, loss, and gradients."""

    def loss_of(params, batch):
        loss, (_, displacement) = registration_loss(AdRegNet(config.model), config.loss, params, batch)
        return loss, (displacement, warp(batch["moving"], displacement))

    with_gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, outputs), gradients = jax.device_get(with_gradients(params, batch))
    return outputs, loss, gradients


def exact(torch, config, params, batch, *, with_gradients):
    """Displacement, warped image and loss of PyTorch in float64; gradients, or None."""
    import torch_adregnet

    torch.set_default_dtype(torch.float64)
    try:
        model = torch_adregnet.AdRegNet(config.model)
        torch_adregnet.load(model, params)
        names = ("fixed", "moving", "spacing_mm")
        fixed, moving, spacing_mm = (to_torch(torch, batch[n], torch.contiguous_format) for n in names)
        with torch.set_grad_enabled(with_gradients):
            displacement = model(fixed, moving)
            warped = torch_adregnet.warp(moving, displacement)
            loss = torch_adregnet.total_loss(fixed, warped, displacement, spacing_mm, config.loss)
        if with_gradients:
            loss.backward()
        outputs = from_torch(displacement), from_torch(warped), loss.item()
        return outputs, gradients_of(torch, model) if with_gradients else None
    finally:
        torch.set_default_dtype(torch.float32)


def gradients_of(torch, model):
    # Parameters that no output depends on have a gradient of zeros in JAX, and none here.
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def theirs(torch, config, params, batch, memory_format, *, compiled, autocast=False):
    """Like `ours` for PyTorch; also returns the displacement, the warped image and the loss.

    It uses PyTorch's default device. With `autocast`, the network runs in bfloat16 by PyTorch's rules.
    """
    import torch_adregnet

    model = torch_adregnet.AdRegNet(config.model)
    torch_adregnet.load(model, params)
    model.to(memory_format=memory_format)
    fixed, moving = (to_torch(torch, batch[name], memory_format) for name in ("fixed", "moving"))
    spacing_mm = to_torch(torch, batch["spacing_mm"], memory_format)
    settings = config.optimiser
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)

    def register(fixed, moving):
        with torch.autocast(fixed.device.type, torch.bfloat16, enabled=autocast):
            displacement = model(fixed, moving)
        displacement = displacement.float()
        return displacement, torch_adregnet.warp(moving, displacement)

    def loss_of(fixed, moving):
        displacement, warped = register(fixed, moving)
        loss = torch_adregnet.total_loss(fixed, warped, displacement, spacing_mm, config.loss)
        return loss, displacement, warped

    if compiled:
        register, loss_of = torch.compile(register), torch.compile(loss_of)

    def forward():
        with torch.no_grad():
            return register(fixed, moving)

    def train_step():
        optimiser.zero_grad(set_to_none=True)
        loss, _, _ = loss_of(fixed, moving)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimiser.step()
        return loss.detach()

    with torch.no_grad():
        loss, *outputs = loss_of(fixed, moving)
    return (forward, train_step), (*map(from_torch, outputs), loss.item())


def check_gradients(ours, exact):
    """Compares gradients given by the name of the parameter in PyTorch.

    Norms are compared, since rounding changes the sign of some activations, and with it all gradients of a
    coarse channel.
    """
    # A gradient that is 0 except for rounding, such as that of a constant added to all logits of a softmax,
    # has no correct digits.
    rounding = 1e-5 * max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in exact.items():
        off = float((ours[name] - gradient).norm())
        if off > 1e-2 * float(gradient.norm()) + rounding:
            raise AssertionError(f"{name}: the gradients differ by {off} of {float(gradient.norm())}")


def named(torch, config, gradients):
    """Our gradients by the name of the parameter in PyTorch."""
    import torch_adregnet

    holder = torch_adregnet.AdRegNet(config.model)  # with gradients in the place of parameters
    for parameter in holder.parameters():
        parameter.data.zero_()
    torch_adregnet.load(holder, gradients)
    return {name: parameter.detach() for name, parameter in holder.named_parameters()}


def share_off(wanted, found):
    """The error of a displacement as a fraction of the largest."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def to_torch(torch, array, memory_format):
    """[b, x, y, z, c] -> [b, c, x, y, z]; other arrays as they are."""
    tensor = torch.tensor(np.asarray(array), dtype=torch.get_default_dtype())
    if tensor.ndim != 5:
        return tensor
    return tensor.permute(0, 4, 1, 2, 3).contiguous(memory_format=memory_format)


def from_torch(tensor):
    tensor = tensor.detach()
    return (tensor.permute(0, 2, 3, 4, 1) if tensor.ndim == 5 else tensor).cpu().numpy()


def part_routes(torch, config, part, params, batch):
    """Routes of one part, as `comparison.compare` takes them, checked against each other."""
    rng = np.random.default_rng(0)
    inputs, constants = fill((part.inputs, part.constants), rng)

    def function(constants, params, inputs):
        results = part.function(params, inputs, constants)
        # Values left out of the results aren't computed; PyTorch computes no entropy either.
        is_match = lambda result: isinstance(result, Match)  # noqa: E731
        return jax.tree.map(lambda r: r[:2] if is_match(r) else r, results, is_leaf=is_match)

    result = jax.eval_shape(function, constants, part.params, inputs)
    cotangent = fill(result, rng)
    routes = {"adregnet_jax": comparison.jax_routes(function, (part.params, inputs), cotangent, (constants,))}
    for name, memory_format in memory_formats(torch).items():
        arguments = (inputs, constants, cotangent)
        routes[name] = torch_part_routes(torch, config, part, params, batch, arguments, memory_format)
    comparison.check_equal(*(forward() for forward, _ in routes.values()))
    return routes


def torch_part_routes(torch, config, part, params, batch, arguments, memory_format):
    """Like `comparison.jax_routes`; the results of the forward pass have the axis order of ours."""
    import torch_adregnet

    model = torch_adregnet.AdRegNet(config.model)
    torch_adregnet.load(model, params)
    model.to(memory_format=memory_format)
    inputs, constants, cotangent = jax.tree.map(
        lambda array: to_torch(torch, array, memory_format), arguments
    )
    modules = [model.get_submodule(".".join(path)) for path in part.paths]
    spacing_mm = torch.tensor(np.asarray(batch["spacing_mm"]))

    def results():
        if modules:
            return [module(*own) for module, own in zip(modules, inputs, strict=True)]
        if part.name.startswith("alignment"):
            return [torch_adregnet.align(*own) for own in inputs]
        if part.name == "warp":
            displacement = torch_adregnet.resize_displacement(inputs, constants.shape[2:])
            return torch_adregnet.warp(constants, displacement)
        displacement, warped = inputs
        alone = only(config.loss, part.name.removeprefix("loss: "))
        return torch_adregnet.total_loss(constants["fixed"], warped, displacement, spacing_mm, alone)

    leaves = [tensor.requires_grad_() for tensor in jax.tree.leaves(inputs)]
    leaves += [parameter for module in modules for parameter in module.parameters()]

    def forward():
        with torch.no_grad():
            return jax.tree.map(from_torch, results())

    def with_gradients():
        outputs = jax.tree.leaves(results())
        weights = [w.reshape(o.shape) for w, o in zip(jax.tree.leaves(cotangent), outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    return forward, with_gradients


def only(config, term):
    """`config` with a single one of its enabled terms."""
    return dataclasses.replace(config, **{name: 0.0 for name in TERMS if name != term})


def memory_formats(torch):
    if torch is None:
        return {}
    return {"PyTorch": torch.contiguous_format, "PyTorch, channels last": torch.channels_last_3d}


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), metavar=("X", "Y", "Z"))
    parser.add_argument("--channels", type=int, nargs="+", default=(16, 32, 64, 128, 256))
    parser.add_argument("--parts", action="store_true", help="each part of the network, too")
    parser.add_argument("--torch-compile", action="store_true", help="PyTorch compiled, too")
    parser.add_argument("--onednn", action="store_true", help="ours with the convolution of oneDNN")
    options = parser.parse_args()
    multiple = 2 ** (len(options.channels) - 1)
    if any(n % multiple for n in options.shape):
        parser.error(f"--shape must be multiples of {multiple}, with {len(options.channels)} levels")
    process.keep_freed_memory()  # as train.py does, for both
    torch = comparison.torch_on_cpu()
    convolution = "onednn" if options.onednn else "auto"
    config = Config(
        model=ModelConfig(channels=tuple(options.channels), convolution=convolution),
        loss=LossConfig(landmark=0.0),
        optimiser=OptimiserConfig(),
    )
    mesh = make_mesh(devices=1, batch_size=1)
    optimiser = make_optimiser(config.optimiser, steps_per_epoch=1)
    shape = tuple(options.shape)
    state = make_init(AdRegNet(config.model), optimiser, shape, mesh)(jax.random.key(0))
    params = everywhere_not_zero(state.params)
    state = jax.device_put(state.replace(params=params), replicated(mesh))
    batch = jax.device_put(collate([phantom_pair(PhantomConfig(shape=shape), 0)]), along_data(mesh))

    routes = {"adregnet_jax": ours(config, state, batch, mesh)}
    off = {}
    if torch:
        small = math.prod(shape) * options.channels[0] <= 64**3 * 16
        wanted, exact_gradients = exact(torch, config, params, batch, with_gradients=small)
        outputs, loss, gradients = our_results(config, params, batch)
        comparison.check_equal(wanted, (*outputs, loss), tolerance=1e-4)
        if small:
            check_gradients(named(torch, config, gradients), exact_gradients)
        else:
            print("gradients of this size are not checked\n")
        off["adregnet_jax"] = share_off(wanted[0], outputs[0])
    for name, memory_format in memory_formats(torch).items():
        for compiled in (False, True) if options.torch_compile else (False,):
            route, found = theirs(torch, config, params, batch, memory_format, compiled=compiled)
            comparison.check_equal(wanted, found, tolerance=1e-2)
            route_name = name + ", compiled" * compiled
            routes[route_name], off[route_name] = route, share_off(wanted[0], found[0])
    rows = comparison.compare({"part": "whole"}, routes, options.rounds, PASSES)
    if options.parts:
        losses = loss_parts(config.loss, batch)
        for part in (*network_parts(config, params, batch), *losses):
            of_part = part_routes(torch, config, part, params, batch)
            rows += comparison.compare({"part": part.name}, of_part, options.rounds)
    about = {f"off by {name}": f"{share:.1e}" for name, share in off.items()}
    comparison.report(rows, options.json, about)


if __name__ == "__main__":
    main()
