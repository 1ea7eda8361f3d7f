"""The state of a training run. Checkpoints hold all of it: a resumed run equals an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from adregnet_jax.training.sharding import replicated

# For code that runs once, LLVM would spend seconds per parameter on optimisation.
COMPILED_FOR_ONE_RUN: dict[str, str | int | bool | float] = {"xla_backend_optimization_level": 0}


@no_type_check  # at run time: JAX and Orbax put shapes and placeholders into the fields
class TrainState(struct.PyTreeNode):
    """Parameters, optimiser state and validation record after `step` steps."""

    step: jax.Array  # int32, steps done
    params: Any
    opt_state: optax.OptState
    best_metric: jax.Array  # float32, lowest validation metric so far; infinite before the first validation
    best_step: jax.Array  # int32, the step of `best_metric`
    average: Any = None  # the moving average of `params`, if the run has one

    @property
    def network(self) -> Any:
        """The parameters that are validated and kept as the network."""
        return self.params if self.average is None else self.average


def make_init(
    model: nn.Module,
    optimiser: optax.GradientTransformation,
    shape: tuple[int, int, int],
    mesh: Mesh,
    *,
    averaged: bool = False,
) -> Callable[[jax.Array], TrainState]:
    """A function `init(key) -> TrainState` for volumes of `shape`; `jax.eval_shape` of it computes nothing.

    With `averaged`, the state holds a moving average of the parameters. The parameters are drawn on the CPU
    for any device.
    """

    def init(key: jax.Array) -> TrainState:
        volume = jnp.zeros((1, *shape, 1), jnp.float32)
        params = model.init(key, volume, volume)["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimiser.init(params),
            best_metric=jnp.full((), jnp.inf, jnp.float32),
            best_step=jnp.zeros((), jnp.int32),
            average=jax.tree.map(jnp.copy, params) if averaged else None,
        )

    if mesh.devices.flat[0].platform == "cpu":
        return jax.jit(init, out_shardings=replicated(mesh), compiler_options=COMPILED_FOR_ONE_RUN)
    return drawn_on_host(init, mesh)


def drawn_on_host(init: Callable[[jax.Array], Any], mesh: Mesh) -> Callable[[jax.Array], Any]:
    """`init(key)` on the CPU of each process, its results then copied to all devices of the mesh.

    XLA compiles the many small random draws for a GPU much longer than for a CPU.
    """

    def init_and_copy(key: jax.Array) -> Any:
        if isinstance(key, jax.core.Tracer):  # by `jax.eval_shape`
            return init(key)
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS excludes the CPU
            return jax.jit(init, out_shardings=replicated(mesh))(key)
        with jax.default_device(host):
            drawn = jax.jit(init, compiler_options=COMPILED_FOR_ONE_RUN)(jax.device_put(key, host))
        return jax.device_put(jax.device_get(drawn), replicated(mesh))

    return init_and_copy
