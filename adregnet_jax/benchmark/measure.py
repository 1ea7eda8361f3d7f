"""Compiles and times the parts of a network, the whole network and the training step."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from adregnet_jax.benchmark.flops import GRADIENTS
from adregnet_jax.benchmark.parts import Part, batch_shapes, loss_parts, network_parts, register_part
from adregnet_jax.benchmark.target import cpu_seconds, plan
from adregnet_jax.benchmark.timing import Route, Row, seconds_of, spread, time_in_turn
from adregnet_jax.config import Config
from adregnet_jax.errors import UserError
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.convolution import check_implementation
from adregnet_jax.training.memory import GIB, available_bytes, needed_bytes
from adregnet_jax.training.sharding import along_data, make_mesh, replicated
from adregnet_jax.training.state import TrainState, make_init
from adregnet_jax.training.step import make_optimiser, make_train_step

MATMUL_SIDE = {"cpu": 2048}
MATMUL_SIDE_ELSEWHERE = 8192
MIB = 2**20
MEMORY_ADVICE = (
    "--dtype bfloat16, --config.model.remat=True, and a smaller --shape or --batch take less; --memory-only"
    " prints the plan and runs nothing"
)


class Measurement(NamedTuple):
    """Settings of the measurements."""

    mesh: Mesh
    batch_size: int
    rounds: int  # 0: a single call
    peak_gflops: float | None  # GFLOP/s of a matrix product; None: nothing is run
    for_target: bool = False  # compiled for a card that isn't there


def measure(
    config: Config,
    shape: tuple[int, int, int],
    *,
    rounds: int,
    forward_only: bool,
    total_only: bool,
    memory_only: bool,
    target: Mesh | None = None,
) -> tuple[list[Row], Row]:
    """Measures a network and its parts; returns the rows of the table, and facts about the machine.

    Args:
        config: of the run.
        shape: of a scan, in voxels.
        rounds: of three calls each; 0 for a single call.
        forward_only: no gradients, and no training step.
        total_only: no parts.
        memory_only: compile, but run nothing.
        target: a card of `benchmark.target` to compile for, where nothing can be run, or None.

    Raises:
        UserError: settings that contradict each other.
    """
    config.check()
    check_implementation(config.model.convolution)
    if config.run.space_devices > 1:
        raise UserError(
            f"run.space_devices is {config.run.space_devices}, but parts are measured on whole volumes:"
            " set it to 1 (benchmarks/sharding.py measures the memory of divided volumes)"
        )
    accumulate, decay = config.optimiser.accumulate, config.optimiser.average_decay
    mesh = target or make_mesh(config.run.devices, config.optimiser.batch_size, accumulate=accumulate)
    model, optimiser = make_model(config.model), make_optimiser(config.optimiser, steps_per_epoch=1)
    init = make_init(model, optimiser, shape, mesh, averaged=decay > 0)
    key = jax.random.key(config.seed)
    plan_only = memory_only or target is not None
    state = jax.eval_shape(init, key) if plan_only else init(key)
    batch = batch_shapes(config, shape)
    peak = None if plan_only else matmul_gflops(mesh, rounds or 1)
    measurement = Measurement(mesh, config.optimiser.batch_size, rounds, peak, target is not None)

    parts = list(network_parts(config, state.params, batch))
    parts += [] if forward_only else loss_parts(config.loss, batch)
    flops = sum(part.flops or 0 for part in parts)
    rows: list[Row] = []
    sums: list[Row] = []
    if not total_only:
        rows, sums = rows_of_parts(parts, optimiser, state, measurement, forward_only=forward_only)
    whole = register_part(model, state.params, batch, flops=flops)
    rows += part_rows(whole, measurement, forward_only=True)
    if not forward_only:  # last, since it donates the memory of the state
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
    device_memory = (None if plan_only else mesh.devices.flat[0].memory_stats()) or {}  # None on CPU
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
    """Rows for the parts and the optimiser, and their sums if they were timed."""
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


def part_rows(part: Part, measurement: Measurement, *, forward_only: bool) -> list[Row]:
    """Rows for the forward pass, and for the forward pass with gradients of parameters and inputs."""
    on_all, along = PartitionSpec(), PartitionSpec("data")
    divided = functools.partial(jax.shard_map, mesh=measurement.mesh, check_vma=False)
    places = tuple(make(measurement.mesh) for make in (replicated, along_data, along_data, along_data))

    def with_gradients(params: Any, inputs: Any, constants: Any, cotangent: Any) -> Any:
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
    """Compiles a program, times it unless nothing is to be run, and returns its row.

    Args:
      name: name of the part.
      which: name of the pass.
      program: a jitted function.
      arguments: its arguments, arrays or shapes; shapes are filled with random numbers.
      flops: model FLOPs, or None.
      measurement: settings.
      repeat: makes a function without arguments from the compiled program and its arguments.
    """
    mesh, batch_size, rounds, peak_gflops, for_target = measurement
    began, used = time.perf_counter(), cpu_seconds()
    lowered = program.lower(*arguments)
    if for_target:
        traced = cpu_seconds() - used
        columns, compiled = plan(lowered)
        columns = {"part": name, "pass": which, "trace CPU s": round(traced, 2)} | columns
        return columns | _memory_columns(compiled)
    compiled = lowered.compile()
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
        _check_fits(f"{name}, {which}", compiled, mesh)
        filled = jax.device_put(fill(arguments, np.random.default_rng(0)), compiled.input_shardings[0])
        call = repeat(compiled, *filled)
        seconds = time_in_turn({name: call}, rounds)[name] if rounds else [seconds_of(call)]
    row |= time_columns(seconds, flops, batch_size, peak_gflops)
    return row | _memory_columns(compiled)


def _check_fits(name: str, compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Refuses a program whose plan takes more memory than is free."""
    devices = list(mesh.devices.flat)
    needed, available = needed_bytes(compiled), available_bytes(devices)
    memory = compiled.memory_analysis()
    if memory is None or needed is None or available is None:
        return
    needed += memory.argument_size_in_bytes
    if needed > available:
        raise UserError(
            f"{name}: takes {needed / GIB:.1f} GiB by its plan, and {available / GIB:.1f} GiB are free on"
            f" {devices[0].device_kind}: {MEMORY_ADVICE}"
        )


def _memory_columns(compiled: jax.stages.Compiled) -> Row:
    memory = compiled.memory_analysis()  # None if the platform doesn't support it
    return {
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
    """Sum of the medians and of the model FLOPs of the parts."""
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
    """GFLOP/s of a large float32 matrix product on all devices at the same time; the best of the rounds."""
    n = MATMUL_SIDE.get(mesh.devices.flat[0].platform, MATMUL_SIDE_ELSEWHERE)
    matrices = jax.device_put(np.full((mesh.size, n, n), 1 / n, np.float32), along_data(mesh))
    along = PartitionSpec("data")
    squares = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(along, along), out_specs=along)
    product = functools.partial(jax.jit(squares), matrices, matrices)
    seconds = min(time_in_turn({"matmul": product}, rounds)["matmul"])
    return mesh.size * 2 * n**3 / seconds / 1e9


def fill(arguments: Any, rng: np.random.Generator) -> Any:
    """Replaces shapes with arrays of random numbers, and keeps arrays.

    All numbers lie between 0.5 and 1, which suits intensities, masks, spacings and features, and makes
    displacements point between voxels. Labels are 0 or 1.
    """

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(0, 2, leaf.shape, leaf.dtype)
        return (0.5 + 0.5 * rng.random(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(draw, arguments)


def steps(train_step: Callable[..., Any], state: Any, batch: Any) -> Route:
    """A route that takes one training step per call, starting from the state after the last call."""

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, batch)  # the state is donated
        return metrics

    return step


def peak_rss_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _update(optimiser: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any) -> Any:
    updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _in_units(value: float | None, unit: float) -> float | None:
    """A value in a unit, rounded to four digits."""
    return None if value is None else float(f"{value / unit:.4g}")
