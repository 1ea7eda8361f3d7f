"""Checks results and measures speed on a GPU, in at most eight minutes.

    python benchmarks/gpu.py --output FOLDER [--parts agreement speed ...] [--minutes 8]
        [--fixed FILE --moving FILE] [--dry-run]

FOLDER/gpu.json has one row per result and is written anew after each, so that a stop loses nothing; rows are
printed as they come. Every part runs in a process of its own, whose time is limited, and which may crash; its
messages are in FOLDER/PART.log. The parts, in this order:

- machine: the card, its memory, versions.
- reference, agreement: `agreement.py` on the CPU, then on the card.
- speed: forward pass and training step of the full-width network (channels 32 to 512), one pair of 128^3
  voxels in bfloat16: ms, seconds of tracing and compiling, memory of the plan, and the most memory in use.
- torch: the same in PyTorch (`torch_adregnet.py`), with autocast, contiguous and channels last.
- register: `adregnet register` in a fresh process with an empty cache, in another one with that cache, and a
  second call in a third process; then convexAdam on the same scans. A smooth random scan of 160 x 192 x 224
  voxels and the same one moved by two voxels, unless --fixed and --moving name files.
- synthesis: synthetic pairs of 64^3 voxels a second, 32 at once (`adregnet_jax.synthesise`).
- profile: three training steps of `speed`; the trace is in FOLDER/profile, the kernels that take longest are
  rows.
- speed-small: as speed, with 64^3 voxels, in float32 and in TF32.
- torch-compile: as torch, by TorchInductor.
- speed-large: as speed, with 160 x 192 x 224 voxels and `remat`.

The machine needs the package with the extra `cuda12` or `cuda13`; PyTorch and convexAdam are left out where
they aren't installed. A part that fails, or for which no time is left, is a row that says so. With --dry-run
all but the last three parts run on the CPU, at sizes without meaning. The exit status is 0 if every part
finished and all results agree, 1 if not, and 2 without a GPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import numpy as np

from adregnet_jax.atomic import write_file
from adregnet_jax.benchmark.timing import command_line

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = (32, 64, 128, 256, 512)
LEAST_SECONDS = 5  # a part with less time left is not started
KERNELS = 12  # in the table of the profile


class Part(NamedTuple):
    """A part: its function, the most seconds it may take, and whether JAX leaves the card to PyTorch."""

    function: Callable[[argparse.Namespace], None]
    limit_s: float
    on_cpu: bool = False


def say(**row):
    """Gives a row of the result to the parent process."""
    print(json.dumps(row), flush=True)


def machine(options):
    import jax

    from adregnet_jax.benchmark.timing import machine as found

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    say(**found(), platform=device.platform, memory_gib=limit and round(limit / 2**30, 1))


def reference(options):
    import agreement

    agreement.write(options.output / "reference.npz", options.dry_run)
    say(case="results of the CPU are stored")


def agree(options):
    import agreement

    from adregnet_jax.ops.cpu import budget

    form = budget.override(platform="gpu") if options.dry_run else contextlib.nullcontext()
    with form:
        for row in agreement.compare(options.output / "reference.npz", options.dry_run):
            say(**row)


def configured(options, size, dtype, **model):
    """The config of the network that is timed, and the shape of the scans."""
    from adregnet_jax.config import Config, LossConfig, ModelConfig, OptimiserConfig

    shape = (16, 16, 16) if options.dry_run else size
    config = Config(
        model=ModelConfig(channels=(2, 3) if options.dry_run else CHANNELS, dtype=dtype, **model),
        loss=LossConfig(landmark=0.0),
        optimiser=OptimiserConfig(),
    )
    return config, shape


def state_and_programs(config, shape):
    """The state of a training with random parameters, the shapes of a batch, and the jitted step."""
    import agreement
    import jax

    from adregnet_jax.benchmark.parts import batch_shapes
    from adregnet_jax.nn.models import make_model
    from adregnet_jax.training.sharding import along_data, make_mesh
    from adregnet_jax.training.state import make_init
    from adregnet_jax.training.step import make_optimiser, make_train_step

    mesh = make_mesh(devices=1, batch_size=1)
    model, optimiser = make_model(config.model), make_optimiser(config.optimiser, steps_per_epoch=1)
    batch = batch_shapes(config, shape)
    state = jax.eval_shape(make_init(model, optimiser, shape, mesh), jax.random.key(0))
    # Without the program that draws them: it is not what is measured.
    params = agreement.draw_parameters(model, batch["fixed"], batch["moving"])
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state).replace(params=params)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=along_data(mesh))
        for name, leaf in batch.items()
    }
    return mesh, model, state, batch, make_train_step(model, optimiser, config.loss, mesh)


def speed(options, size=(128, 128, 128), dtypes=("bfloat16",), **model_fields):
    import jax

    from adregnet_jax.benchmark import measure
    from adregnet_jax.benchmark.flops import GRADIENTS, model_flops
    from adregnet_jax.benchmark.parts import register_part
    from adregnet_jax.nn.models import make_model

    peak = None
    for dtype in dtypes:
        config, shape = configured(options, size, dtype, **model_fields)
        mesh, model, state, batch, step = state_and_programs(config, shape)
        peak = peak or measure.matmul_gflops(mesh, 1)
        plain = make_model(dataclasses.replace(config.model, remat=False))
        flops = model_flops(plain, batch["fixed"], batch["moving"])
        settings = measure.Measurement(mesh, 1, options.rounds, peak)
        about = {"shape": " x ".join(map(str, shape)), "dtype": dtype}

        def report(row, about=about):
            used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            del row["part"]
            say(case="adregnet_jax", **about, **row, most_in_use_MiB=used and round(used / 2**20))

        whole = register_part(model, state.params, batch, flops=flops)
        for row in measure.part_rows(whole, settings, forward_only=True):
            report(row)
        of_step = (1 + GRADIENTS) * flops
        arguments = (state, batch)
        report(measure.measured("total", "training step", step, arguments, of_step, settings, measure.steps))


def torch_speed(options, compiled=False, size=(128, 128, 128)):
    if not _installed("torch"):
        return
    import against_torch
    import torch

    from adregnet_jax.benchmark.measure import fill

    on_card = torch.cuda.is_available() and not options.dry_run
    torch.set_default_device("cuda" if on_card else "cpu")
    if not (on_card or options.dry_run):
        say(case="PyTorch", skipped="PyTorch has no card")
        return
    config, shape = configured(options, size, "float32")
    _, _, state, batch, _ = state_and_programs(config, shape)
    batch = fill(batch, np.random.default_rng(0))

    def synchronised(route):
        def run():
            route()
            if on_card:
                torch.cuda.synchronize()

        return run

    for name, memory_format in against_torch.memory_formats(torch).items():
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        routes, _ = against_torch.theirs(
            torch, config, state.params, batch, memory_format, compiled=compiled, autocast=True
        )
        for which, route in zip(against_torch.PASSES, routes, strict=True):
            run = synchronised(route)
            run()
            ready_s = time.perf_counter() - began
            seconds = comparison.time_in_turn({name: run}, options.rounds)[name]
            used = torch.cuda.max_memory_allocated() / 2**20 if on_card else None
            say(
                case=name + ", compiled" * compiled,
                shape=" x ".join(map(str, shape)),
                dtype="bfloat16, autocast",
                **{"pass": which, "ready after s": round(ready_s, 2)},
                **comparison.spread(seconds, "ms"),
                most_in_use_MiB=used and round(used),
            )
            began = time.perf_counter()


def register(options):
    """`adregnet register` in fresh processes, then in this one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        scans = [options.fixed, options.moving] if options.fixed else _make_scans(folder, options.dry_run)
        effort = ["--effort", "fast", "--method", "instance"] if options.dry_run else []
        program = "from adregnet_jax.cli.app import main; main()"
        for case in ("first call, empty cache", "first call, with cache"):
            output = folder / case
            command = [sys.executable, "-c", program, "register", *map(str, scans), *effort]
            began = time.perf_counter()
            subprocess.run([*command, "--output", str(output)], check=True, stdout=sys.stderr)
            seconds = time.perf_counter() - began
            stages = json.loads((output / "summary.json").read_text())["seconds"]
            stages = {f"{name} s": round(value, 2) for name, value in stages.items()}
            say(case=case, **{"whole process s": round(seconds, 2)}, **stages)
        _register_again(options, scans)
        _convexadam(options, scans)


def _make_scans(folder, small):
    from scipy import ndimage

    from adregnet_jax.data.io.images import Image, write_image

    shape = (24, 20, 16) if small else (160, 192, 224)
    coarse = np.random.default_rng(0).normal(size=[-(-n // 8) for n in shape])
    zoom = np.divide(shape, coarse.shape)
    fixed = np.float32(ndimage.zoom(coarse, zoom, order=1, grid_mode=True, mode="nearest"))
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for path, values in zip(paths, (fixed, np.roll(fixed, 2, axis=0)), strict=True):
        write_image(path, Image(np.asarray(values), np.eye(4)))
    return paths


def _register_again(options, scans):
    from adregnet_jax.launch import process

    process.keep_freed_memory()
    process.use_compilation_cache()
    from adregnet_jax.registration.files import register_files
    from adregnet_jax.registration.options import RegistrationOptions

    quick: dict[str, Any] = {"method": "instance", "effort": "fast"} if options.dry_run else {}
    chosen = RegistrationOptions(**quick)
    for case in ("in a process, first", "in a process, again"):
        began = time.perf_counter()
        found = register_files(*scans, options=chosen)
        seconds = time.perf_counter() - began
        stages = {f"{name} s": round(value, 2) for name, value in found.seconds.items()}
        say(case=case, **{"s": round(seconds, 2)}, **stages)


def _convexadam(options, scans):
    if not _installed("torch", "convexAdam"):
        return
    import peers
    import torch

    from adregnet_jax.data.io.images import read_image
    from adregnet_jax.data.preprocessing import rescale_percentiles

    images = [read_image(path) for path in scans]
    if images[0].shape != images[1].shape:
        say(case="convexAdam", skipped="the scans have different grids")
        return
    fixed, moving = (rescale_percentiles(image.values, image.name).astype(np.float32) for image in images)
    pair = peers.Scans("pair", fixed, moving, images[0].spacing_mm, None, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in ("convexAdam, first", "convexAdam, again"):
        began = time.perf_counter()
        peers.convexadam(pair, device)
        say(case=case, **{"s": round(time.perf_counter() - began, 2)}, device=device)


def synthesis(options):
    import jax

    from adregnet_jax import SyntheticConfig, synthesise

    count, shape = (2, (16, 16, 16)) if options.dry_run else (32, (64, 64, 64))
    draw = functools.partial(synthesise, config=SyntheticConfig(shape=shape))
    keys = jax.random.split(jax.random.key(0), count)
    began = time.perf_counter()
    program = jax.jit(jax.vmap(draw)).lower(keys).compile()
    compilation = time.perf_counter() - began
    seconds = comparison.time_in_turn({"pairs": lambda: program(keys)}, options.rounds)["pairs"]
    planned = program.memory_analysis()
    say(
        case=f"{count} at once",
        shape=" x ".join(map(str, shape)),
        **{
            "pairs a second": round(count / statistics.median(seconds), 1),
            "compile s": round(compilation, 1),
            "temporary MiB": planned and round(planned.temp_size_in_bytes / 2**20),
        },
    )


def profile(options):
    import jax

    from adregnet_jax.benchmark.measure import fill, steps

    config, shape = configured(options, (128, 128, 128), "bfloat16")
    _, _, state, batch, step = state_and_programs(config, shape)
    program = step.lower(state, batch).compile()  # in the cache, if `speed` got so far
    batch = fill(batch, np.random.default_rng(0))
    call = steps(program, *jax.device_put((state, batch), program.input_shardings[0]))
    jax.block_until_ready(call())
    folder = options.output / "profile"
    count = 3
    quiet = jax.profiler.ProfileOptions()
    quiet.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=quiet):
        for _ in range(count):
            jax.block_until_ready(call())
    taken_ns, calls = kernels_of(folder)

    def report(case, nanoseconds, calls):
        of_all = round(100 * nanoseconds / max(taken_ns.total(), 1), 1)
        columns = {"ms a step": round(nanoseconds / count / 1e6, 3), "calls a step": round(calls / count, 1)}
        say(case=case, **columns, **{"%": of_all})

    report("all kernels", taken_ns.total(), calls.total())
    for name, nanoseconds in taken_ns.most_common(KERNELS):
        report(name[:120], nanoseconds, calls[name])


def kernels_of(folder):
    """Nanoseconds and calls of each kernel in the trace of a profile."""
    import jax

    (path,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    of_cards = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    taken_ns: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for line in (line for plane in of_cards or planes for line in plane.lines):
        # On a card, other lines have the same time again, by operation and by program.
        if of_cards and not line.name.startswith("Stream"):
            continue
        for event in line.events:
            taken_ns[event.name] += int(event.duration_ns)
            calls[event.name] += 1
    return taken_ns, calls


PARTS = {
    "machine": Part(machine, 60),
    "reference": Part(reference, 120, on_cpu=True),
    "agreement": Part(agree, 150),
    "speed": Part(speed, 200),
    "torch": Part(torch_speed, 60, on_cpu=True),
    "register": Part(register, 180),
    "synthesis": Part(synthesis, 60),
    "profile": Part(profile, 60),
    "speed-small": Part(functools.partial(speed, size=(64, 64, 64), dtypes=("float32", "tf32")), 120),
    "torch-compile": Part(functools.partial(torch_speed, compiled=True), 90, on_cpu=True),
    "speed-large": Part(functools.partial(speed, size=(160, 192, 224), remat=True), 180),
}
IN_DRY_RUN = ("machine", "reference", "agreement", "speed", "torch", "register", "synthesis", "profile")


def _installed(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    for name in missing:
        say(case=name, skipped=f"{name} is not installed")
    return not missing


class Record:
    """The rows so far, printed and written as they come."""

    def __init__(self, path):
        name, command = command_line()
        self.path = path
        self.found: dict[str, Any] = {"benchmark": name, "command": command, "machine": None, "rows": []}
        self.failed = False

    def add(self, part, row):
        if part == "machine":
            self.found["machine"] = row
        else:
            self.found["rows"].append({"part": part} | row)
        self.failed |= "failed" in row or not row.get("agrees", True)
        columns = ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)
        print(f"{part}: {columns}", flush=True)
        write_file(self.path, json.dumps(self.found, indent=2) + "\n")


def rows_of(name, options, limit_s, cache, log):
    """Runs a part in a process of its own, and yields its rows as they come."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "TMPDIR": cache}
    if options.dry_run or PARTS[name].on_cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    began = time.monotonic()
    with log.open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--this-part", name],
            stdout=subprocess.PIPE,
            stderr=messages,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # so that a stop reaches the processes that the part has started
        )
        timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout:
                try:
                    yield json.loads(line)
                except ValueError:  # said by a library
                    print(line, end="", file=messages, flush=True)
            status = process.wait()
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):  # at an interruption of this process, too
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        stopped = time.monotonic() - began >= limit_s
        why = f"stopped after {limit_s:.0f} s" if stopped else f"exit status {status}"
        last = log.read_text().rstrip().split("\n")[-1]
        yield {"failed": f"{why}: {last[:300]}"}


def parse():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="made if needed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="these alone")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="for all parts (default 8)")
    parser.add_argument("--fixed", type=Path, metavar="FILE", help="scan whose grid the result has")
    parser.add_argument("--moving", type=Path, metavar="FILE", help="scan to register")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at sizes without meaning")
    parser.add_argument("--this-part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.fixed is None) != (options.moving is None):
        parser.error("--fixed and --moving go together")
    return options


def main():
    options = parse()
    if options.this_part:
        PARTS[options.this_part].function(options)
        return 0
    ends = time.monotonic() + 60 * options.minutes
    record = Record(options.json or options.output / "gpu.json")
    chosen = set(options.parts or (IN_DRY_RUN if options.dry_run else PARTS))
    if "agreement" in chosen:
        chosen.add("reference")
    with tempfile.TemporaryDirectory() as cache:
        limit_s = PARTS["machine"].limit_s
        (found,) = rows_of("machine", options, limit_s, cache, Path(cache) / "machine.log")
        if not options.dry_run and found.get("platform") not in ("gpu", "cuda"):
            why = found.get("failed") or f"JAX has {found['device']}"
            print(f"error: no GPU ({why}); --dry-run runs on the CPU", file=sys.stderr)
            return 2
        options.output.mkdir(parents=True, exist_ok=True)
        record.add("machine", found)
        for name in (name for name in PARTS if name in chosen and name != "machine"):
            limit_s = min(PARTS[name].limit_s, ends - time.monotonic())
            if limit_s < LEAST_SECONDS:
                record.add(name, {"failed": f"no time left of {options.minutes:g} minutes"})
                continue
            for row in rows_of(name, options, limit_s, cache, options.output / f"{name}.log"):
                record.add(name, row)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
