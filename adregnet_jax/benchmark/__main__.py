"""Measures time, FLOPs and memory of a network, part by part.

    python -m adregnet_jax.benchmark --config configs/phantom.py [--shape 64 48 48] [--batch 2]
        [--dtype bfloat16] [--devices 1] [--rounds 5 | --once] [--forward-only] [--total-only] [--memory-only]
        [--target h100] [--json FILE]

Options that aren't given come from the config. Any of its fields can be set as for `train.py`, for instance
--config.model.remat=True. A table is printed and, with --json, written as {"benchmark", "command", "machine",
"rows"}.

Rows. The parts are the modules of the network, with the shapes and parameters that they have in it, the warp,
each term of the loss in use, and the optimiser. Each part is timed forward, and with the gradients with
respect to its parameters and inputs. "total" is the network and the warp of the moving image, and the whole
training step of `train.py`. "sum of parts" adds up the medians. It lacks the concatenations and sums between
the parts and, with `model.remat`, which the parts ignore, a second forward pass. A part that the total fuses
with its neighbours, or runs in parallel with another, is cheaper there. Scans and features are random numbers
and parameters those of a new network, since times don't depend on the values.

Columns.
- model GFLOP: convolutions, dense layers and attention, counted from shapes, three times the forward pass
  where there are gradients (`adregnet_jax.benchmark.flops`). This is the figure to quote.
- XLA GFLOP: XLA's own count for the compiled program. It includes every operation, but counts the body of a
  loop only once. It thus misses most of attention and, on CPU, of the kernel gradients of convolutions, which
  are loops. Padding is not included.
- compile s: tracing and compiling, without any cache.
- pairs/s: the pairs in the batch divided by the median.
- of peak %: model GFLOP over the median, relative to a large float32 matrix product on the same devices in
  the same run (at JAX's default precision, which is TF32 on newer GPUs).
- arguments and temporary MiB: memory of one device, reported by XLA. Results need additional memory, unless
  they reuse that of an argument, as the state of a training step does.

The batch is divided among the devices as in training, for the parts as well. --memory-only compiles without
running, so that a small machine can report the memory for a large scan; no array of its size is made. --once
times a single call of each program, for calls that take minutes. The last line has the peak memory of the
whole process, including compilation, and of the device if it reports one.

--target compiles for an NVIDIA card that the machine need not have, and runs nothing. It needs the extra
`cuda12` or `cuda13`, whose compiler works from a description of the card, without trying kernels out on it.
The columns are then:
- trace CPU s: from Python to StableHLO, in seconds of one core; StableHLO lines: the size of that program.
- kernels: fusions and calls of libraries; one in the body of a loop counts once.
- permuting: those among them that only bring an array into another layout.
- compile CPU s: XLA and ptxas. On the card, trying out kernels takes more time.
- loops: each takes a launch and a wait for every turn.
- arguments and temporary MiB: as above, compared with the memory of the card on the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from adregnet_jax.benchmark.measure import MEMORY_ADVICE, measure
from adregnet_jax.benchmark.target import CARDS, compiling_for
from adregnet_jax.benchmark.timing import report
from adregnet_jax.config import Config, DataConfig
from adregnet_jax.errors import OneLineParser, UserError
from adregnet_jax.launch import config_file, process
from adregnet_jax.launch.devices import find_device, memory_errors_as_user_errors


def parse(argv: Sequence[str]) -> tuple[Config, tuple[int, int, int], argparse.Namespace]:
    """The config with the changes from the command line, the shape, and the options."""
    parser = OneLineParser(
        prog="python -m adregnet_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="config, as for train.py")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels of a scan")
    parser.add_argument("--batch", type=int, metavar="N", help="pairs a batch: config.optimiser.batch_size")
    parser.add_argument("--dtype", choices=("float32", "tf32", "bfloat16"), help="config.model.dtype")
    parser.add_argument("--devices", type=int, metavar="N", help="config.run.devices")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of three calls each (default 5)")
    parser.add_argument("--once", action="store_true", help="time a single call of each program")
    parser.add_argument("--forward-only", action="store_true", help="no gradients, no training step")
    parser.add_argument("--total-only", action="store_true", help="leave out the parts")
    parser.add_argument("--memory-only", action="store_true", help="compile, but run nothing")
    parser.add_argument("--target", choices=tuple(CARDS), help="compile for this card instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    options, rest = parser.parse_known_args(argv)
    config = config_file.override(config_file.load_config(options.config), rest)
    if options.batch is not None:
        config.optimiser.batch_size = options.batch
    if options.devices is not None:
        config.run.devices = options.devices
    config.model.dtype = options.dtype or config.model.dtype
    shape = tuple(options.shape or data_shape(config.data))
    if min(shape) < 2:
        raise UserError(f"--shape is {shape}: expected two voxels or more along each axis")
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}: it must be at least 1")
    if options.target and config.run.devices > 1:
        raise UserError(
            f"--target {options.target} compiles for one card, and run.devices is {config.run.devices}:"
            " give --devices 1, and the pairs of one card as --batch"
        )
    if options.json and options.json.is_dir():
        raise UserError(f"--json {options.json} is a folder; expected the name of a file")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}: create it first")
    return config, shape, options


def data_shape(config: DataConfig) -> tuple[int, int, int]:
    """Shape of the scans in a config's data."""
    match config.kind:
        case "phantom":
            return config.phantom.shape
        case "synthetic":
            return config.synthetic.shape
        case "dirlab":
            return config.dirlab.shape
        case "ixi":
            return config.ixi.shape
    raise UserError(f"--shape is missing, and the config has none for data of kind {config.kind!r}: give one")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config, shape, options = parse(sys.argv[1:] if argv is None else argv)
        process.keep_freed_memory()
        process.use_every_core(config.optimiser.batch_size)
        # Compilation is timed: nothing may come from the cache on disk.
        jax.config.update("jax_enable_compilation_cache", False)
        if not options.target:
            find_device()  # for its messages
        with (
            memory_errors_as_user_errors(MEMORY_ADVICE),
            compiling_for(options.target) if options.target else contextlib.nullcontext() as mesh,
        ):
            rows, found = measure(
                config,
                shape,
                rounds=0 if options.once else options.rounds,
                forward_only=options.forward_only,
                total_only=options.total_only,
                memory_only=options.memory_only,
                target=mesh,
            )
        size = " x ".join(map(str, shape))
        about = {"shape": size, "batch": config.optimiser.batch_size, "dtype": config.model.dtype}
        about |= {"convolution": config.model.convolution} | found
        if options.target:
            card = CARDS[options.target]
            about |= {"target": card.name, "its memory MiB": 1024 * card.memory_gib}
        report(rows, options.json, about)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
