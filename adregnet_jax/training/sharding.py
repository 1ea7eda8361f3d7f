"""The devices of a run: batches are divided along the mesh axis `data`, volumes along `space`.

Devices along `space` share each volume, a slab along x each (`ops.slabs`). The state is on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adregnet_jax.errors import UserError
from adregnet_jax.nn.prediction import check_width
from adregnet_jax.ops.slabs import SPACE


def make_mesh(devices: int, batch_size: int, *, space_devices: int = 1, accumulate: int = 1) -> Mesh:
    """A mesh of `devices` along `data` by `space_devices` along `space`.

    Args:
        devices: number along `data`; 0 takes the largest number that divides the batch.
        batch_size: pairs per optimiser step.
        space_devices: number of devices that share a volume.
        accumulate: micro-batches per optimiser step.

    Raises:
        UserError: more devices than available, or the batch isn't divisible by their number.
    """
    available = jax.device_count()
    if batch_size % accumulate:
        raise UserError(
            f"optimiser.batch_size is {batch_size}, which optimiser.accumulate={accumulate} does not divide:"
            f" make it a multiple of {accumulate}"
        )
    if devices == 0:
        most = max(1, available // space_devices)
        devices = max(n for n in range(1, most + 1) if batch_size // accumulate % n == 0)
    if devices * space_devices > available:
        sharing = f" and run.space_devices is {space_devices}" if space_devices > 1 else ""
        raise UserError(
            f"run.devices is {devices}{sharing}, there are {available} devices: lower it, or 0 for automatic"
        )
    if batch_size // accumulate % devices:
        micro = f" in optimiser.accumulate={accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"optimiser.batch_size is {batch_size}{micro}, which {devices} devices (run.devices) do not"
            f" divide: make it a multiple of {devices * accumulate}"
        )
    chosen = jax.devices()[: devices * space_devices]
    idle = jax.process_count() - len({device.process_index for device in chosen})
    if idle:
        raise UserError(
            f"{len(chosen)} of {available} devices are used, which leaves {idle} of {jax.process_count()}"
            f" processes without work: raise optimiser.batch_size or run.space_devices, or start fewer"
        )
    return jax.make_mesh(
        (devices, space_devices), ("data", SPACE), axis_types=(AxisType.Auto,) * 2, devices=chosen
    )


def shares_volumes(mesh: Mesh) -> bool:
    """Whether several devices share a volume."""
    return mesh.shape[SPACE] > 1


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def batch_specs(
    batch: Mapping[str, jax.Array | np.ndarray | jax.ShapeDtypeStruct], along: str | None = "data"
) -> dict[str, PartitionSpec]:
    """The partition of each array of a batch over the mesh; with `along=None`, every device has all pairs."""
    return {
        name: PartitionSpec(along, SPACE) if array.ndim == 5 else PartitionSpec(along)
        for name, array in batch.items()
    }


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """Indices of the pairs of a batch that the devices of this process need."""
    per_device = batch_size // mesh.shape["data"]
    here = [
        n
        for n, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    return [n * per_device + k for n in here for k in range(per_device)]


def place(
    batch: Mapping[str, np.ndarray],
    rows: Sequence[int],
    batch_size: int,
    *,
    mesh: Mesh,
    multiple: int = 1,
) -> dict[str, jax.Array]:
    """Places a batch of `batch_size` pairs, of which this process has `rows`, on the devices of the mesh.

    A batch that can't be divided among them, such as a single pair, goes to all devices along `data`.

    Raises:
        UserError: the volumes don't split into slabs of a `multiple` of voxels.
    """
    check_width(batch["fixed"].shape[1], mesh.shape[SPACE], multiple)
    specs = batch_specs(batch, "data" if batch_size % mesh.shape["data"] == 0 else None)

    def placed(name: str) -> jax.Array:
        local = batch[name]

        def part(index: Any) -> np.ndarray:
            pairs = range(*index[0].indices(batch_size))
            first = rows.index(pairs[0])
            return local[(slice(first, first + len(pairs)), *index[1:])]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, specs[name]), part)

    return {name: placed(name) for name in batch}


def draw_on_devices(
    draw: Callable[[jax.Array], dict[str, jax.Array]], step: jax.Array, batch_size: int, *, mesh: Mesh
) -> dict[str, jax.Array]:
    """The batch after `step` steps, each pair drawn by the devices along `data` that need it.

    Devices that share volumes draw the same pairs, whole, and keep their slabs.

    Args:
        draw: makes the pairs at some positions of the endless training set.
        step: steps done, a traced number.
        batch_size: pairs per optimiser step.
        mesh: the devices, whose number along `data` divides the batch.
    """
    # With another name for the second axis, functions of volumes do not take them for slabs.
    whole = Mesh(mesh.devices, ("data", "copies"), axis_types=(AxisType.Auto,) * 2)
    along = PartitionSpec("data")
    drawn = jax.shard_map(draw, mesh=whole, in_specs=along, out_specs=along, check_vma=False)
    return drawn(step * batch_size + jnp.arange(batch_size, dtype=jnp.int32))


def to_host(array: jax.Array) -> np.ndarray:
    """Copies a whole array to the host of each process, even if its parts lie on several processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
