"""The command `export`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from adregnet_jax.atomic import new_file
from adregnet_jax.cli.options import OverwriteOption, registration_options, takes_registration_options
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import Method

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@takes_registration_options("weights", "diffeomorphic", "subjects", "effort", "settings")
def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")],
    shape: Annotated[tuple[int, int, int], typer.Option(metavar="X Y Z", help="Voxels of the scans.")],
    spacing: Annotated[tuple[float, float, float], typer.Option(metavar="X Y Z", help="Voxel size in mm.")],
    method: Annotated[
        Method | None,
        typer.Option(help="Default: both with --weights, instance without.", show_default=False),
    ] = None,
    platforms: Annotated[
        str, typer.Option(metavar="NAMES", help="Platforms to run on, separated by commas.")
    ] = "cpu,cuda",
    overwrite: OverwriteOption = False,
    **choices: Any,
) -> None:
    """Exports the registration to one file that JAX runs without this package.

    The exported function takes fixed and moving scans [b, x, y, z, 1] in [0, 1] on one grid, and returns the
    displacement [b, x, y, z, 3] in voxels and the warped moving scans. A network gets the scans unchanged, on
    that grid. docs/cli.md shows how to load the file.
    """
    if min(shape) < 2 or not all(0 < size < math.inf for size in spacing):
        raise UserError(
            f"--shape {shape} --spacing {spacing}: expected 2 voxels or more and spacings above 0"
        )
    names = tuple(name.strip().lower() for name in platforms.split(","))
    if unknown := [name for name in names if name not in PLATFORMS]:
        raise UserError(f"--platforms {platforms}: {unknown[0]!r} is none of {', '.join(PLATFORMS)}")
    method = method or ("both" if choices["weights"] else "instance")
    if choices["weights"] is None and method != "instance":
        raise UserError(f"--method {method} needs --weights DIR: a network trained on scans of this spacing")
    options = registration_options(choices, method=method)
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists already; choose another name, or add --overwrite")
    from adregnet_jax.cli.execution import interruptible, load_network, start_jax
    from adregnet_jax.registration.export import export_register

    device = start_jax(None)
    network = load_network(options.weights, device) if options.by_network else None

    def traced() -> bytes:
        return export_register(
            shape,
            spacing,
            model=network.model if network else None,
            params=network.params if network else None,
            instance=options.instance_config,
            platforms=names,
        )

    program = interruptible(traced, device)
    with new_file(output, overwrite=overwrite) as temporary:
        temporary.write_bytes(program)
