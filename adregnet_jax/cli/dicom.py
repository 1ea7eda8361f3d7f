"""The commands on DICOM objects of radiotherapy: `contours` and `dose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.cli.options import AnonymizeOption, OverwriteOption

FieldArgument = Annotated[
    Path, typer.Argument(help="The field from the fixed to the moving series: .nii.gz, .nii, .npz or .h5.")
]
FixedOption = Annotated[
    Path, typer.Option("--fixed", metavar="DIR", help="The series to carry to, on which the field lies.")
]
MovingOption = Annotated[Path, typer.Option("--moving", metavar="DIR", help="The series to carry from.")]
FixedSeriesOption = Annotated[
    str | None, typer.Option("--fixed-series", metavar="UID", help="Which series of a folder with several.")
]
MovingSeriesOption = Annotated[str | None, typer.Option("--moving-series", metavar="UID", help="Likewise.")]
FolderOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="A structure; repeat for more. Default: all."),
]


def contours(
    rtstruct: Annotated[Path, typer.Argument(help="Structures drawn on the moving series.")],
    field: FieldArgument,
    fixed: FixedOption,
    moving: MovingOption,
    output: FolderOption,
    only: OnlyOption = None,
    fixed_series: FixedSeriesOption = None,
    moving_series: MovingSeriesOption = None,
    anonymize: AnonymizeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Carries structures from the moving series to the slices of the fixed one.

    Writes structures.dcm, and each structure's volume before and after to volumes.csv.
    """
    from adregnet_jax.registration.carried import VOLUMES, read_series_field, write_carried_structures
    from adregnet_jax.report.tables import to_text

    between = read_series_field(
        field, fixed=fixed, moving=moving, fixed_series=fixed_series, moving_series=moving_series
    )
    rows = write_carried_structures(
        rtstruct, between, output, only=only or (), anonymize=anonymize, overwrite=overwrite
    )
    print(to_text(rows, VOLUMES))
    print(f"Written to {output}")
