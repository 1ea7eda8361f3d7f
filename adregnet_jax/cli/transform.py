"""The commands `apply`, `invert`, `compose`, `convert` and `info`."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adregnet_jax.cli.options import Format, OverwriteOption
from adregnet_jax.errors import UserError

MEMORY_ADVICE = "resample the field to a coarser grid, or take a machine with more memory"

MAX_INVERSE_ERROR = 0.5  # voxels, from which on the user is told

FieldArgument = Annotated[Path, typer.Argument(help="A field: .nii.gz, .nii, .npz or .h5.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")]
InputFormatOption = Annotated[
    Format | None,
    typer.Option("--format", help="Of a NIfTI field that is read; told by its header.", show_default=False),
]
OutputFormatOption = Annotated[Format, typer.Option("--format", help="Of a NIfTI field that is written.")]


class Mode(enum.StrEnum):
    linear = "linear"
    nearest = "nearest"
    cubic = "cubic"
    label = "label"


def apply(
    field: FieldArgument,
    target: Annotated[
        Path, typer.Argument(metavar="IMAGE|POINTS", help="An image, or .csv, .fcsv, .mrk.json.")
    ],
    output: OutputOption,
    mode: Annotated[
        Mode | None,
        typer.Option(help="Of an image; linear unless told; label: for label maps.", show_default=False),
    ] = None,
    format: InputFormatOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Warps a moving IMAGE to the fixed grid, or takes fixed POINTS to the moving scan.

    The image may be of any grid: what counts is where it lies in the world. Points are in mm.
    """
    from adregnet_jax.cli.execution import memory_errors_as_user_errors, start_jax
    from adregnet_jax.cli.field_files import apply_to_image, apply_to_points
    from adregnet_jax.data.io.points import SUFFIXES

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        if target.name.endswith(SUFFIXES):
            if mode:
                raise UserError(f"--mode is of images, and {target} has points")
            outside = apply_to_points(field, target, output, format=_literal(format), overwrite=overwrite)
            if outside:
                _note(f"{outside} points lie outside of the field's grid: they move as its border does")
        else:
            apply_to_image(
                field,
                target,
                output,
                mode=(mode or Mode.linear).value,
                format=_literal(format),
                overwrite=overwrite,
            )


def invert(
    field: FieldArgument,
    output: OutputOption,
    from_format: Annotated[
        Format | None, typer.Option("--from", help="Format of the field that is read.", show_default=False)
    ] = None,
    format: OutputFormatOption = Format.itk,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the field back, from the moving to the fixed world, on the same grid."""
    from adregnet_jax.cli.execution import memory_errors_as_user_errors, start_jax
    from adregnet_jax.cli.field_files import invert_file

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        error_voxels = invert_file(
            field,
            output,
            from_format=_literal(from_format),
            format=_literal(format),
            overwrite=overwrite,
        )
    if not error_voxels < MAX_INVERSE_ERROR:
        _note(
            f"field and inverse miss each other by {error_voxels:.3g} voxels (99th percentile): there is no "
            "inverse where a field folds, and a poor one where it stretches threefold or more"
        )


def compose(
    fields: Annotated[list[Path], typer.Argument(help="Two fields or more, on one grid.")],
    output: OutputOption,
    format: OutputFormatOption = Format.itk,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the one field that does what the FIELDS do to an image, one after the other."""
    if len(fields) < 2:
        raise UserError("compose takes two fields or more, got one")
    from adregnet_jax.cli.execution import memory_errors_as_user_errors, start_jax
    from adregnet_jax.cli.field_files import compose_files

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        compose_files(fields, output, format=_literal(format), overwrite=overwrite)


def convert(
    field: Annotated[Path, typer.Argument(help="A field, or a matrix: .txt, .tfm or .mat.")],
    output: OutputOption,
    from_format: Annotated[
        Format | None, typer.Option("--from", help="Format of the field that is read.", show_default=False)
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            "--format", help="Of a NIfTI field that is written: itk unless told.", show_default=False
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the same field (or matrix) as another kind of file, which its suffix tells."""
    from adregnet_jax.data.io import transforms
    from adregnet_jax.data.io.images import NIFTI_SUFFIXES

    if field.name.endswith(transforms.MATRIX_SUFFIXES):
        if from_format or format:
            raise UserError("--from and --format are of fields in NIfTI files, and this is a matrix")
        transforms.write_matrix(output, transforms.read_matrix(field), overwrite=overwrite)
        return
    for option, name, path in (("--from", from_format, field), ("--format", format, output)):
        if name and not path.name.endswith(NIFTI_SUFFIXES):
            raise UserError(f"{option} {name} is of a NIfTI file, and {path} is none")
    displacement, affine = transforms.read_field(field, _literal(from_format))
    written = _literal(format or Format.itk)
    transforms.write_field(output, displacement, affine, format=written, overwrite=overwrite)


def info(
    file: Annotated[Path, typer.Argument(help="An image, a field, a matrix, points, or a workdir.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tells what a FILE holds: its grid, orientation and range; a field's motion and folding; of a workdir of
    train.py, what was trained there, by which commands."""
    import json

    from adregnet_jax.cli.info import as_text, describe

    description = describe(file)
    print(json.dumps(description, indent=2) if as_json else as_text(description))


def _literal(format: Format | None) -> Any:
    return None if format is None else format.value


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
