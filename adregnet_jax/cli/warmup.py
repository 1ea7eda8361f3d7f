"""The command `warmup`."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from adregnet_jax.cli.options import (
    REGISTRATION_FIELDS,
    DeviceOption,
    registration_options,
    takes_registration_options,
)
from adregnet_jax.errors import UserError

LEAST_VOXELS = 8
MEMORY_ADVICE = "give a --shape that fits, as that of your scans"


@takes_registration_options(*REGISTRATION_FIELDS)
def warmup(
    shape: Annotated[tuple[int, int, int], typer.Option(metavar="X Y Z", help="Voxels of the scans.")],
    spacing: Annotated[
        tuple[float, float, float], typer.Option(metavar="X Y Z", help="Voxel size in mm.")
    ] = (1.0, 1.0, 1.0),
    masks: Annotated[bool, typer.Option("--masks", help="The scans will come with masks.")] = False,
    device: DeviceOption = None,
    **choices: Any,
) -> None:
    """Compiles ahead what `register` and `batch` need for scans of about this size.

    The programs are kept in the cache on disk. Give the options that you will register with.
    """
    if min(shape) < LEAST_VOXELS or not all(0 < size < math.inf for size in spacing):
        raise UserError(
            f"--shape {shape} --spacing {spacing}: expected {LEAST_VOXELS} voxels or more along each axis"
            " and spacings above 0"
        )
    options = registration_options(choices)
    from adregnet_jax.cli.execution import (
        interruptible,
        load_network,
        show_stages,
        start_jax,
    )
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.launch.process import cache_every_program
    from adregnet_jax.registration.warmup import STAGES, compile_ahead, describe_rungs

    chosen = start_jax(device)
    cache_every_program()
    network = load_network(options.weights, chosen) if options.by_network else None
    with memory_errors_as_user_errors(MEMORY_ADVICE), show_stages(len(STAGES)) as on_stage:
        found = interruptible(
            lambda: compile_ahead(
                shape, spacing, options=options, network=network, masks=masks, on_stage=on_stage
            ),
            chosen,
        )
    print(
        f"{found.programs} programs, {found.from_cache} of them from the cache, in {found.seconds:.1f} s,"
        f" for scans of {describe_rungs(shape)} voxels"
    )
