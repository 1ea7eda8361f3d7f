"""Measures the memory per device of a training step against the number of devices along two axes.

    python benchmarks/sharding.py [--config configs/X.py] [--config.field=value ...] [--shape 64 32 32]
        [--axes data space] [--devices 1 2 4 8] [--json FILE]

Prints a row for each axis and number of devices: the bytes of the compiled step's arguments (state and
batch) and of its temporaries on each device, from XLA's `memory_analysis`. Nothing is run. Along `data` the
batch has as many pairs as the largest number of devices; along `space` it is one pair. Without --config, the
network has channels 4 and 8. The devices are simulated on the CPU, whose programs hold more temporaries than
those of a GPU: only the decrease is meaningful.
"""

import argparse
import sys
from pathlib import Path

import comparison
import jax
from jax.sharding import NamedSharding

from adregnet_jax.config import Config, ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.launch import config_file
from adregnet_jax.nn.models import make_model
from adregnet_jax.training.loop import abstract_state
from adregnet_jax.training.sharding import batch_specs, make_mesh
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import make_optimiser, make_train_step


def abstract_batch(pairs, shape, mesh):
    """The shapes of a batch that is divided among the devices of the mesh."""
    shapes = dict.fromkeys(("fixed", "moving", "mask"), (pairs, *shape, 1))
    shapes |= dict.fromkeys(("fixed_landmarks", "moving_landmarks"), (pairs, 100, 3))
    shapes |= {"landmark_valid": (pairs, 100), "spacing_mm": (pairs, 3)}
    arrays = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    specs = batch_specs(arrays)
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, array in arrays.items()
    }


def measure(config, shape, pairs, data, space):
    """Bytes of arguments and of temporaries of the training step on each device."""
    mesh = make_mesh(data, pairs, space_devices=space)
    model, optimiser = make_model(config.model), make_optimiser(config.optimiser, steps_per_epoch=1)
    state = abstract_state(make_init(model, optimiser, shape, mesh), jax.random.key(0), mesh)
    step = make_train_step(model, optimiser, config.loss, mesh)
    memory = step.lower(state, abstract_batch(pairs, shape, mesh)).compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 32, 32), metavar=("X", "Y", "Z"))
    parser.add_argument("--config", type=Path, metavar="FILE", help="as of train.py")
    parser.add_argument("--axes", nargs="+", choices=("data", "space"), default=("data", "space"))
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 2, 4, 8), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    options, rest = parser.parse_known_args()
    small = Config(model=ModelConfig(channels=(4, 8)))
    try:
        config = config_file.override(
            config_file.load_config(options.config) if options.config else small, rest
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows = []
    for axis in options.axes:
        pairs = max(options.devices) if axis == "data" else 1
        alone = None
        for n in options.devices:
            data, space = (n, 1) if axis == "data" else (1, n)
            arguments, temporaries = measure(config, tuple(options.shape), pairs, data, space)
            alone = alone or temporaries
            rows.append(
                {
                    "axis": axis,
                    "devices": n,
                    "pairs": pairs,
                    "arguments MB": round(arguments / 1e6, 2),
                    "temporaries MB": round(temporaries / 1e6, 2),
                    "of one device": round(temporaries / alone, 3),
                }
            )
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
