"""The command `export`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.atomic import new_file
from adregnet_jax.cli.options import (
    DiffeomorphicOption,
    EffortOption,
    OverwriteOption,
    SettingsOption,
    SubjectsOption,
    WeightsOption,
)
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import Effort, Method, Subjects, make_procedure

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")],
    shape: Annotated[tuple[int, int, int], typer.Option(metavar="X Y Z", help="Voxels of the scans.")],
    spacing: Annotated[
        tuple[float, float, float], typer.Option(metavar="X Y Z", help="Millimetres of a voxel.")
    ],
    weights: WeightsOption = None,
    method: Annotated[
        Method | None,
        typer.Option(help="Default: both with --weights, instance without.", show_default=False),
    ] = None,
    diffeomorphic: DiffeomorphicOption = False,
    subjects: SubjectsOption = Subjects.any,
    effort: EffortOption = Effort.default,
    settings: SettingsOption = None,
    platforms: Annotated[str, typer.Option(metavar="NAMES", help="Separated by commas.")] = "cpu,cuda",
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the registration as one file that JAX runs without this package.

    Its function takes fixed and moving [b, x, y, z, 1] in [0, 1], on one grid, and gives the displacement
    [b, x, y, z, 3] in voxels and the warped moving scans. A network gets them as they are, on that
    grid. See docs/cli.md for how it is loaded.
    """
    if min(shape) < 2 or not all(0 < size < math.inf for size in spacing):
        raise UserError(f"--shape {shape} --spacing {spacing}: expected 2 voxels or more and sizes above 0")
    names = tuple(name.strip().lower() for name in platforms.split(","))
    if unknown := [name for name in names if name not in PLATFORMS]:
        raise UserError(f"--platforms {platforms}: {unknown[0]!r} is none of {', '.join(PLATFORMS)}")
    method = method or (Method.both if weights else Method.instance)
    if weights is None and method != Method.instance:
        raise UserError(f"--method {method} needs --weights DIR: a network trained on scans of this spacing")
    procedure = make_procedure(
        weights=weights,
        method=method,
        diffeomorphic=diffeomorphic,
        subjects=subjects,
        effort=effort,
        settings=settings,
    )
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists already; choose another name, or add --overwrite")
    from adregnet_jax.cli.execution import interruptible, load_network, start_jax
    from adregnet_jax.registration.export import export_register

    device = start_jax(None)
    network = load_network(weights, device) if procedure.by_network else None

    def traced() -> bytes:
        return export_register(
            shape,
            spacing,
            model=network.model if network else None,
            params=network.params if network else None,
            instance=procedure.instance,
            platforms=names,
        )

    program = interruptible(traced, device)
    with new_file(output, overwrite=overwrite) as temporary:
        temporary.write_bytes(program)
