"""The commands on fields: `apply`, `invert`, `compose` and `convert`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adregnet_jax.cli.options import OverwriteOption, PreferOption, SeriesOption
from adregnet_jax.errors import UserError

MEMORY_ADVICE = "resample the field to a coarser grid, or use a machine with more memory"

MAX_INVERSE_ERROR = 0.5  # voxels; above it, the user is warned

# The choices of data.io.transforms.Format and of registration.field.Interpolation, which load NumPy and JAX.
Format = Literal["itk", "nifti", "learn2reg", "spm", "niftyreg"]
Interpolation = Literal["linear", "nearest", "cubic", "label"]

FieldArgument = Annotated[Path, typer.Argument(help="A field or a matrix.")]
TransformsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="TRANSFORM...",
        help="Fields, matrices, composites: fixed points pass through them in this order, as for ANTs.",
        show_default=False,
    ),
]
InvertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--invert",
        metavar="TRANSFORM",
        help="Take the inverse of this one, given by its name or its number. ANTs' [FILE,1] works, too.",
        show_default=False,
    ),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="GRID",
        help="An image on the grid of the result. Default: the grid of the first transform.",
        show_default=False,
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new file.")]
InputFormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Format of NIfTI fields to read. Default: inferred from their headers.",
        show_default=False,
    ),
]
FromOption = Annotated[
    Format | None, typer.Option("--from", help="Format of NIfTI fields to read.", show_default=False)
]
OutputFormatOption = Annotated[Format, typer.Option("--format", help="Format of a NIfTI field to write.")]
BRACKETS = re.compile(r"\[(.*),\s*([01])\]")


def apply(
    transforms: TransformsArgument,
    target: Annotated[
        Path, typer.Argument(metavar="IMAGE|POINTS", help="An image, or .csv, .fcsv, .mrk.json.")
    ],
    output: OutputOption,
    mode: Annotated[
        Interpolation | None,
        typer.Option(help="For an image. Default: linear; label: for label maps.", show_default=False),
    ] = None,
    reference: ReferenceOption = None,
    invert: InvertOption = None,
    format: InputFormatOption = None,
    prefer: PreferOption = None,
    series: SeriesOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Warps a moving IMAGE to the fixed grid, or maps fixed POINTS to the moving scan.

    The image may have any grid; its position in the world is used. Points are in mm.
    """
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.data.io.points import SUFFIXES
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import apply_to_image, apply_to_points

    chain = _chain(transforms, invert, format)
    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        if target.name.endswith(SUFFIXES):
            for option, given in (("--mode", mode), ("--reference", reference), ("--series", series)):
                if given:
                    raise UserError(f"{option} applies to images, and {target} holds points: drop it")
            outside = apply_to_points(chain, target, output, overwrite=overwrite)
            if outside:
                _note(f"{outside} points lie outside the field's grid and move like its border")
        else:
            apply_to_image(
                chain,
                target,
                output,
                mode=mode or "linear",
                reference=reference,
                prefer=prefer,
                series=series,
                overwrite=overwrite,
            )


def invert(
    field: FieldArgument,
    output: OutputOption,
    reference: ReferenceOption = None,
    from_format: FromOption = None,
    format: OutputFormatOption = "itk",
    overwrite: OverwriteOption = False,
) -> None:
    """Writes the inverse of a field, from the moving to the fixed world, or of a matrix.

    Without --reference, the inverse of a field lies on the same grid.
    """
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import TransformFile, compose_files, invert_file

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        if reference or _is_matrix(field):
            back = TransformFile(field, inverted=True, format=from_format)
            compose_files([back], output, format=format, reference=reference, overwrite=overwrite)
            return
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
    transforms: TransformsArgument,
    output: OutputOption,
    reference: ReferenceOption = None,
    invert: InvertOption = None,
    from_format: FromOption = None,
    format: OutputFormatOption = "itk",
    prefer: PreferOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Writes one transform that does what `apply` does with the TRANSFORMS in this order.

    Fields on any grids are resampled; matrices alone become a matrix.
    """
    if len(transforms) < 2:
        raise UserError("compose takes two or more fields, got one")
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import compose_files

    chain = _chain(transforms, invert, from_format)
    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        compose_files(chain, output, format=format, reference=reference, prefer=prefer, overwrite=overwrite)


def convert(
    field: Annotated[Path, typer.Argument(metavar="TRANSFORM", help="A field, a matrix or a composite.")],
    output: OutputOption,
    reference: ReferenceOption = None,
    from_format: FromOption = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="Format of a NIfTI field to write. Default: itk.", show_default=False),
    ] = None,
    moving: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE", help="The field is a warp of FSL, of this moving image.", show_default=False
        ),
    ] = None,
    prefer: PreferOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Converts a transform to another kind of file, given by its suffix, or to another grid."""
    from adregnet_jax.data.io import transforms
    from adregnet_jax.data.io.images import NIFTI_SUFFIXES

    if (from_format or format) and field.name.endswith(transforms.MATRIX_SUFFIXES) and not reference:
        raise UserError("--from and --format apply to fields in NIfTI files, not to a matrix: drop them")
    for option, name, path in (("--from", from_format, field), ("--format", format, output)):
        if name and not path.name.endswith(NIFTI_SUFFIXES):
            raise UserError(f"{option} {name} applies to a NIfTI file, and {path} isn't one: drop it")
    if moving is not None:
        if reference or from_format:
            raise UserError("--moving reads a warp of FSL on its own grid: drop --reference and --from")
        warp = transforms.read_fsl_warp(field, moving=moving)
        written = format or "itk"
        transforms.write_field(output, warp.displacement, warp.affine, format=written, overwrite=overwrite)
        return
    if reference is None and not field.name.endswith(transforms.ITK_TRANSFORM_SUFFIXES):
        displacement, affine = transforms.read_field(field, format=from_format)  # needs no JAX
        transforms.write_field(output, displacement, affine, format=format or "itk", overwrite=overwrite)
        return
    from adregnet_jax.cli.execution import start_jax
    from adregnet_jax.launch.devices import memory_errors_as_user_errors
    from adregnet_jax.registration.field_files import TransformFile, compose_files

    start_jax(None)
    with memory_errors_as_user_errors(MEMORY_ADVICE):
        compose_files(
            [TransformFile(field, format=from_format)],
            output,
            format=format or "itk",
            reference=reference,
            prefer=prefer,
            overwrite=overwrite,
        )


def _chain(transforms: Sequence[Path], invert: Sequence[str] | None, format: Format | None) -> list[Any]:
    """The transforms with those marked that are to be inverted."""
    from adregnet_jax.data.io.images import NIFTI_SUFFIXES
    from adregnet_jax.registration.field_files import TransformFile

    chain = []
    for transform in transforms:
        if found := BRACKETS.fullmatch(str(transform)):
            chain.append(TransformFile(Path(found[1]), inverted=found[2] == "1"))
        else:
            chain.append(TransformFile(transform))
    for name in invert or ():
        meant = [number for number, one in enumerate(chain) if one.path == Path(name)]
        if not meant and name.isdecimal() and 1 <= int(name) <= len(chain):
            meant = [int(name) - 1]
        if len(meant) != 1:
            raise UserError(
                f"--invert {name}: names {len(meant)} of the transforms; expected one, by its path or by its"
                f" number from 1 to {len(chain)}"
            )
        chain[meant[0]] = dataclasses.replace(chain[meant[0]], inverted=True)
    if format and not any(one.path.name.endswith(NIFTI_SUFFIXES) for one in chain):
        raise UserError(f"format {format} applies to fields in NIfTI files, and there is none: drop it")
    return [
        dataclasses.replace(one, format=format) if one.path.name.endswith(NIFTI_SUFFIXES) else one
        for one in chain
    ]


def _is_matrix(path: Path) -> bool:
    from adregnet_jax.data.io.transforms import ITK_TRANSFORM_SUFFIXES, Field, read_transform

    if not path.name.endswith(ITK_TRANSFORM_SUFFIXES):
        return False
    return not any(isinstance(part, Field) for part in read_transform(path))


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
