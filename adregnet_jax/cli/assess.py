"""The command `assess`: the verdict on a field, whoever made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from adregnet_jax.cli.fields import MEMORY_ADVICE, Format
from adregnet_jax.cli.options import VERDICT_STATUS, DeviceOption, FailOnOption, OverwriteOption
from adregnet_jax.cli.register import MaskOption
from adregnet_jax.errors import UserError


def assess(
    fixed: Annotated[Path, typer.Argument(help="The reference scan.")],
    moving: Annotated[Path, typer.Argument(help="The scan that was registered to it.")],
    field: Annotated[Path, typer.Argument(help="From FIXED to MOVING: .nii.gz, .nii, .npz or .h5.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Also write the verdict as JSON."),
    ] = None,
    error: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the predicted error in mm, an image.")
    ] = None,
    modality: Annotated[
        Literal["auto", "mono", "multi"], typer.Option(help="multi: the scans have different contrasts.")
    ] = "auto",
    effort: Annotated[Literal["fast", "full"], typer.Option(help="full: look at a finer grid.")] = "fast",
    fixed_mask: MaskOption = None,
    moving_mask: MaskOption = None,
    format: Annotated[
        Format | None,
        typer.Option(help="Format of a NIfTI field. Default: inferred from its header.", show_default=False),
    ] = None,
    fail_on: FailOnOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Judges a registration by its scans and its field: pass, check or fail, with reasons.

    The field may come from any program that writes one of the formats above, on the grid of FIXED.
    """
    from adregnet_jax.atomic import new_file
    from adregnet_jax.cli.execution import interruptible, start_jax
    from adregnet_jax.data.io.images import Image, read_image, write_image
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.assessment.assess import assess as judge
    from adregnet_jax.registration.field_files import load_field
    from adregnet_jax.registration.result_files import as_text

    for path in (output, error):
        if path is not None and path.exists() and not overwrite:
            raise UserError(f"{path}: exists already; choose another name, or overwrite it")
    chosen = start_jax(device)
    scan = read_image(fixed)
    masks = [None if path is None else read_image(path) for path in (fixed_mask, moving_mask)]
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        found = interruptible(
            lambda: judge(
                scan,
                read_image(moving),
                load_field(field, format),
                modality=modality,
                fixed_mask=masks[0],
                moving_mask=masks[1],
                effort=effort,
            ),
            chosen,
        )
    print(as_text(found.row()))
    if output is not None:
        text = json.dumps(found.record(), indent=2, allow_nan=False) + "\n"
        with new_file(output, overwrite=overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if error is not None and found.error_mm is not None:
        write_image(error, Image(found.error_mm, scan.affine), overwrite=overwrite)
    if fail_on and found.fails(fail_on):
        raise typer.Exit(VERDICT_STATUS)
