"""Measures the time of a training step, of its compilation and of `import adregnet_jax`.

    python benchmarks/training_step.py [--shape 48 64 48] [--channels 8 16 32 64] [--rounds 5] [--json FILE]

Prints a row for the import, then rows for tracing, compiling and running the step, both for a first start,
with an empty compilation cache, and for a second start, with a filled one. Everything is measured in a fresh
process, set up as by `train.py`. The step is loss, gradients and Adam of the network with default settings
except for its channels, on one pair of the phantom (batch 1, float32).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import comparison

IMPORT = "import time; start = time.perf_counter(); import adregnet_jax; print(time.perf_counter() - start)"


def measure_start(shape, channels, rounds):
    """Seconds of tracing, compiling and running the training step in this process, by name."""
    from adregnet_jax.launch import process

    process.keep_freed_memory()  # before JAX starts
    process.use_compilation_cache()

    import jax

    from adregnet_jax.config import Config, ModelConfig, PhantomConfig
    from adregnet_jax.data.datasets.phantom import phantom_pair
    from adregnet_jax.data.pipeline import collate
    from adregnet_jax.nn.adregnet import AdRegNet
    from adregnet_jax.training.sharding import make_mesh, place
    from adregnet_jax.training.state import make_init
    from adregnet_jax.training.step import make_optimiser, make_train_step

    config = Config(model=ModelConfig(channels=channels))
    mesh = make_mesh(devices=1, batch_size=1)
    model, optimiser = AdRegNet(config.model), make_optimiser(config.optimiser, steps_per_epoch=1)
    state = make_init(model, optimiser, shape, mesh)(jax.random.key(0))
    batch = place(collate([phantom_pair(PhantomConfig(shape=shape), 0)]), [0], 1, mesh=mesh)
    jax.block_until_ready((state, batch))

    start = time.perf_counter()
    lowered = make_train_step(model, optimiser, config.loss, mesh).lower(state, batch)
    traced = time.perf_counter()
    train_step = lowered.compile()
    compiled = time.perf_counter()

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)  # the state is donated
        return state, metrics

    seconds = comparison.time_in_turn({"step": step}, rounds)["step"]
    return {"trace": [traced - start], "compile": [compiled - traced], "step": seconds}


def in_fresh_process(*arguments, **environment):
    """The last line printed by a Python process, parsed as JSON."""
    command = [sys.executable, *arguments]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 64, 48), metavar=("X", "Y", "Z"))
    parser.add_argument("--channels", type=int, nargs="+", default=(8, 16, 32, 64))
    parser.add_argument("--this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.this_process:
        print(json.dumps(measure_start(tuple(options.shape), tuple(options.channels), options.rounds)))
        return
    seconds = {"import adregnet_jax": [in_fresh_process("-c", IMPORT) for _ in range(options.rounds)]}
    with tempfile.TemporaryDirectory() as cache:
        for start in ("first", "second"):
            measured = in_fresh_process(*sys.argv, "--this-process", JAX_COMPILATION_CACHE_DIR=cache)
            seconds |= {f"{start} start, {name}": values for name, values in measured.items()}
    rows = [{"measure": name} | comparison.spread(values, "s") for name, values in seconds.items()]
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
