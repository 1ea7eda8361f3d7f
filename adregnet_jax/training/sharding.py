"""One mesh axis, `data`: batches are divided along it, the state is on every device."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adregnet_jax.errors import UserError


def make_mesh(devices: int, batch_size: int) -> Mesh:
    """A mesh of `devices` along `data`; 0 takes the most devices that divide the batch."""
    available = jax.device_count()
    if devices == 0:
        devices = max(n for n in range(1, available + 1) if batch_size % n == 0)
    if devices > available:
        raise UserError(
            f"run.devices is {devices}, this machine has {available}: lower it, or 0 for automatic"
        )
    if batch_size % devices:
        raise UserError(
            f"optimiser.batch_size is {batch_size}, which {devices} devices (run.devices) do not divide:"
            f" make it a multiple of {devices}"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))
