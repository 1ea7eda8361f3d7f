"""How long does a network take at a size, part by part, how much does it compute, how much memory?

    python -m adregnet_jax.benchmark --config configs/phantom.py [--shape 64 48 48] [--batch 2]
        [--dtype bfloat16] [--devices 1] [--rounds 5 | --once] [--forward-only] [--total-only] [--memory-only]
        [--json FILE]

What isn't given is taken from the config, any field of which can be set as for `train.py`, for instance
--config.model.remat=True. A table is printed and, with --json, written as {"benchmark", "command", "machine",
"rows"}.

Rows. The parts are the modules of the network itself, at the shapes and with the parameters that they have in
it; further the warp, each term of the loss that is in use, and the optimiser. A part is timed forward, and
with the gradients in its parameters and inputs. "total" is the network and the warp of the moving image, and
the whole training step of `train.py`. "sum of parts" has the medians added up. It lacks the concatenations
and sums between the parts and, with `model.remat`, of which the parts know nothing, a second forward pass; a
part that the total fuses with its neighbours, or runs beside another, is cheaper there. Scans and features
are random numbers, parameters those of a new network: times don't depend on the values.

Columns.
- model GFLOP: convolutions, dense layers and attention, counted from shapes, three times the forward pass
  where there are gradients (`adregnet_jax.benchmark.flops`). This is the figure to quote.
- XLA GFLOP: what XLA says of the compiled program. It has every operation, but the body of a loop once
  however often it runs: attention, and on CPU the kernel gradients of convolutions, are loops, of which it
  sees a small part. What is padding is not in it.
- compile s: tracing and compiling, nothing from a cache.
- pairs/s: the pairs of the batch over the median.
- of peak %: model GFLOP over the median, as a share of what the same devices reach in a large float32 matrix
  product in the same run (at JAX's default precision, which is TF32 on newer GPUs).
- arguments and temporary MiB: memory of one device, by XLA's own account. Results come in addition, where
  they don't take the memory of an argument as the state of a training step does.

The batch is divided over the devices as in training, for the parts as well. --memory-only compiles and runs
nothing: what a large scan would take can be asked on a small machine, and no array of its size is made.
--once calls each program a single time, the first, where a call takes minutes. The last line has the peak
memory of this whole process, compilation included, and of the device where it tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from adregnet_jax.benchmark.flops import GRADIENTS, Call, module_calls
from adregnet_jax.benchmark.timing import Route, Row, report, seconds_of, spread, time_in_turn
from adregnet_jax.config import Config, DataConfig, LossConfig
from adregnet_jax.errors import OneLineParser, UserError
from adregnet_jax.launch import config_file, process
from adregnet_jax.losses import total_loss
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.convolution import check_implementation
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import warp
from adregnet_jax.training.sharding import along_data, make_mesh, replicated
from adregnet_jax.training.state import TrainState, make_init
from adregnet_jax.training.step import make_optimiser, make_train_step

LANDMARKS = 300  # a pair, where their loss is in use
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
MATMUL_SIDE = {"cpu": 2048}
MATMUL_SIDE_ELSEWHERE = 8192
MIB = 2**20


class Part(NamedTuple):
    """`function(params, inputs, constants)` and the shapes of its arguments, or arrays."""

    name: str
    function: Callable[..., Any]
    params: Any  # on every device
    inputs: Any  # divided along the batch, their first axis, as are the results
    constants: Any = ()  # likewise; without gradients
    flops: int | None = None  # of the forward pass
    in_forward: bool = True  # whether a registration takes it, or only training
    paths: tuple[tuple[str, ...], ...] = ()  # of its modules in the network


class Measurement(NamedTuple):
    """How programs are measured."""

    mesh: Mesh
    batch_size: int
    rounds: int  # 0: a single call
    peak_gflops: float | None  # a second; None: nothing is run


def measure(
    config: Config,
    shape: tuple[int, int, int],
    *,
    rounds: int,
    forward_only: bool,
    total_only: bool,
    memory_only: bool,
) -> tuple[list[Row], Row]:
    """The rows of the table, and what was found of the machine.

    Raises:
        UserError: settings that don't go together.
    """
    config.check()
    check_implementation(config.model.convolution)
    if config.run.space_devices > 1:
        raise UserError(
            f"run.space_devices is {config.run.space_devices}, and parts are measured on whole volumes:"
            " set it to 1 (benchmarks/sharding.py has the memory of volumes that devices share)"
        )
    accumulate, decay = config.optimiser.accumulate, config.optimiser.average_decay
    mesh = make_mesh(config.run.devices, config.optimiser.batch_size, accumulate=accumulate)
    model, optimiser = make_model(config.model), make_optimiser(config.optimiser, steps_per_epoch=1)
    init = make_init(model, optimiser, shape, mesh, averaged=decay > 0)
    key = jax.random.key(config.seed)
    state = jax.eval_shape(init, key) if memory_only else init(key)
    batch = batch_shapes(config, shape)
    peak = None if memory_only else matmul_gflops(mesh, rounds or 1)
    measurement = Measurement(mesh, config.optimiser.batch_size, rounds, peak)

    parts = list(network_parts(config, state.params, batch))
    parts += [] if forward_only else loss_parts(config.loss, batch)
    flops = sum(part.flops or 0 for part in parts)
    rows: list[Row] = []
    sums: list[Row] = []
    if not total_only:
        rows, sums = rows_of_parts(parts, optimiser, state, measurement, forward_only=forward_only)
    register = functools.partial(_register, model)
    whole = Part("total", register, state.params, (), _images(batch), flops)
    rows += part_rows(whole, measurement, forward_only=True)
    if not forward_only:  # last of all: it takes the memory of the state
        step = make_train_step(
            model,
            optimiser,
            config.loss,
            mesh,
            seed=config.seed,
            accumulate=accumulate,
            average_decay=decay,
        )
        batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=along_data(mesh))
            for name, leaf in batch.items()
        }
        of_step = (1 + GRADIENTS) * flops
        rows.append(measured("total", "training step", step, (state, batch), of_step, measurement, steps))
    device_memory = mesh.devices.flat[0].memory_stats() or {}  # None on CPU
    device_peak = device_memory.get("peak_bytes_in_use")
    return rows + sums, {
        "devices": mesh.size,
        "matmul GFLOP/s": peak and round(peak, 1),
        "peak of the device MiB": device_peak and round(device_peak / MIB),
        "peak of the process MiB": round(peak_rss_bytes() / MIB),
    }


def rows_of_parts(
    parts: Sequence[Part],
    optimiser: optax.GradientTransformation,
    state: TrainState,
    measurement: Measurement,
    *,
    forward_only: bool,
) -> tuple[list[Row], list[Row]]:
    """The rows of the parts and of the optimiser, and their sums where they were timed."""
    rows = [row for part in parts for row in part_rows(part, measurement, forward_only=forward_only)]
    if not forward_only:
        update = jax.jit(functools.partial(_update, optimiser), in_shardings=replicated(measurement.mesh))
        arguments = (_shapes(state.params), state.opt_state, state.params)
        rows.append(measured("optimiser", "update", update, arguments, None, measurement))
    if measurement.peak_gflops is None:
        return rows, []
    names = {part.name for part in parts if part.in_forward}
    of_forward = [row for row in rows if row["pass"] == "forward" and row["part"] in names]
    sums = [sum_row(of_forward, "forward", measurement)]
    if not forward_only:
        of_training = [row for row in rows if row["pass"] != "forward"]
        sums.append(sum_row(of_training, "training step", measurement))
    return rows, sums


def network_parts(config: Config, params: Any, batch: dict[str, Any]) -> Iterator[Part]:
    """The modules of the network at the shapes of the batch, and what its levels do between them."""
    # What is computed again in the backward pass is a matter of the whole network.
    model = make_model(dataclasses.replace(config.model, remat=False))
    images = _images(batch)
    calls = module_calls(model, *images)
    of_part: dict[str, list[Call]] = {}
    for call in calls:
        # Modules that hold the parameters of another one are called with nothing.
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
    """Of the part that a module belongs to, by its path in the network."""
    if not path[0].startswith("level_"):
        named = {"backbone": "backbone", "ascent": "ascent", "ascent_context": "ascent"}
        return named.get(path[0], "layers")
    kinds = {"cross_attention": "cross-attention", "regional_attention": "regional attention"}
    return f"{kinds.get(path[1], 'field synthesis')}, level {path[0].removeprefix('level_')}"


def loss_parts(config: LossConfig, batch: dict[str, Any]) -> Iterator[Part]:
    """Each term of the loss that is in use, alone."""
    image = batch["moving"]
    displacement = jax.ShapeDtypeStruct((*image.shape[:-1], 3), jnp.float32)
    _, in_use = jax.eval_shape(functools.partial(total_loss, config=config), batch, displacement, image)
    for term in (term for term in LOSS_TERMS if term in in_use):
        others: dict[str, Any] = {other: 0.0 for other in LOSS_TERMS if other != term}
        function = functools.partial(_loss, dataclasses.replace(config, **others))
        yield Part(f"loss: {term}", function, (), (displacement, image), batch, in_forward=False)


def part_rows(part: Part, measurement: Measurement, *, forward_only: bool) -> list[Row]:
    """The forward pass, and the same with the gradients in parameters and inputs."""
    on_all, along = PartitionSpec(), PartitionSpec("data")
    divided = functools.partial(jax.shard_map, mesh=measurement.mesh, check_vma=False)
    places = tuple(make(measurement.mesh) for make in (replicated, along_data, along_data, along_data))

    def with_gradients(params, inputs, constants, cotangent):
        result, pull_back = jax.vjp(lambda *both: part.function(*both, constants), params, inputs)
        in_params, in_inputs = pull_back(cotangent)
        return result, jax.lax.pmean(in_params, "data"), in_inputs

    forward = divided(part.function, in_specs=(on_all, along, along), out_specs=along)
    program = jax.jit(forward, in_shardings=places[:3])
    arguments: tuple[Any, ...] = (part.params, part.inputs, part.constants)
    rows = [measured(part.name, "forward", program, arguments, part.flops, measurement)]
    if not forward_only:
        both = divided(
            with_gradients, in_specs=(on_all, along, along, along), out_specs=(along, on_all, along)
        )
        program = jax.jit(both, in_shardings=places)
        flops = None if part.flops is None else (1 + GRADIENTS) * part.flops
        arguments = (*arguments, jax.eval_shape(forward, *arguments))
        rows.append(measured(part.name, "forward + gradients", program, arguments, flops, measurement))
    return rows


def measured(
    name: str,
    which: str,
    program: Any,
    arguments: tuple[Any, ...],
    flops: int | None,
    measurement: Measurement,
    repeat: Callable[..., Route] = functools.partial,
) -> Row:
    """One row: `program` compiled, and unless nothing is to be run, timed.

    Args:
      name: of the part.
      which: of its passes.
      program: jitted.
      arguments: its own, arrays or shapes; the shapes are filled with random numbers.
      flops: of the model, or None.
      measurement: how.
      repeat: makes a call of nothing from the compiled program and its arguments.
    """
    mesh, batch_size, rounds, peak_gflops = measurement
    began = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compilation = time.perf_counter() - began
    of_one_device = (compiled.cost_analysis() or {}).get("flops")
    row: Row = {
        "part": name,
        "pass": which,
        "model GFLOP": _in_units(flops, 1e9),
        "XLA GFLOP": _in_units(of_one_device and of_one_device * mesh.size, 1e9),
        "compile s": round(compilation, 2),
    }
    seconds = None
    if peak_gflops is not None:
        filled = jax.device_put(fill(arguments, np.random.default_rng(0)), compiled.input_shardings[0])
        call = repeat(compiled, *filled)
        seconds = time_in_turn({name: call}, rounds)[name] if rounds else [seconds_of(call)]
    row |= time_columns(seconds, flops, batch_size, peak_gflops)
    memory = compiled.memory_analysis()  # None where the platform gives none
    return row | {
        "arguments MiB": memory and _in_units(memory.argument_size_in_bytes, MIB),
        "temporary MiB": memory and _in_units(memory.temp_size_in_bytes, MIB),
    }


def time_columns(
    seconds: Sequence[float] | None, flops: int | None, batch_size: int, peak_gflops: float | None
) -> Row:
    if seconds is None or peak_gflops is None:
        return dict.fromkeys(("median ms", "min ms", "max ms", "pairs/s", "of peak %"))
    median = statistics.median(seconds)
    return spread(seconds, "ms") | {
        "pairs/s": _in_units(batch_size / median, 1),
        "of peak %": None if flops is None else round(100 * flops / median / 1e9 / peak_gflops, 1),
    }


def sum_row(rows: Sequence[Row], which: str, measurement: Measurement) -> Row:
    """The medians and the model FLOPs of the parts, added up."""
    medians: list[Any] = [row["median ms"] for row in rows]
    gflop: list[Any] = [row["model GFLOP"] or 0 for row in rows]
    return dict.fromkeys(rows[0]) | {
        "part": "sum of parts",
        "pass": which,
        "model GFLOP": _in_units(sum(gflop), 1),
        "median ms": round(sum(medians), 3),
        "pairs/s": _in_units(1e3 * measurement.batch_size / sum(medians), 1),
    }


def matmul_gflops(mesh: Mesh, rounds: int) -> float:
    """GFLOP/s of a large float32 matrix product on each device at the same time, at best."""
    n = MATMUL_SIDE.get(mesh.devices.flat[0].platform, MATMUL_SIDE_ELSEWHERE)
    matrices = jax.device_put(np.full((mesh.size, n, n), 1 / n, np.float32), along_data(mesh))
    along = PartitionSpec("data")
    squares = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(along, along), out_specs=along)
    product = functools.partial(jax.jit(squares), matrices, matrices)
    seconds = min(time_in_turn({"matmul": product}, rounds)["matmul"])
    return mesh.size * 2 * n**3 / seconds / 1e9


def batch_shapes(config: Config, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What `data.pipeline.collate` makes of pairs of that shape."""
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


def fill(arguments: Any, rng: np.random.Generator) -> Any:
    """Random numbers for shapes; arrays stay.

    All lie between 0.5 and 1, which will do for intensities, masks and spacings as for features, and for a
    displacement is a motion between voxels. Labels are 0 or 1.
    """

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(0, 2, leaf.shape, leaf.dtype)
        return (0.5 + 0.5 * rng.random(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(draw, arguments)


def steps(train_step, state, batch) -> Route:
    """A training step a call, each from the state that the one before it left."""

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)  # the state is donated
        return metrics

    return step


def peak_rss_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _call_modules(modules: Sequence[nn.Module], params, inputs, _constants):
    return [
        module.apply({"params": own}, *arguments)
        for module, own, arguments in zip(modules, params, inputs, strict=True)
    ]


def _align(_params, inputs, _constants, *, with_features):
    """What a `Level` does before it matches, each time that it refines."""
    results = []
    for moving, coarser in inputs:
        start = resize_displacement(coarser, moving.shape[1:4])
        results.append((start, warp(moving, jax.lax.stop_gradient(start)) if with_features else None))
    return results


def _warp(_params, displacement, moving):
    return warp(moving, resize_displacement(displacement, moving.shape[1:4]))


def _loss(config, _params, inputs, batch):
    displacement, warped = inputs
    return total_loss(batch, displacement, warped, config)[0][None]  # one number a device


def _register(model, params, _inputs, images):
    fixed, moving = images
    displacement = model.apply({"params": params}, fixed, moving).displacement
    return displacement, warp(moving, displacement)


def _update(optimiser, gradients, opt_state, params):
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _images(batch):
    return batch["fixed"], batch["moving"]


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _at(path, params):
    """The parameters of the module of that path; empty where it has none."""
    for name in path:
        params = params.get(name, {})
    return params


def _is_of_a_part(path) -> bool:
    return bool(path) and len(path) == (2 if path[0].startswith("level_") else 1)


def _is_inside(call: Call, outer: Call) -> bool:
    return call.path[: len(outer.path)] == outer.path


def _in_units(value, unit):
    """Four digits."""
    return None if value is None else float(f"{value / unit:.4g}")


def parse(argv: Sequence[str]) -> tuple[Config, tuple[int, int, int], argparse.Namespace]:
    """The config, with all that the command line says of it; the shape; and the options."""
    parser = OneLineParser(
        prog="python -m adregnet_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="as of train.py")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels of a scan")
    parser.add_argument("--batch", type=int, metavar="N", help="pairs: config.optimiser.batch_size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="config.model.dtype")
    parser.add_argument("--devices", type=int, metavar="N", help="config.run.devices")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of three calls each (default 5)")
    parser.add_argument("--once", action="store_true", help="a single call each")
    parser.add_argument("--forward-only", action="store_true", help="without gradients and training step")
    parser.add_argument("--total-only", action="store_true", help="without the parts")
    parser.add_argument("--memory-only", action="store_true", help="compile, and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    options, rest = parser.parse_known_args(argv)
    config = config_file.override(config_file.load_config(options.config), rest)
    config.optimiser.batch_size = _given(options.batch, config.optimiser.batch_size)
    config.run.devices = _given(options.devices, config.run.devices)
    config.model.dtype = options.dtype or config.model.dtype
    shape = tuple(options.shape or data_shape(config.data))
    if min(shape) < 2:
        raise UserError(f"--shape is {shape}: a scan has two voxels or more along each axis")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}: it must be at least 1")
    if options.json and options.json.is_dir():
        raise UserError(f"--json {options.json} is a folder; expected the name of a file")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}: make it first")
    return config, shape, options


def data_shape(config: DataConfig) -> tuple[int, int, int]:
    """Of the scans that the config trains on."""
    match config.kind:
        case "phantom":
            return config.phantom.shape
        case "synthetic":
            return config.synthetic.shape
        case "dirlab":
            return config.dirlab.shape
        case "ixi":
            return config.ixi.shape
    raise UserError(f"--shape is missing: data of kind {config.kind!r} has none in the config, so give one")


def _given(option, otherwise):
    return otherwise if option is None else option


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config, shape, options = parse(sys.argv[1:] if argv is None else argv)
        process.keep_freed_memory()
        process.use_every_core(config.optimiser.batch_size)
        # What is compiled here is timed: nothing is to come from a disk.
        jax.config.update("jax_enable_compilation_cache", False)
        rows, found = measure(
            config,
            shape,
            rounds=0 if options.once else options.rounds,
            forward_only=options.forward_only,
            total_only=options.total_only,
            memory_only=options.memory_only,
        )
        size = " x ".join(map(str, shape))
        about = {"shape": size, "batch": config.optimiser.batch_size, "dtype": config.model.dtype}
        about |= {"convolution": config.model.convolution} | found
        report(rows, options.json, about)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
