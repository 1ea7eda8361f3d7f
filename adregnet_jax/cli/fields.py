"""The commands on fields: `apply`, `invert`, `compose` and `convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from adregnet_jax.cli.options import OverwriteOption
from adregnet_jax.errors import UserError

MEMORY_ADVICE = "resample the field to a coarser grid, or use a machine with more memory"

MAX_INVERSE_ERROR = 0.5  # voxels; above it, the user is warned

# The choices of data.io.transforms.Format and of registration.field.Interpolation, which load NumPy and JAX.
Format = Literal["itk", "nifti", "learn2reg", "spm", "niftyreg"]
Interpolation = Literal["linear", "nearest", "cubic", "label"]

FieldArgument = Annotated[Path, typer.Argument(help="A field: .nii.gz, .nii, .npz or .h5.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")]
InputFormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Format of a NIfTI field to read. Default: inferred from its header.",
        show_default=False,
    ),
]
OutputFormatOption = Annotated[Format, typer.Option("--format", help="Format of a NIfTI field to write.")]


def apply(
    field: FieldArgument,
    target: Annotated[
        Path, typer.Argument(metavar="IMAGE|POINTS", help="An image, or .csv, .fcsv, .mrk.json.")
    ],
    output: OutputOption,
    mode: Annotated[
        Interpolation | None,
        typer.Option(help="For an image. Default: linear; label: for label maps.", show_default=False),
    ] = None,
    format: InputFormatOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Warps a moving IMAGE to the fixed grid, or maps fixed POINTS to the moving scan.

    The image may have any grid; its position in the world is used. Points are in mm.
    """
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.data.io.points import SUFFIXES
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import apply_to_image, apply_to_points

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        if target.name.endswith(SUFFIXES):
            if mode:
                raise UserError(f"--mode applies to images, and {target} holds points: drop it")
            outside = apply_to_points(field, target, output, format=format, overwrite=overwrite)
            if outside:
                _note(f"{outside} points lie outside the field's grid and move like its border")
        else:
            apply_to_image(
                field,
                target,
                output,
                mode=mode or "linear",
                format=format,
                overwrite=overwrite,
            )


def invert(
    field: FieldArgument,
    output: OutputOption,
    from_format: Annotated[
        Format | None, typer.Option("--from", help="Format of the field to read.", show_default=False)
    ] = None,
    format: OutputFormatOption = "itk",
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the inverse of a field, from the moving to the fixed world, on the same grid."""
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import invert_file

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        error_voxels = invert_file(
            field,
            output,
            from_format=from_format,
            format=format,
            overwrite=overwrite,
        )
    if not error_voxels < MAX_INVERSE_ERROR:
        _note(
            f"field and inverse disagree by {error_voxels:.3g} voxels (99th percentile): there is no inverse "
            "where a field folds, and a poor one where it stretches threefold or more"
        )


def compose(
    fields: Annotated[list[Path], typer.Argument(help="Two or more fields on one grid.")],
    output: OutputOption,
    format: OutputFormatOption = "itk",
    overwrite: OverwriteOption = False,
) -> None:
    """Writes one field that warps an image like the FIELDS applied one after the other."""
    if len(fields) < 2:
        raise UserError("compose takes two or more fields, got one")
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import compose_files

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        compose_files(fields, output, format=format, overwrite=overwrite)


def convert(
    field: Annotated[Path, typer.Argument(help="A field, or a matrix: .txt, .tfm or .mat.")],
    output: OutputOption,
    from_format: Annotated[
        Format | None, typer.Option("--from", help="Format of the field to read.", show_default=False)
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="Format of a NIfTI field to write. Default: itk.", show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Converts a field or matrix to another kind of file, given by its suffix."""
    from adregnet_jax.data.io import transforms
    from adregnet_jax.data.io.images import NIFTI_SUFFIXES

    if field.name.endswith(transforms.MATRIX_SUFFIXES):
        if from_format or format:
            raise UserError("--from and --format apply to fields in NIfTI files, not to a matrix: drop them")
        transforms.write_matrix(output, transforms.read_matrix(field), overwrite=overwrite)
        return
    for option, name, path in (("--from", from_format, field), ("--format", format, output)):
        if name and not path.name.endswith(NIFTI_SUFFIXES):
            raise UserError(f"{option} {name} applies to a NIfTI file, and {path} isn't one: drop it")
    displacement, affine = transforms.read_field(field, format=from_format)
    written = format or "itk"
    transforms.write_field(output, displacement, affine, format=written, overwrite=overwrite)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
