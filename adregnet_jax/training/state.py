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
    """A jitted `init(key) -> TrainState` for volumes of `shape`; `jax.eval_shape` of it computes nothing.

    With `averaged`, the state holds a moving average of the parameters.
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

    # Compiled without optimisation: for code that runs once, LLVM would spend seconds per parameter.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(init, out_shardings=replicated(mesh), compiler_options=options)
