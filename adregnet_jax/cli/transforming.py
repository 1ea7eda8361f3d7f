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
        Mode, typer.Option(help="Between the voxels of an image; label: for label maps.")
    ] = Mode.linear,
    format: InputFormatOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Warps a moving IMAGE to the fixed grid, or takes fixed POINTS to the moving scan.

    The image may be of any grid: what counts is where it lies in the world. Points are in mm.
    """
    from adregnet_jax.cli.execution import memory_errors_as_user_errors, start_jax
    from adregnet_jax.cli.transforms import apply_to_image, apply_to_points
    from adregnet_jax.data.points import SUFFIXES

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        if target.name.endswith(SUFFIXES):
            outside = apply_to_points(field, target, output, format=_literal(format), overwrite=overwrite)
            if outside:
                _note(f"{outside} points lie outside of the field's grid: they move as its border does")
        else:
            apply_to_image(
                field, target, output, mode=mode.value, format=_literal(format), overwrite=overwrite
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
    from adregnet_jax.cli.transforms import invert_file

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        folded_percent = invert_file(
            field,
            output,
            from_format=_literal(from_format),
            format=_literal(format),
            overwrite=overwrite,
        )
    if folded_percent:
        _note(f"{folded_percent:.3g} % of the field is folded: there the inverse is none")


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
    from adregnet_jax.cli.transforms import compose_files

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        compose_files(fields, output, format=_literal(format), overwrite=overwrite)


def convert(
    field: Annotated[Path, typer.Argument(help="A field, or a matrix: .txt, .tfm or .mat.")],
    output: OutputOption,
    from_format: Annotated[
        Format | None, typer.Option("--from", help="Format of the field that is read.", show_default=False)
    ] = None,
    format: OutputFormatOption = Format.itk,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the same field (or matrix) as another kind of file, which its suffix tells."""
    from adregnet_jax.data import transforms

    if field.name.endswith(transforms.MATRIX_SUFFIXES):
        transforms.write_matrix(output, transforms.read_matrix(field), overwrite=overwrite)
        return
    displacement, affine = transforms.read_field(field, _literal(from_format))
    transforms.write_field(output, displacement, affine, format=_literal(format), overwrite=overwrite)


def info(
    file: Annotated[Path, typer.Argument(help="An image, a field, a matrix or points.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tells what a FILE holds: its grid, orientation and range; a field's motion and folding."""
    import json

    from adregnet_jax.cli.description import as_text, describe

    description = describe(file)
    print(json.dumps(description, indent=2) if as_json else as_text(description))


def _literal(format: Format | None) -> Any:
    return None if format is None else format.value


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
