"""Compares results of JAX's default device with those of the CPU.

    JAX_PLATFORMS=cpu python benchmarks/agreement.py write FILE
    python benchmarks/agreement.py compare FILE [--form gpu]

The first command computes the results on the CPU and keeps them. The second computes them again, on the
default device, and prints one JSON object per comparison; its exit status is 1 if one is beyond its bound.
With `--form gpu` a machine without a card computes by the operations' form for accelerators. --small, in both
commands, takes volumes of 16 voxels along an axis instead of 32 and narrow networks, random numbers instead
of the bundled weights, and leaves out TF32, which no CPU has.

Compared are the warp of a volume with its gradients, the Jacobian determinant, the exponential of a velocity,
`align`, and three networks with the gradients of the default loss: the paper's equations, our defaults, and
the bundled one. All are in float32, our defaults also in TF32 and bfloat16 (`config.model.dtype`).

The error of a result is its greatest difference as a fraction of its largest value. Gradients of parameters
are compared as one vector, by norms. `BOUNDS` has the bounds and their reasons.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.config import (
    LossConfig,
    ModelConfig,
    PhantomConfig,
    instance_preset,
    paper_model,
    pretrained_model,
)
from adregnet_jax.data.datasets.phantom import phantom_pair
from adregnet_jax.data.pipeline import collate
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.composition import exponential
from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.instance import align
from adregnet_jax.training.step import registration_loss
from adregnet_jax.weights.packed import load_pretrained

# float32: sums are in another order; on CPU, the form for accelerators differs by up to 6e-6. bfloat16 has 8
# significant bits; on CPU, gradients differ by up to 8e-2. TF32 has 11, for products alone: a fifth of that.
BOUNDS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 2e-1}


class Case(NamedTuple):
    """Something to compute: a function from a setting of `model.dtype` to arrays by name."""

    function: Any
    dtypes: tuple[str, ...] = ("float32",)
    by_norm: tuple[str, ...] = ()  # results that are compared by norms


def cases(small):
    """The cases by name."""
    n = 16 if small else 32
    pair = phantom_pair(PhantomConfig(shape=(n, n, n), spacing_mm=(320 / n,) * 3), 0)
    batch = {name: jnp.asarray(array) for name, array in collate([pair]).items()}
    rng = np.random.default_rng(0)
    volume = rng.random((1, n, n, n, 2), np.float32)
    displacement = rng.normal(scale=2, size=(1, n, n, n, 3)).astype(np.float32)
    velocity = np.float32(3 * np.sin(np.linspace(0, 6, n**3 * 3)).reshape(1, n, n, n, 3))
    # Exact attention on all levels but the finest, which has neighbourhood attention.
    sizes: dict[str, Any] = {"channels": (2, 3) if small else (8, 16, 32)}
    sizes |= {"global_attention_tokens": n**3 // 8, "region_size": n // 2}
    networks = {
        "network, default": Network(ModelConfig(**sizes), batch),
        "network, paper": Network(paper_model(**sizes), batch),
    }
    if small:
        networks["network, bundled"] = Network(pretrained_model(channels=(2, 3)), batch)
    else:
        bundled = load_pretrained()
        networks["network, bundled"] = Network(bundled.model.config, batch, bundled.params)
    found = {
        "warp": Case(functools.partial(warped, volume, displacement)),
        "jacobian": Case(lambda _: {"determinant": jax.jit(jacobian_determinant)(displacement)}),
        "exponential": Case(lambda _: {"displacement": jax.jit(exponential)(velocity)}),
        "align": Case(functools.partial(aligned, batch)),
    }
    # Each setting is a program to compile. On CPU, TF32 is float32.
    dtypes = ("float32", "bfloat16") if small else tuple(BOUNDS)
    for name, network in networks.items():
        found[name] = Case(network, dtypes if "default" in name else ("float32",), ("gradients",))
    return found


def warped(volume, displacement, _dtype):
    @jax.jit
    def run(volume, displacement):
        result, pull_back = jax.vjp(warp, volume, displacement)
        return result, *pull_back(jnp.cos(result))

    names = ("warped", "gradient in the volume", "gradient in the displacement")
    return dict(zip(names, run(volume, displacement), strict=True))


def aligned(batch, _dtype):
    spacing_mm = tuple(np.asarray(batch["spacing_mm"])[0].tolist())
    config = instance_preset("fast", "same")
    run = jax.jit(functools.partial(align, spacing_mm=spacing_mm, config=config))
    return {"displacement": run(batch["fixed"], batch["moving"]).displacement}


class Network:
    """A network on a pair, with the gradients of the default loss."""

    def __init__(self, config, batch, params=None):
        self.config, self.batch = config, batch
        self.params = params or draw_parameters(make_model(config), batch["fixed"], batch["moving"])

    def __call__(self, dtype):
        model = make_model(dataclasses.replace(self.config, dtype=dtype))

        @jax.jit
        def run(params, batch):
            def loss_of(params):
                loss, (_, displacement) = registration_loss(model, LossConfig(), params, batch)
                return loss, displacement

            (loss, displacement), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
            vector = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
            return {"displacement": displacement, "loss": loss, "gradients": vector}

        return run(self.params, self.batch)


def draw_parameters(model, *inputs):
    """Parameters of a network for these inputs, none of them 0, without compiling its initialisation."""
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            return np.float32(values / np.prod(leaf.shape[:-1]) ** 0.5)
        return np.float32((path[-1].key == "scale") + 0.1 * values)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def compute(small, dtypes=tuple(BOUNDS)):
    """Yields name, `model.dtype`, results as arrays by name, and the names of those compared by norms."""
    for name, case in cases(small).items():
        for dtype in (dtype for dtype in case.dtypes if dtype in dtypes):
            results = jax.device_get(case.function(dtype))
            yield name, dtype, results, case.by_norm


def write(path, small):
    results = {
        f"{name}/{quantity}": values
        for name, _, found, _ in compute(small, ("float32",))
        for quantity, values in found.items()
    }
    np.savez(path, **results)


def compare(path, small):
    """Yields a row for each result."""
    with np.load(path) as stored:
        reference = dict(stored)
    for name, dtype, found, by_norm in compute(small):
        for quantity, values in found.items():
            expected = reference[f"{name}/{quantity}"].astype(np.float64)
            difference, size = np.abs(values - expected), np.abs(expected)
            measure = np.linalg.norm if quantity in by_norm else np.max
            error = float(measure(difference) / measure(size))
            yield {
                "case": name,
                "result": quantity,
                "dtype": dtype,
                "error": float(f"{error:.2g}"),
                "bound": BOUNDS[dtype],
                "agrees": error <= BOUNDS[dtype],  # False also for NaN
            }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE", help="results of the CPU (.npz)")
    parser.add_argument("--small", action="store_true", help="small volumes and networks")
    parser.add_argument("--form", choices=("cpu", "gpu"), help="form of the operations, whatever the device")
    options = parser.parse_args()
    form = budget.override(platform=options.form) if options.form else contextlib.nullcontext()
    agree = True
    with form:
        if options.action == "write":
            write(options.file, options.small)
            return 0
        for row in compare(options.file, options.small):
            print(json.dumps(row), flush=True)
            agree &= row["agrees"]
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
