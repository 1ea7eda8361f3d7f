"""The optimiser, the training step and the validation step: pure functions, jitted here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from adregnet_jax import losses
from adregnet_jax.config import LossConfig, OptimiserConfig
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.sampling import warp
from adregnet_jax.ops.slabs import SPACE
from adregnet_jax.training.sharding import batch_specs, replicated
from adregnet_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
Batch = Mapping[str, AnyArray]


def learning_rate(config: OptimiserConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up from 0, then halved every `halve_every_epochs` epochs."""
    halve_every = config.halve_every_epochs * steps_per_epoch

    def rate(step: Any) -> Any:
        warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
        halvings = step // halve_every if halve_every else 0
        return config.learning_rate * warmup * 0.5**halvings

    return rate


def make_optimiser(config: OptimiserConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam, with gradients first clipped to a global norm of `gradient_clip`."""
    clip = clip_by_norm(config.gradient_clip) if config.gradient_clip else optax.identity()
    return optax.chain(clip, optax.adam(learning_rate(config, steps_per_epoch)))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, on accelerators by `global_norm`."""
    on_cpu = optax.clip_by_global_norm(largest)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        if traces_for_cpu():
            return on_cpu.update(updates, state, params)
        factor = jnp.minimum(1.0, largest / global_norm(updates))
        return jax.tree.map(lambda x: factor * x, updates), state

    return optax.GradientTransformation(on_cpu.init, update)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all arrays together: on accelerators as that of one vector, in a few kernels."""
    if traces_for_cpu():
        return optax.tree.norm(tree)
    return jnp.sqrt(jnp.sum(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) ** 2))


def in_one_vector(tree: Any) -> Any:
    """The same arrays, on accelerators as parts of one vector.

    If gradients are parts of one array, XLA for GPUs updates all parameters of one shape in one kernel;
    otherwise, each parameter takes a kernel of its own.
    """
    if traces_for_cpu():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    # Without the barrier, XLA would replace the parts by the arrays that they are copies of.
    vector = jax.lax.optimization_barrier(jnp.concatenate([leaf.ravel() for leaf in leaves]))
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    each = zip(leaves, ends, strict=True)
    return jax.tree.unflatten(
        structure, [vector[end - leaf.size : end].reshape(leaf.shape) for leaf, end in each]
    )


def average_parameters(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of the parameters after `step`, from 1.

    It averages over the last 1 / (1 - decay) steps or, early in a run, over about its last tenth, so that the
    random start is soon forgotten.
    """
    kept = jnp.minimum(decay, step / (step + 9))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, params)


def registration_loss(
    model: nn.Module,
    config: LossConfig,
    params: Any,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
    """eq. 16 on a batch: the loss, its unweighted terms, and the displacement [b, x, y, z, 3].

    Without a key there is no dropout.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    prediction: Any = model.apply({"params": params}, batch["fixed"], batch["moving"], rngs=rngs)
    warped = warp(batch["moving"], prediction.displacement)  # eq. 1
    loss, terms = losses.total_loss(batch, prediction.displacement, warped, config)
    return loss, (terms, prediction.displacement)


def make_train_step(
    model: nn.Module,
    optimiser: optax.GradientTransformation,
    loss_config: LossConfig,
    mesh: Mesh,
    *,
    seed: int = 0,
    accumulate: int = 1,
    average_decay: float = 0.0,
    draw: Callable[[jax.Array], Batch] | None = None,
    steps: int = 1,
) -> jax.stages.Wrapped:
    """A jitted `step(state, batch) -> (state, metrics)`.

    The batch is divided along `data`, its volumes along `space`, and the state is donated. Each device
    processes its pairs in `accumulate` parts, one after the other, which takes less memory for the same step.
    Dropout is a function of `seed` and `state.step`. `average_decay` applies to `state.average`, if there is
    one.

    With `draw`, the program takes `steps` steps on the batches that `draw` makes of the number of steps done,
    and the given batch is not used.

    Metrics are arrays on the device: `loss`, its unweighted terms, and `gradient_norm` before clipping. They
    are scalars or, with `draw`, have an entry per step.
    """

    # Each device differentiates the loss of its own pairs, and only the gradients are averaged. XLA's
    # partitioner would gather the batch for the inner loops over slices and blocks.
    # Along `space` all devices have the same loss, and the transposes of the collectives give each device the
    # gradient of the sum of these losses with respect to its own copy of the parameters. The sum over the
    # copies is the gradient times the number of devices, so their mean is the gradient.
    def loss_and_gradients(
        params: Any, batch: Batch, dropout_key: jax.Array
    ) -> tuple[jax.Array, Metrics, Any]:
        def loss_of(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
            loss, (terms, _) = registration_loss(model, loss_config, params, batch, dropout_key)
            return loss, terms

        differentiate = jax.value_and_grad(loss_of, has_aux=True)

        def add(total: Any, part: Batch) -> tuple[Any, tuple[jax.Array, Metrics]]:
            loss_and_terms, gradients = differentiate(params, part)
            return jax.tree.map(jnp.add, total, gradients), loss_and_terms

        if accumulate == 1:
            (loss, terms), gradients = differentiate(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            total, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
            gradients = jax.tree.map(lambda x: x / accumulate, total)
            loss, terms = jax.tree.map(lambda x: jnp.mean(x, axis=0), each)
        return jax.lax.pmean((loss, terms, gradients), ("data", SPACE))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, terms, gradients = jax.shard_map(
            loss_and_gradients,
            mesh=mesh,
            in_specs=(PartitionSpec(), batch_specs(batch), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(state.params, batch, dropout_key)
        gradients = in_one_vector(gradients)
        updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **terms, "gradient_norm": global_norm(gradients)}
        step, average = state.step + 1, state.average
        if average is not None:
            average = average_parameters(average, params, step, average_decay)
        return state.replace(step=step, params=params, average=average, opt_state=opt_state), metrics

    def drawn_steps(state: TrainState, _batch: Batch) -> tuple[TrainState, Metrics]:
        assert draw is not None
        return jax.lax.scan(lambda state, _: train_step(state, draw(state.step)), state, length=steps)

    # LLVM's higher levels take a fifth of the compilation time on CPU and don't make the step faster.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        train_step if draw is None else drawn_steps,
        in_shardings=(replicated(mesh), None),
        out_shardings=(replicated(mesh), replicated(mesh)),
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
    )


def make_validation_step(
    model: nn.Module, loss_config: LossConfig, mesh: Mesh
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted `step(params, batch) -> (loss, displacement)`; volumes are divided along `space`."""

    def loss_and_displacement(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, (_, displacement) = registration_loss(model, loss_config, params, batch)
        return loss, displacement

    @jax.jit
    def validation_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return jax.shard_map(
            loss_and_displacement,
            mesh=mesh,
            in_specs=(PartitionSpec(), batch_specs(batch, None)),
            out_specs=(PartitionSpec(), PartitionSpec(None, SPACE)),
            check_vma=False,
        )(params, batch)

    return validation_step
